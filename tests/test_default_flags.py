"""Plans are the same, bit for bit, as users compile: eager, jitted, batched, sharded, in parts."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("default_flags.py")


def run(*options, **env):
    """What the script prints, in a process of its own."""
    command = [sys.executable, SCRIPT, *options]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, env=os.environ | env
    ).stdout


def test_all_ways_to_plan_agree_and_so_does_a_fresh_process():
    # The flags of this process make compilation faster, and numbers different.
    env = {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    lines = run(**env).splitlines()
    assert len(lines) == 4
    assert run("auto", "max_moves", **env).splitlines() == [lines[0], lines[3]]

"""Plans are the same, bit for bit, as users compile: eager in parts, jitted, batched, sharded."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("default_flags.py")


def run(way):
    """The hashes that the script prints, in a process of its own."""
    # The flags of this process make compilation faster, and numbers different.
    env = {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    return subprocess.run(
        [sys.executable, SCRIPT, way],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | env,
    ).stdout.splitlines()


def test_all_ways_to_plan_agree_in_processes_of_their_own():
    lines = run("parts")
    assert len(lines) == 4
    assert run("sharded") == lines

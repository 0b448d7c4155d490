"""Two processes on one machine, as two hosts: the same plan, and weights that follow it."""

import os
import socket
import subprocess
import sys


def test_hosts_plan_their_layers_and_exchange_weights():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    # Four devices each, not the eight of these tests.
    env = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.host", str(rank), address],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=180)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
        assert "followed the plan" in output

"""vLLM and SGLang themselves, in processes of an environment of their own: `make peers`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PYTHON = Path(sys.prefix) / "peers/bin/python"
ROOT = Path(__file__).parent.parent


@pytest.mark.peers
@pytest.mark.skipif(not PYTHON.exists(), reason="the engines are not there: make peers")
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_weights_move_by_our_plans(engine, size):
    run = subprocess.run(
        [PYTHON, "-m", f"tests.peer_{engine}", str(size)],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-5000:]

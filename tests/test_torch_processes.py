"""eplb_torch in processes: threads, memory, torch.compile, import, forks and devices."""

import gc
import os
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import eplb_torch as eplb
import jax
import pytest
import torch
from eplb_torch import backend

from tests import torch_oracle
from tests.helpers import lognormal
from tests.test_torch import COUNTS, LOAD, assert_equal


def in_a_new_process(script):
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_threads():
    loads = [torch.from_numpy(lognormal(3, 32, seed=seed)) for seed in range(8)]
    expected = [eplb.rebalance_experts(load, *COUNTS) for load in loads]
    with ThreadPoolExecutor(8) as pool:
        plans = pool.map(lambda i: eplb.rebalance_experts(loads[i % 8], *COUNTS), range(64))
    for i, plan in enumerate(plans):
        assert_equal(plan, expected[i % 8])


def held():
    """Live JAX arrays and tensors, and bytes allocated by Python and NumPy."""
    gc.collect()
    tensors = sum(type(x) is torch.Tensor for x in gc.get_objects())
    return len(jax.live_arrays()), tensors, tracemalloc.get_traced_memory()[0]


def test_calls_leave_nothing_behind():
    weight = torch.zeros(4, 16, dtype=torch.int64)

    def plan(times):
        for _ in range(times):
            weight.random_(1, 1000)
            maps = eplb.rebalance_experts(weight, 24, 1, 1, 4, strategy="greedy")
        return maps

    maps = plan(200)
    tracemalloc.start()
    try:
        plan(10)
        arrays, tensors, size = held()
        with jax.no_tracing():
            plan(300)
        later = held()
    finally:
        tracemalloc.stop()
    assert later[:2] == (arrays, tensors)
    assert later[2] - size < 300 * maps[0].nbytes / 4
    assert_equal(plan(1), torch_oracle.rebalance_experts(weight, 24, 1, 1, 4))


def test_torch_compile_breaks_its_graph_there():
    def caller(load):
        phy2log, _, logcnt = eplb.rebalance_experts(load * 2, *COUNTS, strategy="greedy")
        return phy2log + 1, logcnt.float() / eplb.to_torch(eplb.to_jax(logcnt)).sum()

    compiled = torch.compile(caller, backend="eager")
    for load in (LOAD, LOAD + 1):
        for ours, eager in zip(compiled(load), caller(load), strict=True):
            assert torch.equal(ours, eager)


def test_importing_starts_nothing():
    in_a_new_process(
        "import sys, eplb_torch, eplb_torch.vllm, eplb_torch.sglang\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()\n"
        "assert 'torch._dynamo' not in sys.modules\n"
        "import torch; assert not torch.cuda.is_initialized()"
    )


def test_without_a_cpu_jax_uses_its_default_device(monkeypatch):
    """As with JAX_PLATFORMS=cuda."""
    monkeypatch.setattr(backend, "find_device", lambda platform, index: None)
    assert backend.compute_device(None) == jax.local_devices()[0]


@pytest.mark.parametrize("first", [False, True])
def test_after_a_fork(first):
    """It works if JAX had not started in the parent, and raises if it had."""
    start = "eplb_torch.replicate_experts(load, 12)\n" if first else ""
    out = in_a_new_process(
        "import os, warnings, jax, torch, eplb_torch\n"
        "warnings.simplefilter('ignore')\n"
        "load = torch.rand(2, 8)\n"
        f"{start}"
        f"device = {'jax.devices()[0]' if first else None}\n"
        "if os.fork() == 0:\n"
        "    try:\n"
        "        maps = eplb_torch.replicate_experts(load, 12, device=device)\n"
        "        print(len(maps), flush=True)\n"
        "    except RuntimeError as error:\n"
        "        print(error, flush=True)\n"
        "    os._exit(0)\n"
        "assert os.wait()[1] == 0\n"
        "eplb_torch.replicate_experts(load, 12)\n"
    )
    assert ("forked after JAX had started" in out) if first else out == "3\n"


@pytest.mark.parametrize("asked", [None, "XLA_CLIENT_MEM_FRACTION"])
def test_gpu_memory_is_not_reserved_unless_asked_for(asked, monkeypatch):
    """Where torch has GPUs, JAX's backend starts with XLA_PYTHON_CLIENT_PREALLOCATE=false."""
    seen = []
    variable = "XLA_PYTHON_CLIENT_PREALLOCATE"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(jax, "local_devices", lambda: seen.append(os.environ.get(variable)))
    monkeypatch.delenv(variable, raising=False)
    if asked:
        monkeypatch.setenv(asked, "0.5")
    backend._start_backend.__wrapped__()
    assert seen == ([] if asked else ["false"])
    assert variable not in os.environ

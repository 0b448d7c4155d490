"""Checks of shapes and types in every call, strict promotion, and eight CPU devices."""

import gc
import os
from pathlib import Path

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    # Most of the time of these tests is compilation; test_default_flags.py compiles as users do.
    + " --xla_backend_optimization_level=0"
    + " --xla_cpu_use_fusion_emitters=false"
    + " --xla_cpu_parallel_codegen_split_count=1"
)
# A worker reads what another one compiled, and a second local run what the first one did.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache/jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import pytest
from jaxtyping import install_import_hook

import tests.typecheck  # noqa: F401  the hook looks it up

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
install_import_hook("eplb_jax", "tests.typecheck.check")

FLAGS = os.environ["XLA_FLAGS"]

collect_ignore_glob = ["peer_*.py"]  # programs that import engines; test_peers.py runs them


def pytest_configure(config):
    # Another worker may be writing an entry that is read; it is compiled here, too, then.
    broken = "ignore:Error reading persistent compilation cache entry"
    config.addinivalue_line("filterwarnings", broken)


def pytest_collection_finish():
    """No module that was collected has changed the flags: three times the time otherwise."""
    assert os.environ["XLA_FLAGS"] == FLAGS
    # Traces are millions of objects that stay; looking through them takes a tenth of the time.
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)


@pytest.fixture(autouse=True, scope="module")
def memory_maps():
    """Drop programs before a process has as many memory maps as Linux allows, 65,530.

    Every compiled program takes some of them; past the limit XLA crashes.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_text().splitlines()) > 45_000:
        jax.clear_caches()

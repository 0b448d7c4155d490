"""Checks of shapes and types in every call, strict dtypes, and eight CPU devices."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    # Most of the time of these tests is compilation; test_quality.py compiles as users do.
    + " --xla_backend_optimization_level=0"
    + " --xla_cpu_use_fusion_emitters=false"
)

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_dtype_promotion", "strict")
# The public functions are left out: they take anything, and say what is wrong with it themselves.
CORE = [
    *("lanes", "orders", "objective", "construction", "starts"),
    *("refinement", "exchange", "pairs", "portfolio", "distinct", "kernels"),
]
install_import_hook([f"eplb_jax.packing.{name}" for name in CORE], "beartype.beartype")

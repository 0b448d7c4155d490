"""The type checker of the tests: beartype, for all functions but the public ones.

Public functions take anything, and raise errors of their own where it does not fit.
"""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from beartype import BeartypeConf, beartype

F = TypeVar("F", bound=Callable)
ROOT = Path(__file__).parent.parent / "eplb_jax"


def _public() -> set[tuple[str, str]]:
    """Module and name of what the public `__init__` files import."""
    names = set()
    for init in (ROOT / "__init__.py", ROOT / "runtime/__init__.py"):
        for node in ast.walk(ast.parse(init.read_text())):
            if isinstance(node, ast.ImportFrom):
                names |= {(node.module, alias.name) for alias in node.names}
    return names


# Called with arguments of public functions before these are checked.
_CHECKING = ("plan_options.plan_checked", "policy.is_hierarchical", "policy.resolve_policy")
PUBLIC = _public() | {("eplb_jax.planning." + x.split(".")[0], x.split(".")[1]) for x in _CHECKING}
PUBLIC |= {("eplb_jax.types", "check_topology"), ("eplb_jax.planning.placement", "as_placement")}
PUBLIC |= {("eplb_jax.evaluation.traces", name) for name in ("_number", "_change")}
_MODULES = {module + "." + name for module, name in PUBLIC}  # metrics, loads, traces
_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function: F) -> F:
    """The function with checks of its arguments, unless it is public or checks arguments itself."""
    module, name = getattr(function, "__module__", ""), getattr(function, "__qualname__", "")
    of_public_module = module in _MODULES and not name.startswith("_")
    if (module, name.split(".")[0]) in PUBLIC or of_public_module:
        return function
    if module == "eplb_jax.checks" or module.startswith("eplb_jax.cli."):
        return function
    return _checked(function)

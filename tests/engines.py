"""Stubs of engines, and the loads and counts that their tests share."""

import sys
import types

import torch

from tests.helpers import lognormal

COUNTS = 48, 4, 2, 8
LOAD = torch.from_numpy(lognormal(3, 32))


def modules(monkeypatch, **contents):
    """Stub modules and their parent packages, for the length of a test."""
    for name, values in contents.items():
        parts = name.split("__")
        for i in range(1, len(parts) + 1):
            module = types.ModuleType(".".join(parts[:i]))
            module.__path__ = []
            monkeypatch.setitem(sys.modules, module.__name__, module)
            if i > 1:
                setattr(sys.modules[".".join(parts[: i - 1])], parts[i - 1], module)
        module.__dict__.update(values)
    return module

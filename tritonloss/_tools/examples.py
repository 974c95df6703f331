"""The examples of all slices, found by going through the package."""

from __future__ import annotations

import importlib
import pkgutil

import tritonloss

from .._core.example import Example


def public_modules() -> list[str]:
    """The names, below the package, of all modules in its public rooms, in order."""
    found = pkgutil.walk_packages(tritonloss.__path__, f"{tritonloss.__name__}.")
    names = sorted(module.name.removeprefix(f"{tritonloss.__name__}.") for module in found)
    return [name for name in names if not name.startswith("_") and "._" not in name]


def examples() -> list[Example]:
    """What every public module declares as its EXAMPLES, in the order of the modules' names."""
    modules = [importlib.import_module(f"tritonloss.{name}") for name in public_modules()]
    return [example for module in modules for example in getattr(module, "EXAMPLES", ())]

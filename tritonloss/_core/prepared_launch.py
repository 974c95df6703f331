"""Launches prepared once, for calls that differ in nothing but the tensors' addresses."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from . import configurations

_run = JITFunction.run
_T = TypeVar("_T")
Pointers = torch.Tensor | tuple[torch.Tensor, ...]

# What has been prepared, by what it depends on; forgotten when images of so many sizes have come.
_prepared: dict[Hashable, Any] = {}
_MOST = 4096


def prepared(key: Hashable, prepare: Callable[[], _T]) -> _T:
    """What ``prepare`` returns, kept under ``key`` until configurations change."""
    full_key = (key, configurations.state())
    found: _T | None = _prepared.get(full_key)
    if found is None:
        if len(_prepared) >= _MOST:
            _prepared.clear()
        found = _prepared[full_key] = prepare()
    return found


def kind(tensor: torch.Tensor) -> Hashable:
    """All that a launch depends on of a tensor, but its address."""
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.device


class PreparedLaunch:
    """``kernel[grid](**tensors, **arguments)`` for tensors of the same dtypes, and one device.

    Triton binds and specialises every argument at every launch, which takes the host far longer
    than the launch. Here that is done once: all that a kernel is specialised for and that may still
    change is whether an address is a multiple of 16 bytes.

    Args:
        kernel: the kernel.
        grid: its programs.
        arguments: all of the launch but the tensors.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        self._kernel = kernel
        self._grid = (*grid, 1, 1)[:3]
        self._arguments = arguments
        self._compiled: dict[tuple[bool, ...], CompiledKernel] = {}
        self._template: list[Any] = []
        self._places: list[int] = []

    def __call__(self, **tensors: Pointers) -> None:
        """Launch. The tensors are the same ones by name, in the same order, at every call."""
        pointers: list[torch.Tensor] = []
        for given in tensors.values():
            pointers += given if isinstance(given, tuple) else (given,)
        aligned = tuple([tensor.data_ptr() % 16 == 0 for tensor in pointers])
        compiled = self._compiled.get(aligned)
        # Whoever records launches, or compiles only, has put something of their own in its place.
        if compiled is None or JITFunction.run is not _run:
            self._first(aligned, tensors)
            return
        arguments = self._template.copy()
        for place, tensor in zip(self._places, tensors.values(), strict=True):
            arguments[place] = tensor
        compiled[self._grid](*arguments)

    def _first(self, aligned: tuple[bool, ...], tensors: dict[str, Pointers]) -> None:
        """Triton's own way, which returns what it has compiled (in the interpreter: nothing)."""
        compiled = self._kernel[self._grid](**tensors, **self._arguments)
        if isinstance(compiled, CompiledKernel) and JITFunction.run is _run:
            names = self._kernel.arg_names
            self._template = [self._arguments.get(name) for name in names]
            self._places = [names.index(name) for name in tensors]
            self._compiled[aligned] = compiled

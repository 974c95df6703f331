"""Launches prepared once, for calls that differ in nothing but the tensors' addresses."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from . import configurations
from .kernel_keys import complete_key

_run = JITFunction.run
_T = TypeVar("_T")
Pointers = torch.Tensor | tuple[torch.Tensor, ...]

# What has been prepared, by what it depends on. All of it is forgotten when there is _MOST of it,
# which images of ever new sizes would come to.
_prepared: dict[Hashable, Any] = {}
_MOST = 4096
# The arguments of the launch whose kernel is being compiled.
_true_arguments: dict[str, Any] = {}


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
    """All of a tensor that a launch depends on, except its address."""
    aligned = tensor.data_ptr() % 16 == 0
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.device, aligned


def is_aligned(tensor: torch.Tensor) -> bool:
    """Whether its address is a multiple of 16 bytes, as that of all that PyTorch allocates is."""
    return tensor.data_ptr() % 16 == 0


class PreparedLaunch:
    """``kernel[grid](**tensors, **arguments)`` for tensors of the same dtypes, and one device.

    Triton binds and specialises every argument at every launch, which takes the host far longer
    than the launch. Here that is done once.

    A kernel is compiled for the width of its numbers, alone or in a tuple, and for nothing else of
    them: images of any size share what is compiled. Where a kernel needs to know more of a number,
    a constexpr factor in the kernel says so. Only the addresses are left: either all of them are
    multiples of 16 bytes, except those of single elements, or the kernel relies on none.

    Args:
        kernel: the kernel.
        grid: its programs.
        arguments: all arguments of the launch except the tensors.
        aligned: whether all addresses are multiples of 16 bytes, if the caller knows; False if the
            kernel makes no use of it. By default every launch looks at the addresses.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        arguments: dict[str, Any],
        aligned: bool | None = None,
    ) -> None:
        self._kernel = kernel
        self._grid = (*grid, 1, 1)[:3]
        self._arguments = arguments
        self._aligned = aligned
        self._compiled: dict[bool, CompiledKernel] = {}
        self._template: list[Any] = []
        self._places: list[int] = []

    def __call__(self, **tensors: Pointers) -> None:
        """Launch. The tensors are the same ones by name, in the same order, at every call."""
        aligned = _are_aligned(tensors) if self._aligned is None else self._aligned
        compiled = self._compiled.get(aligned)
        # Those who record launches, or only compile, have put a function of their own in the place
        # of JITFunction.run.
        if compiled is None or JITFunction.run is not _run:
            compiled = self._first(aligned, tensors)
            if compiled is None:
                return
        arguments = self._template.copy()
        for place, tensor in zip(self._places, tensors.values(), strict=True):
            arguments[place] = tensor
        enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        if enter.calls or leave.calls:  # somebody profiles
            compiled[self._grid](*arguments)
            return
        active = driver.active
        stream = active.get_current_stream(active.get_current_device())
        compiled.run(
            *self._grid, stream, compiled.function, compiled.packed_metadata, None, None, None,
            *arguments,
        )  # fmt: skip

    def _first(self, aligned: bool, tensors: dict[str, Pointers]) -> CompiledKernel | None:
        """The kernel, compiled by Triton; None if there is nothing left to launch."""
        if not isinstance(self._kernel, JITFunction):  # the interpreter's
            self._kernel[self._grid](**tensors, **self._arguments)
            return None
        complete_key(self._kernel, self._arguments.values())
        numbers = {p.name for p in self._kernel.params if not p.is_constexpr}
        known = {k: _any(v) if k in numbers else v for k, v in self._arguments.items()}
        pointers = tensors if aligned else {k: _anywhere(v) for k, v in tensors.items()}
        _true_arguments.update(self._arguments)
        try:
            compiled = self._kernel.run(grid=self._grid, warmup=True, **pointers, **known)
        finally:
            _true_arguments.clear()
        names = self._kernel.arg_names
        self._template = [self._arguments.get(name) for name in names]
        self._places = [names.index(name) for name in tensors]
        if isinstance(compiled, CompiledKernel) and JITFunction.run is _run:
            self._compiled[aligned] = compiled
        return compiled


def true_arguments() -> dict[str, Any]:
    """The arguments of the launch whose kernel is being compiled, for those who record launches.

    Triton itself is given others: see PreparedLaunch.
    """
    return dict(_true_arguments)


class Anywhere:
    """A tensor for which Triton compiles a kernel that does not rely on the address."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.dtype = tensor.dtype

    def data_ptr(self) -> int:
        """An address that is a multiple of nothing."""
        return 1


def _are_aligned(tensors: dict[str, Pointers]) -> bool:
    """Whether all addresses are multiples of 16 bytes, except those of single elements."""
    addresses = 0
    for given in tensors.values():
        for tensor in given if isinstance(given, tuple) else (given,):
            if tensor.dim():
                addresses |= tensor.data_ptr()
    return addresses % 16 == 0


def _anywhere(given: Pointers) -> Any:
    return tuple(map(Anywhere, given)) if isinstance(given, tuple) else Anywhere(given)


def _any(value: Any) -> Any:
    """A value of the same kind for which Triton specialises no kernel.

    Triton specialises 1 and multiples of 16; 3 is neither, and the other number needs 64 bits.
    """
    if isinstance(value, tuple):
        parts = [_any(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if type(value) is not int:
        return value
    return 3 if -(2**31) <= value < 2**31 else 2**31 + 3

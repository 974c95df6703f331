"""Kernel launches seen from outside: recorded and run, only compiled, or skipped; for any GPU."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITCallable, JITFunction

from .._core.configurations import target_changed
from .._core.prepared_launch import Anywhere, true_arguments

_CONFIGURATION = ("columns", "lanes", "rows", "unroll")


@dataclass(frozen=True)
class Launch:
    """One `kernel[grid](...)`: the kernel's name, its constexprs, and what compiling gave.

    The fields of an argument that is a named tuple are kept as NAME.field. ``numbers`` are the
    integers among those that are no constexprs, and GRID.0 to GRID.2, where they are known.
    Launches with the same ``signature``, of code that is the same in all ``modules``, run the same
    machine code.
    """

    kernel: str
    constants: dict[str, Any]
    num_warps: int
    compiled: Any = None
    compile_seconds: float | None = None  # None: the kernel came from Triton's cache
    numbers: Mapping[str, int] = field(default_factory=dict)
    programs: int | None = None  # None: the grid is a function
    tensor_bytes: int = 0  # of all tensors that it is given, each once
    largest_tensor: int = 0  # elements of the largest one
    signature: str = ""  # all that Triton specialises the kernel for
    modules: tuple[str, ...] = ()  # of the kernel, and of device functions among its arguments

    @property
    def configuration(self) -> str:
        """Block sizes and warps, with the names that tuned files have for them."""
        sizes = {name: self.constants.get(f"STRIP.{name}") for name in _CONFIGURATION}
        known = [f"{name.upper()}={value}" for name, value in sizes.items() if value is not None]
        return " ".join([*known, f"num_warps={self.num_warps}"])


@contextmanager
def recorded(mode: Literal["run", "compile", "skip"]) -> Iterator[list[Launch]]:
    """Record every launch inside the block, and run it, only compile it, or skip it.

    Triton has no public way to compile what a launcher would launch. So the method in which every
    `kernel[grid](...)` ends is replaced inside the block.
    """
    launches: list[Launch] = []
    original = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = None
        seconds: list[float] = []
        if mode != "skip":
            with _compile_seconds(seconds):
                compiled = original(
                    self, *args, grid=grid, warmup=warmup or mode == "compile", **kwargs
                )
        tensors = _tensors((*args, *kwargs.values()))
        signature, modules = "", {self.fn.__module__}
        if mode != "run":
            signature = _signature(self, args, kwargs, modules)
        launches.append(
            Launch(
                kernel=self.__name__,
                constants=_constants(self, args, kwargs),
                numbers=_numbers(self, args, kwargs, grid),
                num_warps=kwargs.get("num_warps", 4),
                compiled=compiled,
                compile_seconds=seconds[0] if seconds else None,
                programs=None if callable(grid) else math.prod(grid),
                tensor_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
                largest_tensor=max((tensor.numel() for tensor in tensors), default=0),
                signature=signature,
                modules=tuple(sorted(modules)),
            )
        )
        # The caller must not launch what is only to be compiled.
        return None if mode == "compile" else compiled

    JITFunction.run = run
    try:
        yield launches
    finally:
        JITFunction.run = original


@contextmanager
def offline(target: GPUTarget) -> Iterator[None]:
    """Make Triton believe that the current GPU is `target`. Nothing can be launched inside."""
    before = driver._active  # reset_active() would look for a GPU, and raise where there is none
    driver.set_active(_OfflineDriver(target))
    target_changed()
    try:
        yield
    finally:
        driver._active = before
        target_changed()


class _OfflineDriver:
    """As much of a driver as Triton's front end asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        # Triton keeps a table of compiled kernels for each device: each target is a device.
        return f"{self._target.backend}:{self._target.arch}"

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def map_python_to_cpp_type(self, name: str) -> str:
        return name


@contextmanager
def _compile_seconds(seconds: list[float]) -> Iterator[None]:
    def listener(*, times: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            seconds.append(times.total / 1e6)

    triton.knobs.compilation.listener, before = listener, triton.knobs.compilation.listener
    try:
        yield
    finally:
        triton.knobs.compilation.listener = before


def _signature(
    kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], modules: set[str]
) -> str:
    """All that Triton specialises a kernel for, as text; adds the modules of given functions."""
    *_, bind = kernel.device_caches[driver.active.get_current_device()]
    _, specialization, options = bind(*args, **kwargs)
    given = _text((tuple(specialization), tuple(sorted(options.items()))), modules)
    return f"{kernel.fn.__module__}:{kernel.__name__} {given}"


def _text(value: Any, modules: set[str]) -> str:
    """A value as text that is the same in every process."""
    if isinstance(value, tuple):
        return f"({', '.join(_text(inner, modules) for inner in value)})"
    if isinstance(value, JITCallable):
        modules.add(value.fn.__module__)
        return f"{value.fn.__module__}:{value.fn.__qualname__}"
    return repr(value)


def _tensors(values: tuple[Any, ...]) -> list[torch.Tensor]:
    """The tensors among the values; one that is given under two names counts once."""
    plain = (value.tensor if isinstance(value, Anywhere) else value for value in values)
    tensors = {id(value): value for value in plain if isinstance(value, torch.Tensor)}
    return list(tensors.values())


def _numbers(
    kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], grid: Any
) -> dict[str, int]:
    values = _values(kernel, args, kwargs) | true_arguments()
    names = [parameter.name for parameter in kernel.params if not parameter.is_constexpr]
    axes = () if callable(grid) else (*grid, 1, 1)[:3]
    given = _fields({name: values[name] for name in names if name in values})
    return {name: value for name, value in given.items() if type(value) is int} | {
        f"GRID.{axis}": programs for axis, programs in enumerate(axes)
    }


def _values(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = [parameter.name for parameter in kernel.params]
    return dict(zip(names, args, strict=False)) | kwargs


def _constants(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    values = _values(kernel, args, kwargs)
    names = [parameter.name for parameter in kernel.params if parameter.is_constexpr]
    return _fields({name: values[name] for name in names if name in values})


def _fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, of each that is a named tuple its fields instead, as NAME.field."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        fields: dict[str, Any] = getattr(value, "_asdict", dict)()
        found |= {f"{name}.{field}": inner for field, inner in fields.items()} or {name: value}
    return found

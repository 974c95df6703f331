"""What a slice tells the benchmarks: its operations, their cases, bytes, goals and kernels.

A slice is a module of this room, called like the one of tritonloss that it measures. It holds
`OPERATIONS`, a tuple of `Operation`; nothing else has to know about it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import perf.operations as room
from tritonloss._core.configurations import forced

PASSES = ("forward", "backward", "full")
Outputs = Tensor | tuple[Tensor, ...]


class UnknownCaseError(Exception):
    """A library has no such loss, or not with these options."""


@dataclass(frozen=True)
class Shape:
    """A standard size of logits or images, [batch, classes, height, width]."""

    name: str
    batch: int
    classes: int
    height: int
    width: int

    @property
    def size(self) -> tuple[int, int, int, int]:
        return self.batch, self.classes, self.height, self.width

    @property
    def elements(self) -> int:
        return self.batch * self.classes * self.height * self.width

    @property
    def pixels(self) -> int:
        return self.batch * self.height * self.width

    def reduced(self) -> Shape:
        """At most a few hundredths of the work: what a CPU does in a fraction of a second."""
        return replace(self, batch=1, height=self.height // 8, width=self.width // 8)

    def tiny(self) -> Shape:
        """A few hundred pixels, what Triton's interpreter does in seconds; odd stays odd."""
        width = 21 if self.width % 2 else 20
        return replace(self, batch=1, classes=min(self.classes, 2), height=11, width=width)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("cityscapes", 4, 19, 1024, 2048),  # street scenes, full crop
        Shape("voc", 16, 21, 513, 513),  # the papers' own setting, odd size
        Shape("ade20k", 8, 150, 512, 512),  # many classes
        Shape("coco-stuff", 4, 171, 640, 640),  # more classes
        Shape("binary", 16, 1, 1024, 1024),  # medical, matting
    )
}


@dataclass(frozen=True)
class Case:
    """One question to one operation. `options` are the function's own keyword arguments."""

    shape: Shape
    dtype: str = "float32"
    layout: str = "contiguous"
    labels: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    schedule: str | None = None  # forced on operations that have several
    ratio: float | None = None  # of logits that are interpolated: the shape is that of the labels
    against_compile: bool = False  # also measured against torch.compile, which takes long
    everywhere: bool = False  # compiled for all targets in the short compile-only table, too
    rare: bool = False  # compiled for the full compile-only table only

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def parameters(self) -> str:
        """A text of all that tells this case from others of its shape, dtype and layout."""
        given = {"labels": self.labels, "schedule": self.schedule, "ratio": self.ratio}
        named = {name: value for name, value in given.items() if value is not None}
        return " ".join(f"{name}={value}" for name, value in {**named, **self.options}.items())

    @property
    def text(self) -> str:
        return f"{self.shape.name} {self.dtype} {self.layout} {self.parameters}".strip()

    def columns(self) -> dict[str, Any]:
        """The columns of a row that say what was asked."""
        return {
            "dtype": self.dtype,
            "layout": self.layout,
            "batch": self.shape.batch,
            "classes": self.shape.classes,
            "height": self.shape.height,
            "width": self.shape.width,
            "parameters": self.parameters,
        }

    def reduced(self) -> Case:
        return replace(self, shape=self.shape.reduced())

    def tiny(self) -> Case:
        return replace(self, shape=self.shape.tiny())


@dataclass(frozen=True)
class Floor:
    """Bytes that a pass has to move at the least."""

    forward: int
    backward: int

    def of(self, direction: str) -> int:
        return {"forward": self.forward, "backward": self.backward}.get(
            direction, self.forward + self.backward
        )


@dataclass(frozen=True)
class Goal:
    """A number that the kernels' full pass has to reach in one case."""

    text: str
    case: Case
    column: str
    at_least: float | None = None
    at_most: float | None = None


@dataclass(frozen=True)
class CodeGoal:
    """Instructions per output that a kernel may take at most in one of the shipped cases.

    `loop` says what is counted. By a loop's name it is the instructions of that loop, per output
    that the loop completes. By "total", or a name such as "total, class present", it is those that
    the whole kernel executes per output.
    """

    text: str
    case: Case
    kernel: str
    loop: str
    at_most: float
    target: str = "sm_90"


# What is known of a launch: the kernel's constexprs and integers by their names, GRID.0 to GRID.2,
# PROGRAMS, THREADS of a program, and ELEMENTS of the map that the operation is about.
Given = Mapping[str, Any]
Number = Callable[[Given], float]


def one(_: Given) -> float:
    """1, whatever the launch."""
    return 1.0


@dataclass(frozen=True)
class LoopNotes:
    """A loop of a kernel's device code, and how often a program goes round it.

    Attributes:
        name: what it goes over. Loops of one name are counted together.
        within: the function that it is written in and its variable ("function.variable", with
            "while" for one that has none), or either: "function", ".variable". The first notes that
            fit a loop are taken. Several with the same `within` are about as many loops in the
            order of the source, that of the calls if it is one function's that is called several
            times; one alone is about all of them.
        rounds: how many rounds one program makes of the loop as it is written, in all.
        when: the only case in which it runs, like "class present"; None for always.
        unroll: how many rounds the source asks the compiler to make one of. None where it does not
            ask: the compiler may have done so by itself, which is told by what is left in no loop.
        share: the outputs that it completes, as a share of the kernel's.
    """

    name: str
    within: str
    rounds: Number
    when: str | None = None
    unroll: Number | None = None
    share: Number = one


@dataclass(frozen=True)
class KernelNotes:
    """How to read a kernel's machine code: the outputs of one thread, and all loops."""

    outputs: Number
    loops: tuple[LoopNotes, ...] = ()


_SMALL_LAUNCH = {"LANES": 8, "ROWS": 8, "num_warps": 1}


@dataclass(frozen=True)
class Operation:
    """One public function: how to call it, and what to ask of it.

    Attributes:
        function: the public function of tritonloss, called as function(*inputs, **options).
        reference: the same function of kernels_reference, or PyTorch's own where it has one.
        inputs: makes a case's tensors on a device, random and repeatable.
        launch: runs all launchers on a case's tensors, without autograd.
            It must work with tensors on torch's meta device.
        floor: bytes that a case has to move.
        cases: what the report measures, the most telling first.
        shipped: what the compile-only table compiles; one case for each way a kernel is built.
        kernels: kernel name -> how to read its machine code, for every kernel that is launched.
        operators: names of configurations, for forcing small launches in the interpreter. Of an
            operation with several schedules the first one chooses the schedule.
        small_launch: what of a configuration is forced there: small enough for several programs
            even on a tiny map, since the interpreter takes 30 us a step.
        excused: elements of the first input's gradient where rounding may flip a decision, so
            that no kernel could agree with float64; None where there is no such thing.
        libraries: other people's implementations, name -> adapter in perf/operations/peers.py.
        differentiable: whether there is a backward pass.
        kept: the bytes of what the function reads beside its inputs, such as a memory.
    """

    name: str
    function: Callable[..., Outputs]
    reference: Callable[..., Outputs]
    inputs: Callable[[Case, torch.device], tuple[Tensor, ...]]
    launch: Callable[[Case, tuple[Tensor, ...]], object]
    floor: Callable[[Case], Floor]
    cases: tuple[Case, ...]
    shipped: tuple[Case, ...]
    kernels: Mapping[str, KernelNotes]
    operators: tuple[str, ...]
    goals: tuple[Goal | CodeGoal, ...] = ()
    small_launch: Mapping[str, int] = field(default_factory=lambda: dict(_SMALL_LAUNCH))
    excused: Callable[..., Tensor] | None = None
    libraries: Mapping[str, Callable[[], Callable[..., Outputs]]] = field(default_factory=dict)
    differentiable: bool = True
    kept: Callable[[Case], int] = lambda case: 0


def operations(names: Iterable[str] | None = None) -> list[Operation]:
    """All operations of all slices, or those named.

    Raises:
        ValueError: a name is no operation's.
    """
    found = [operation for slice_name in slices() for operation in _operations_of(slice_name)]
    if names is None:
        return found
    known = {operation.name: operation for operation in found}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"ops must be out of {sorted(known)}; got {unknown}")
    return [known[name] for name in names]


def slices() -> list[str]:
    """The modules of this room that hold operations, by their full names."""
    found = pkgutil.iter_modules(room.__path__, f"{room.__name__}.")
    names = sorted(module.name for module in found)
    return [name for name in names if hasattr(importlib.import_module(name), "OPERATIONS")]


@contextmanager
def scheduled(operation: Operation, case: Case) -> Iterator[None]:
    """Force the case's schedule, if it names one, on the operator that chooses: the first."""
    if case.schedule is None:
        yield
        return
    with forced(operation.operators[0], {"schedule": case.schedule}):
        yield


def strip_outputs(given: Given) -> float:
    """Outputs of one thread of a strip kernel, where the strip lies within the map."""
    lanes = given["STRIP.lanes"] / given["THREADS"]
    return float(given["STRIP.columns"] * given["STRIP.rows"] * lanes)


def strip_rows(given: Given) -> float:
    """Rows that a program reads: those of its strip and of the windows that begin above it."""
    return float(given["STRIP.rows"] + given["WINDOW.size"] - 1)


def _strip_unroll(given: Given) -> float:
    return float(given["STRIP.unroll"])


def strip_loops(*rows: LoopNotes) -> tuple[LoopNotes, ...]:
    """Notes of the loop over a strip's rows, or of the loops given, and of those over taps in it.

    There are loops over taps because wide windows are not unrolled where a lane has one column.
    """
    over_rows = rows or (strip_loop("rows", ".i"),)
    return (
        *over_rows,
        LoopNotes("taps", ".distance", lambda g: strip_rows(g) * (g["WINDOW.size"] // 2)),
        LoopNotes("taps", ".step", lambda g: strip_rows(g) * g["WINDOW.size"]),
    )


def strip_loop(name: str, within: str, when: str | None = None) -> LoopNotes:
    """Notes of a loop over all rows that a program reads, unrolled as the strip says."""
    return LoopNotes(name, within, strip_rows, when, unroll=_strip_unroll)


def share_of_the_map(given: Given) -> float:
    """A thread's share of the operation's map, for kernels whose own outputs are something else."""
    return float(given["ELEMENTS"] / (given["PROGRAMS"] * given["THREADS"]))


def variations(base: Case, *changes: Mapping[str, Any]) -> tuple[Case, ...]:
    """The base case, and one more for each change of it; "options" are added to the base's."""
    cases = [base]
    for change in changes:
        options = {**base.options, **change.get("options", {})}
        cases.append(replace(base, **{**change, "options": options}))
    return tuple(cases)


def rarely(base: Case, *changes: Mapping[str, Any]) -> tuple[Case, ...]:
    """The variations without the base case, for the full compile-only table alone."""
    only = replace(base, everywhere=False, against_compile=False, rare=True)
    return variations(only, *changes)[1:]


def random_map(case: Case, device: torch.device, seed: int = 0) -> Tensor:
    """Values like a network's logits: noise of standard deviation 2, in the case's layout."""
    values = torch.empty(case.shape.size, dtype=case.torch_dtype, device=device)
    if case.layout == "channels_last":
        values = values.to(memory_format=torch.channels_last)
    elif case.layout == "strided":
        batch, classes, height, width = case.shape.size
        wider = values.new_empty(batch, classes, height, width + 3)
        values = wider[..., 1 : 1 + width]  # no row is aligned
    if device.type == "meta":
        return values  # has no values; asking for random ones imports torch.compile
    return values.normal_(0, 2, generator=torch.Generator(device).manual_seed(seed))


def random_labels(case: Case, device: torch.device, seed: int = 1) -> Tensor:
    """Labels in regions of 32 x 32 pixels, 3 % of the regions ignored (255), as annotations are.

    Labels drawn anew for each pixel would put every class into every tile, which no image does.
    Where there is one class, the labels are 0 and 1.
    """
    batch, classes, height, width = case.shape.size
    dtype = getattr(torch, str(case.labels))
    if device.type == "meta":
        return torch.empty(batch, height, width, dtype=dtype, device=device)
    regions = (batch, -(-height // 32), -(-width // 32))
    generator = torch.Generator(device).manual_seed(seed)
    coarse = torch.randint(max(classes, 2), regions, device=device, generator=generator)
    ignored = torch.rand(regions, device=device, generator=generator) < 0.03
    coarse = torch.where(ignored, 255, coarse)
    fine = coarse.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, :height, :width]
    return fine.to(dtype).contiguous()


def bytes_of(tensors: Sequence[Tensor]) -> int:
    """Bytes that the tensors' elements take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _operations_of(slice_name: str) -> tuple[Operation, ...]:
    return tuple(importlib.import_module(slice_name).OPERATIONS)

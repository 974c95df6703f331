"""Hostile inputs for a slice, in a process that may die of them: `python -m tests.hostile SLICE`.

`tests/losses/test_hostile.py` has a process for each slice and reads its exit status. Where the
kernels run in Triton's interpreter, every load and store must lie in a tensor that the kernel was
given, and the processes are children of one that has imported everything: without arguments it
takes the slices' names line by line.
"""

from __future__ import annotations

import inspect
import itertools
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy
import torch
import triton.runtime.interpreter as interpreter
from torch import Tensor
from torch.nn import functional as F

import tritonloss
from tests.oracle import LAYOUTS, as_layout, assert_no_worse, segmentation_case
from tests.slices import (
    DIFFERENTIABLE,
    EXAMPLES,
    OF_MAPS,
    as_a_number,
    is_pixelwise,
    is_upsampled,
    one_of_each,
    operators_with,
    with_more,
)
from tritonloss._core import backend, checks
from tritonloss._core.configurations import forced
from tritonloss._core.example import Example, logits_and_target
from tritonloss._tools.interpreter import hasten_interpreter

Loss = Callable[[Tensor, Tensor], Tensor]

SIZE = (4, 6)
# Pooled, 4 x 6 pixels are 6 regions, whose labels the predictions explain all but one degree of
# freedom: M is epsilon, and the float32 gradient of large images is what is left of terms 1e4 times
# as large. Calls with images so small are float64, as the first example is.
SIZES = {"rmi_loss, large images": (6, 8)}
# Of the largest gradient: as the slice's own tests have it; elsewhere the rounding of the dtype.
TOLERANCES = {"rmi_loss, large images": 2e-5}
LABELS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
FLOATS = (float("nan"), float("inf"), -float("inf"), 3e38, -3e38)
INTEGERS = (-(2**63), -(2**31), -(2**15), -1, 2**7 - 1, 2**15 - 1, 2**16, 2**31 - 1, 2**63 - 1)


def _against_a_ramp(x: Tensor, _: Tensor) -> tuple[Tensor, ...]:
    """An image, and a ramp that does not depend on it."""
    ramp = torch.linspace(0, 1, x.numel(), device=x.device, dtype=x.dtype)
    return x, ramp.view(x.shape)


def _far_offsets(logits: Tensor, target: Tensor) -> tuple[Any, ...]:
    """Offsets large enough to matter, of which one is 0."""
    own = torch.linspace(2.0, 0.0, logits.size(1), device=logits.device)
    other = torch.linspace(0.1, 3.0, logits.size(1), device=logits.device)
    return logits, target, tritonloss.MarginOffsets(own, other)


def _matrices(x: Tensor, _: Tensor) -> Tensor:
    """All of linalg, on one matrix per image: x^T x + 1 where x is finite."""
    square = x.flatten(1, 2)
    A = square.mT @ square + torch.eye(square.size(2), device=x.device, dtype=x.dtype)
    total = torch.zeros((), device=x.device)
    for function in dict.fromkeys(
        e.function for n, e in DIFFERENTIABLE.items() if n not in OF_MAPS
    ):
        given = (A, square.mT)[: len(inspect.signature(function).parameters)]
        results = function(*given)
        for result in [results] if isinstance(results, Tensor) else results:
            total = total + result.sum()
    return total


WAYS = with_more(
    OF_MAPS,
    {
        "focal_loss": {"mean": {}},
        **{
            f"{name}_loss": {"per image": {"options": {"per_image": True}}}
            for name in ("dice", "generalized_dice")
        },
        "margin_calibrated_loss": {
            f"far {variant}": {"options": {"variant": variant}, "arguments": _far_offsets}
            for variant in ("paper", "released", "margin")
        },
        "rmi_loss": {
            "avg": {"options": {"region_size": 1, "pool_size": 2}},
            "max": {"options": {"region_size": 1, "pool_size": 2, "pooling": "max"}},
            "nearest": {"options": {"region_size": 1, "pool_size": 2, "pooling": "nearest"}},
            "drop": {"options": {"region_size": 1, "pool_size": 2, "ignore": "drop"}},
            "raw": {"options": {"region_size": 2, "pooling": None}},
        },
        "gaussian_statistics": {"defaults": {}},
        "ssim": {"a ramp": {"options": {"window_size": 3}, "arguments": _against_a_ramp}},
    },
)


def _slice_of(example: Example) -> str:
    return str(example.function.__module__).rpartition(".")[2]


# The slices, and the ways through their kernels; linalg has one for all of its functions.
SLICES = {_slice_of(e): [w for w in WAYS.values() if _slice_of(w) == _slice_of(e)]
          for e in OF_MAPS.values()}  # fmt: skip
SLICES["linalg"] = [replace(EXAMPLES["linalg.inv"], name="linalg", function=_matrices,
                            arguments=logits_and_target)]  # fmt: skip
# How many spoilt maps of a loss the backward pass must have been handed, at the least.
SAVED = {"cross_entropy": 1, "focal_loss": 1, "margin_calibration": 2, "soft_iou": 1,
         "region_mutual_information": 3}  # fmt: skip


def loss_of(example: Example, classes: int, device: torch.device) -> Loss:
    """The example as a loss, with weights for every option that takes a table of the classes."""
    table = torch.linspace(0.5, 2.0, classes, device=device)
    options = inspect.signature(example.function).parameters.values()
    named = [p for p in options if p.kind is not p.POSITIONAL_OR_KEYWORD]
    tables = {p.name: table for p in named if p.default is None and "Tensor" in p.annotation}
    return lambda logits, target: as_a_number(example(logits, target, **tables))


def filled(tensor: Tensor) -> Tensor:
    """The same shape, dtype and layout, with one hostile value after the other."""
    if tensor.is_floating_point():
        values = torch.tensor(FLOATS, dtype=torch.float64).to(tensor.dtype)
    else:
        info = torch.iinfo(tensor.dtype)
        fitting = {info.min, info.max, *(v for v in INTEGERS if info.min <= v <= info.max)}
        values = torch.tensor(sorted(fitting - {0}), dtype=tensor.dtype)
    index = torch.arange(tensor.numel()) % values.numel()
    return torch.empty_like(tensor).copy_(values[index].view(tensor.shape))


class SavedMaps:
    """Hooks that hand the backward pass what the forward pass saved, as it was or spoilt."""

    def __init__(self, *given: Tensor) -> None:
        self.given = [tensor.data_ptr() for tensor in given]
        self.spoilt = False
        self.count = 0

    def pack(self, tensor: Tensor) -> Tensor:
        return tensor

    def unpack(self, tensor: Tensor) -> Tensor:
        if not self.spoilt or tensor.dim() < 3 or tensor.data_ptr() in self.given:
            return tensor
        self.count += 1
        return filled(tensor)


@contextmanager
def bounds_checked() -> Iterator[None]:
    """Every access of an interpreted kernel must lie in a tensor that the kernel was given."""
    real, initialise = interpreter._interpreter, interpreter.GridExecutor._init_args_hst
    held: list[tuple[int, int]] = []

    def note(value: Any) -> None:
        if isinstance(value, tuple):
            for part in value:
                note(part)
        elif isinstance(value, Tensor):
            storage = value.untyped_storage()
            held.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))

    def initialised(self: Any, args: Any, kwargs: Any) -> Any:
        hosted = initialise(self, args, kwargs)
        held.clear()
        note((*hosted[0], *hosted[1].values()))
        return hosted

    def check(pointers: Any, mask: Any, size: int) -> None:
        wanted = numpy.broadcast_to(pointers, numpy.shape(mask))[mask].astype(numpy.uint64)
        if not wanted.size:
            return
        lowest, highest = int(wanted.min()), int(wanted.max()) + size
        if any(first <= lowest and highest <= end for first, end in held):
            return  # all of them lie in one tensor
        inside = numpy.zeros(wanted.shape, dtype=bool)
        for first, end in held:
            inside |= (wanted >= first) & (wanted + numpy.uint64(size) <= end)
        if not inside.all():
            raise IndexError(f"{(~inside).sum()} accesses outside of what the kernel was given")

    def load(pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
        check(pointers, mask, numpy.dtype(dtype).itemsize)
        return real.load(pointers, mask, other, dtype)

    def store(pointers: Any, value: Any, mask: Any) -> Any:
        check(pointers, mask, value.dtype.itemsize)
        return real.store(pointers, value, mask)

    def atomic_rmw(operation: Any, pointers: Any, value: Any, mask: Any, semantics: Any) -> Any:
        check(pointers, mask, value.dtype.itemsize)
        return real.atomic_rmw(operation, pointers, value, mask, semantics)

    names = {name: getattr(real, name) for name in dir(real) if not name.startswith("_")}
    interpreter._interpreter = SimpleNamespace(
        **{**names, "load": load, "store": store, "atomic_rmw": atomic_rmw}
    )
    interpreter.GridExecutor._init_args_hst = initialised
    try:
        yield
    finally:
        interpreter._interpreter = real
        interpreter.GridExecutor._init_args_hst = initialise


def value_and_gradient(
    loss: Loss, logits: Tensor, target: Tensor, backend: str = "triton"
) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    with tritonloss.use_backend(backend):
        value = loss(leaf, target)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def check_pixels_and_maps(
    loss: Loss, hidden: Tensor, logits: Tensor, target: Tensor, layout: str, labels: torch.dtype
) -> int:
    """How many saved maps were spoilt for a backward pass, which must end all the same.

    Before that: whatever the logits that only ignored pixels see (`hidden`) and the labels of
    ignored pixels are, not a bit may change.
    """
    ignored = target == 255
    calm = as_layout(torch.where(hidden, 0.0, logits), layout).requires_grad_()
    wild = as_layout(torch.where(hidden, filled(logits), logits), layout)
    calm_target = as_layout(target, layout)
    narrow = torch.where(ignored, 0, target).to(labels)
    foreign = as_layout(torch.where(ignored, filled(narrow), narrow), layout)

    maps = SavedMaps(calm, calm_target)
    with (
        torch.autograd.graph.saved_tensors_hooks(maps.pack, maps.unpack),
        tritonloss.use_backend("triton"),
    ):
        value = loss(calm, calm_target)
    (gradient,) = torch.autograd.grad(value, calm, retain_graph=True)
    assert value.isfinite() and gradient.isfinite().all()
    loud_value, loud_gradient = value_and_gradient(loss, wild, foreign)
    assert torch.equal(loud_value, value.detach()) and torch.equal(loud_gradient, gradient)
    hidden = as_layout(hidden, layout).expand_as(logits)
    assert hidden.any() and (gradient[hidden] == 0).all()

    maps.spoilt = True
    torch.autograd.grad(value, calm)
    return maps.count


def hidden_in(example: Example, target: Tensor) -> Tensor:
    """The logits that only ignored pixels see, [N, 1, H, W].

    Those under them; if they are interpolated to twice the size, all pixels around must be ignored.
    """
    seen = (target != 255)[:, None]
    if is_upsampled(example):
        seen = F.max_pool2d(seen.float(), 5, stride=1, padding=2) > 0
    return ~seen


def pools_images(example: Example) -> bool:
    """Whether the loss is a function of sums over all images, or of pairs of their pixels."""
    if _slice_of(example) == "pixel_contrast":
        return True
    option = inspect.signature(example.function).parameters.get("per_image")
    return option is not None and not example.options.get("per_image", option.default)


def check_other_images(
    loss: Loss, logits: Tensor, target: Tensor, layout: str, tolerance: float | None, pooled: bool
) -> None:
    """An image full of hostile values: the value is not finite, the other image none the worse.

    Where the images are pooled into one score, no gradient of the other one would be right.
    """
    wild = logits.clone()
    wild[0] = filled(logits[0])
    given = as_layout(wild, layout), as_layout(target, layout)
    value, gradient = value_and_gradient(loss, *given)
    expected, yardstick = value_and_gradient(loss, *given, backend="reference")
    _, truth = value_and_gradient(loss, given[0].double(), given[1], backend="reference")
    assert not value.isfinite() and not expected.isfinite()
    if pooled:
        return
    assert gradient[1].isfinite().all()
    assert_no_worse(gradient[1], yardstick[1], truth[1], tolerance=tolerance)


def check(name: str, device: torch.device) -> None:
    """Check all that must hold of a slice, in every layout, each with labels of another dtype.

    Of several examples of a function, the first one is checked in every layout and each of the
    others in one.
    """
    turns = itertools.cycle(zip(LAYOUTS, LABELS, strict=True))
    first = [example.name for example in one_of_each(EXAMPLES.values()).values()]
    for example in SLICES[name]:
        later = example.name in EXAMPLES and example.name not in first
        size = SIZES.get(example.name, SIZE)
        logits, target = segmentation_case((2, 3, *size), device=device)
        if example.module is not None and not is_pixelwise(example):
            logits, target = logits[:, :2], target.where(target != 2, 0)  # fewer planes: quicker
        target[:, 0, 1] = 255  # in the row that an expanded map repeats
        if is_upsampled(example):
            target[:, :, :3] = 255
        loss = loss_of(example, logits.size(1), device)
        for layout, labels in itertools.islice(turns, 1 if later else len(LAYOUTS)):
            print(layout, labels, example.name, flush=True)  # how far it came
            tolerance, pooled = TOLERANCES.get(example.name), pools_images(example)
            check_other_images(loss, logits, target, layout, tolerance, pooled)
            if example.module is not None:
                hidden = hidden_in(example, target)
                count = check_pixels_and_maps(loss, hidden, logits, target, layout, labels)
                assert count >= SAVED.get(name, 0), f"{count} saved maps"
    if device.type == "cuda":
        torch.cuda.synchronize()


def main(name: str) -> None:
    """Run all checks of a slice."""
    # As on a GPU, where labels are not checked.
    checks.check_labels_in_range = lambda *_: None
    device = torch.device("cpu" if backend.INTERPRETED else "cuda")
    with ExitStack() as stack:
        if backend.INTERPRETED:
            hasten_interpreter()
            stack.enter_context(bounds_checked())
        for operator in operators_with("COLUMNS"):
            stack.enter_context(forced(operator, {"COLUMNS": 2}))
        check(name, device)


def serve() -> None:
    """Answer every name with what a child says of that slice: its exit status, and its output."""
    for line in sys.stdin:
        with tempfile.TemporaryFile("w+") as said:
            child = os.fork()
            if child == 0:
                for stream in (sys.stdout, sys.stderr):
                    os.dup2(said.fileno(), stream.fileno())
                status = 1
                try:
                    main(line.strip())
                    status = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stdout.flush()
                    os._exit(status)
            _, status = os.waitpid(child, 0)
            said.seek(0)
            print(json.dumps([os.waitstatus_to_exitcode(status), said.read()]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1]) if sys.argv[1:] else serve()

"""Hostile inputs for one loss, in a process that may die of them: ``python -m tests.hostile LOSS``.

tests/losses/test_hostile.py starts one for each loss, and reads the exit status. Where the kernels
run in Triton's interpreter, every load and store is held to the tensors that the kernel was given.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy
import torch
import triton.runtime.interpreter as interpreter
from torch import Tensor

import tritonloss
from tests.oracle import LAYOUTS, as_layout, segmentation_case
from tritonloss import linalg
from tritonloss._core import backend, checks
from tritonloss._core.configurations import forced
from tritonloss._tools.interpreter import patch_language_once
from tritonloss.functional import (
    binary_cross_entropy,
    cross_entropy,
    focal_loss,
    margin_calibrated_loss,
    rmi_loss,
    ssim,
    ssim_loss,
    structural_similarity_loss,
)

Loss = Callable[[Tensor, Tensor], Tensor]

SIZE = (4, 6)
LABELS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
FLOATS = (float("nan"), float("inf"), -float("inf"), 3e38, -3e38)
INTEGERS = (-(2**63), -(2**31), -(2**15), -1, 2**7 - 1, 2**15 - 1, 2**16, 2**31 - 1, 2**63 - 1)


def _statistics(x: Tensor, _: Tensor) -> Tensor:
    mean, variance = tritonloss.gaussian_statistics(x)
    return mean.square().sum() + variance.sum()


def _similarity(x: Tensor, _: Tensor) -> Tensor:
    other = torch.linspace(0, 1, x.numel(), device=x.device, dtype=x.dtype).view(x.shape)
    return ssim(x, other, window_size=3)


def _matrices(x: Tensor, _: Tensor) -> Tensor:
    """All of linalg, on one matrix per image: x^T x + 1 where x is finite."""
    square = x.flatten(1, 2)
    eye = torch.eye(square.size(2), device=x.device, dtype=x.dtype)
    A = square.mT @ square + eye
    factor, info = linalg.cholesky_ex(A)
    total = factor.sum() + linalg.logdet(A).sum() + linalg.inv(A).sum()
    return total + linalg.solve(A, square.mT).sum() + info.sum()


def _margin(x: Tensor, target: Tensor, variant: str) -> Tensor:
    own = torch.linspace(2.0, 0.0, x.size(1), device=x.device)
    other = torch.linspace(0.1, 3.0, x.size(1), device=x.device)
    return margin_calibrated_loss(x, target, (own, other), variant=variant)


def _weighted(loss: Callable[..., Tensor], name: str, **options: Any) -> Loss:
    def with_weights(x: Tensor, target: Tensor) -> Tensor:
        weight = torch.linspace(0.5, 2.0, x.size(1), device=x.device)
        return loss(x, target, **{name: weight}, **options)

    return with_weights


# The losses, and the ways through their kernels.
OF_LABELS: dict[str, dict[str, Loss]] = {
    "cross_entropy": {"": _weighted(cross_entropy, "weight", label_smoothing=0.1)},
    "binary_cross_entropy": {"": _weighted(binary_cross_entropy, "pos_weight")},
    "focal_loss": {"": _weighted(focal_loss, "alpha")},
    "margin_calibrated": {
        variant: partial(_margin, variant=variant) for variant in ("paper", "released", "margin")
    },
    "structural_similarity": {"": structural_similarity_loss},
    "ssim_loss": {"": partial(ssim_loss, window_size=3)},
    "rmi": {
        "avg": partial(rmi_loss, region_size=1, pool_size=2),
        "max": partial(rmi_loss, region_size=1, pool_size=2, pooling="max"),
        "nearest": partial(rmi_loss, region_size=1, pool_size=2, pooling="nearest"),
        "drop": partial(rmi_loss, region_size=1, pool_size=2, ignore="drop"),
        "raw": partial(rmi_loss, region_size=2, pooling=None),
    },
}
OF_IMAGES: dict[str, dict[str, Loss]] = {
    "gaussian_statistics": {"": _statistics},
    "ssim": {"": _similarity},
    "linalg": {"": _matrices},
}
LOSSES = {**OF_LABELS, **OF_IMAGES}
# How many maps of a loss the backward pass must at least have been handed spoilt.
SAVED = {"cross_entropy": 1, "focal_loss": 1, "margin_calibrated": 2, "rmi": 3}


# --- what is hostile ------------------------------------------------------------------------------


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
    """What the forward pass saves, handed to the backward pass as it was or spoilt."""

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

    names = {name: getattr(real, name) for name in dir(real) if not name.startswith("_")}
    interpreter._interpreter = SimpleNamespace(**{**names, "load": load, "store": store})
    interpreter.GridExecutor._init_args_hst = initialised
    try:
        yield
    finally:
        interpreter._interpreter = real
        interpreter.GridExecutor._init_args_hst = initialise


# --- what must hold -------------------------------------------------------------------------------


def value_and_gradient(
    loss: Loss, logits: Tensor, target: Tensor, backend: str = "triton"
) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    with tritonloss.use_backend(backend):
        value = loss(leaf, target)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def check_pixels_and_maps(
    loss: Loss, logits: Tensor, target: Tensor, layout: str, labels: torch.dtype
) -> int:
    """Whatever stands at ignored pixels, under whatever label: not a bit changes.

    And a backward pass over spoilt maps ends; returned is how many there were.
    """
    ignored = target == 255
    calm = as_layout(torch.where(ignored[:, None], 0.0, logits), layout).requires_grad_()
    wild = as_layout(torch.where(ignored[:, None], filled(logits), logits), layout)
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
    hidden = as_layout(ignored, layout)[:, None].expand_as(logits)
    assert hidden.any() and (gradient[hidden] == 0).all()

    maps.spoilt = True
    torch.autograd.grad(value, calm)
    return maps.count


def check_other_images(loss: Loss, logits: Tensor, target: Tensor, layout: str) -> None:
    """An image full of hostile values: the value is not finite, the other image none the worse."""
    wild = logits.clone()
    wild[0] = filled(logits[0])
    given = as_layout(wild, layout), as_layout(target, layout)
    value, gradient = value_and_gradient(loss, *given)
    expected, truth = value_and_gradient(loss, *given, backend="reference")
    assert not value.isfinite() and not expected.isfinite()
    assert gradient[1].isfinite().all()
    allowed = 1e-3 * truth[1].abs().max().item()
    torch.testing.assert_close(gradient[1], truth[1], rtol=1e-4, atol=allowed)


def check(name: str, device: torch.device) -> None:
    """All that must hold of a loss, in every layout, each with labels of another dtype."""
    logits, target = segmentation_case((2, 3, *SIZE), device=device)
    if name in ("structural_similarity", "ssim_loss", "rmi"):  # each class has a pass of its own
        logits, target = logits[:, :2], target.where(target != 2, 0)
    target[:, 0, 1] = 255  # in the row that an expanded map repeats
    for (layout, labels), way in itertools.product(zip(LAYOUTS, LABELS, strict=True), LOSSES[name]):
        print(layout, labels, way, flush=True)  # how far it came
        loss = LOSSES[name][way]
        check_other_images(loss, logits, target, layout)
        if name in OF_LABELS:
            count = check_pixels_and_maps(loss, logits, target, layout, labels)
            assert count >= SAVED.get(name, 0), f"{count} saved maps"
    if device.type == "cuda":
        torch.cuda.synchronize()


def main(name: str) -> None:
    """Run all checks of a loss."""
    # As on a GPU, where nobody looks at the labels.
    checks.check_labels_in_range = lambda *_: None
    device = torch.device("cpu" if backend.INTERPRETED else "cuda")
    with ExitStack() as stack:
        if backend.INTERPRETED:
            patch_language_once()
            stack.enter_context(bounds_checked())
        for half in ("forward", "backward", "stored", "coefficients"):
            for window in ("gaussian_statistics", "structural_similarity", "ssim"):
                stack.enter_context(forced(f"{window}_{half}", {"COLUMNS": 2}))
        check(name, device)


if __name__ == "__main__":
    main(sys.argv[1])

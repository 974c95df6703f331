"""The launchers of losses of class sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton

from .._core.backend import device_guard
from .._core.prepared_launch import PreparedLaunch, kind, prepared
from .class_heads import Counting, _class_head_kernel
from .class_sums import (
    Probabilities,
    _class_sums_backward_kernel,
    _class_sums_forward_kernel,
)
from .pixel_grid import in_grains, over_pixels
from .pixel_terms import Loss, Term, Walk, labels_of, terms_of
from .planes import compute_dtype
from .sums import tickets

# Programs going forward, of all images, about as many as a large GPU has room for twice: more of
# them would add up fewer tiles each, over their lanes, where there are enough tiles.
_PROGRAMS = 1024
_MOST_ROUNDS = 64


class ClassLoss(NamedTuple):
    """A loss of class sums with its options, as its launchers know it.

    Attributes:
        loss: the record of its probabilities, with what is saved of them.
        probabilities: what they have beside the record.
        head: (classes, numbers, OPTIONS, COUNTING) -> (value, weight, taken, own, all), a device
            function: the sum of values and that of weights over so many classes, and the first's
            gradient to their two sums, [classes].
        options: a NamedTuple of what the head is compiled for.
        counting: which classes are in the mean.
        numbers: what the head gets at run time.
        ignore_index: the label of pixels that are ignored, or None.
    """

    loss: Loss
    probabilities: Probabilities
    head: Callable[..., Any]
    options: Any
    counting: Counting
    numbers: tuple[float, ...]
    ignore_index: int | None


class ClassResults(NamedTuple):
    """What the operator of a loss of class sums returns."""

    loss: torch.Tensor  # []
    scale: torch.Tensor  # [1]: what the gradient is multiplied by
    table: torch.Tensor  # [2, N or 1, C]: what own pixels get on top, what all get
    first: torch.Tensor | None  # maps for the backward pass, [N, H, W]
    second: torch.Tensor | None


def allocated(
    loss: Loss, per_image: bool, logits: torch.Tensor, target: torch.Tensor, save: bool
) -> ClassResults:
    """The results, of which nothing is computed yet; maps are there if ``save``."""
    images, classes = logits.shape[:2]
    dtype = compute_dtype(logits.dtype)
    groups = images if per_image else 1
    dtypes = loss.saved(logits, False) if save else ()
    maps = [logits.new_empty(target.shape, dtype=saved) for saved in dtypes]
    return ClassResults(
        logits.new_empty((), dtype=dtype),
        logits.new_empty((1,), dtype=dtype),
        logits.new_empty((2, groups, classes), dtype=dtype),
        *maps,
        *(None,) * (2 - len(maps)),
    )


def launch_class_sums(
    loss: ClassLoss,
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    save: bool,
) -> ClassResults:
    """The loss, and what its backward pass needs if ``save``."""
    results = allocated(loss.loss, loss.counting.per_image, logits, target, save)
    if target.numel() == 0:
        return results._replace(loss=results.loss.zero_(), scale=results.scale.zero_())
    images, classes = logits.shape[:2]
    launch, programs = prepared(
        ("class_sums", id(loss.loss.record), kind(logits), kind(target), loss.ignore_index, save),
        lambda: _prepare_sums(loss, logits, target, save),
    )
    finish = prepared(
        ("class_head", loss.head, loss.options, loss.counting, loss.numbers, programs,
         images, classes, logits.dtype, logits.device, weight is None or weight.dtype),
        lambda: _prepare_head(loss, images, classes, programs),
    )  # fmt: skip
    shape = (3, images, classes + 1)
    parts = logits.new_empty((*shape, programs), dtype=compute_dtype(logits.dtype))
    sums = logits.new_empty(shape, dtype=torch.float64)
    with device_guard(logits):
        launch(
            logits_ptr=logits,
            target_ptr=target,
            map_ptrs=_maps(loss, logits, results) if save else (),
            parts_ptr=parts,
        )
        finish(
            parts_ptr=parts,
            sums_ptr=sums,
            weight_ptr=logits if weight is None else weight.contiguous(),
            loss_ptr=results.loss,
            scale_ptr=results.scale,
            table_ptr=results.table,
            tickets_ptr=tickets(1, logits.device),
        )
    return results


def launch_class_sums_backward(
    loss: ClassLoss,
    upstream: torch.Tensor,
    kept: ClassResults,
    logits: torch.Tensor,
    target: torch.Tensor,
) -> torch.Tensor:
    """The gradient of the logits."""
    grad_logits = torch.empty_like(logits)
    if target.numel() == 0:
        return grad_logits.zero_()
    launch = prepared(
        ("class_sums_backward", id(loss.loss.record), kind(logits), kind(target),
         loss.ignore_index, loss.counting.per_image),
        lambda: _prepare_backward(loss, logits, target, grad_logits),
    )  # fmt: skip
    with device_guard(logits):
        launch(
            upstream_ptr=upstream,
            scale_ptr=kept.scale,
            logits_ptr=logits,
            target_ptr=target,
            table_ptr=kept.table,
            map_ptrs=_maps(loss, logits, kept),
            grad_ptr=grad_logits,
        )
    return grad_logits


def _maps(loss: ClassLoss, logits: torch.Tensor, results: ClassResults) -> tuple[Any, ...]:
    """The maps that are there: to a custom operator, one that is not is an empty tensor."""
    return (results.first, results.second)[: len(loss.loss.saved(logits, False))]


# --- launches -------------------------------------------------------------------------------------


def _prepare_sums(
    loss: ClassLoss, logits: torch.Tensor, target: torch.Tensor, save: bool
) -> tuple[PreparedLaunch, int]:
    """(the launch, its programs of an image)."""
    images, classes = logits.shape[:2]
    _, arguments = over_pixels([loss.loss], "forward", logits, target)
    tile, tiles = arguments["TILE"], arguments.pop("tiles")
    rounds = 1
    if triton.cdiv(classes, tile.lanes) <= tile.unroll:
        rounds = min(max(images * tiles // _PROGRAMS, 1), _MOST_ROUNDS)
    programs = triton.cdiv(tiles, rounds)
    constants = {
        **arguments,
        **_around(loss, logits, target, save),
        "logits_strides": in_grains(logits, tile),
        "target_strides": in_grains(target, tile),
        "rounds": rounds,
        "programs": programs,
        "images": images,
        "BINS": max(triton.next_power_of_2(max(classes, 2)), 64),
    }
    grid = (images * programs,)
    return PreparedLaunch(_class_sums_forward_kernel, grid, constants, tile.grain > 1), programs


def _prepare_head(loss: ClassLoss, images: int, classes: int, programs: int) -> PreparedLaunch:
    constants = {
        "numbers": loss.numbers,
        "programs": programs,
        "images": images,
        "HEAD": loss.head,
        "OPTIONS": loss.options,
        "COUNTING": loss.counting,
        "CLASSES": classes,
        "num_warps": 4,
        "enable_fp_fusion": True,
    }
    return PreparedLaunch(_class_head_kernel, (images * (classes + 1),), constants, False)


def _prepare_backward(
    loss: ClassLoss, logits: torch.Tensor, target: torch.Tensor, grad_logits: torch.Tensor
) -> PreparedLaunch:
    images, classes = logits.shape[:2]
    programs, arguments = over_pixels([loss.loss], "backward", logits, target, grad_logits)
    tile = arguments["TILE"]
    groups, stride = (images, classes) if loss.counting.per_image else (1, 0)
    constants = {
        **arguments,
        **_around(loss, logits, target, True),
        "logits_strides": in_grains(logits, tile),
        "target_strides": in_grains(target, tile),
        "grad_strides": in_grains(grad_logits, tile),
        "table_strides": (groups * classes, stride),
    }
    return PreparedLaunch(_class_sums_backward_kernel, (programs,), constants, tile.grain > 1)


def _around(
    loss: ClassLoss, logits: torch.Tensor, target: torch.Tensor, save: bool
) -> dict[str, Any]:
    """What both kernels are compiled for."""
    walk = Walk(loss.ignore_index, "mean")
    return {
        "TERMS": terms_of((Term(loss.loss, ()),), logits, walk, save),
        "PROBABILITIES": loss.probabilities,
        **labels_of([loss.loss], logits, target, loss.ignore_index),
    }

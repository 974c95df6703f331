"""The launchers of losses of class sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton

from .._core.backend import architecture, device_guard, registers
from .._core.prepared_launch import PreparedLaunch, kind, prepared
from .._core.process_groups import add_over_ranks
from .cell_grid import axes_of_walk
from .class_cell_launch import (
    Left,
    Walked,
    bins_of,
    launch_gradients,
    prepare_gradients,
    prepare_sums,
)
from .class_heads import (
    Counting,
    _class_head_kernel,
    _class_join_kernel,
    _class_totals_kernel,
)
from .class_sums import (
    Probabilities,
    _class_sums_backward_kernel,
    _class_sums_forward_kernel,
)
from .pixel_grid import PAIRS, in_grains, over_pixels, rounds_of
from .pixel_terms import Loss, Term, Walk, labels_of, terms_of
from .planes import compute_dtype
from .sums import tickets


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
        upsample: "bilinear" if the logits are interpolated to the size of the labels.
        align_corners: of the interpolation.
        group: the process group whose ranks' sums are added up, by its name, or None.
    """

    loss: Loss
    probabilities: Probabilities
    head: Callable[..., Any]
    options: Any
    counting: Counting
    numbers: tuple[float, ...]
    ignore_index: int | None
    upsample: str | None
    align_corners: bool
    group: str | None = None


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
    interpolated = logits.shape[2:] != target.shape[1:]
    images, classes = logits.shape[:2]
    dtype = compute_dtype(logits.dtype)
    groups = images if per_image else 1
    dtypes = loss.saved(logits, interpolated) if save else ()
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
    images, classes = logits.shape[:2]
    shape = (3, images, classes + 1)
    if target.numel() == 0:
        if loss.group is not None:
            sums = logits.new_zeros(shape, dtype=torch.float64)
            return from_sums(loss, sums, logits, weight, results)
        return results._replace(loss=results.loss.zero_(), scale=results.scale.zero_())
    walk = _walk_of(loss, logits, target)
    terms = (Term(loss.loss, ()),)
    launch, programs = prepared(
        ("class_sums", id(loss.loss.record), kind(logits), kind(target), walk, save),
        lambda: (
            _prepare_sums(loss, logits, target, walk, save)
            if walk.upsample is None
            else prepare_sums(terms, loss.probabilities, logits, target, walk, save)
        ),
    )
    parts = logits.new_empty((*shape, programs), dtype=compute_dtype(logits.dtype))
    sums = logits.new_empty(shape, dtype=torch.float64)
    with device_guard(logits):
        launch(
            logits_ptr=logits,
            target_ptr=target,
            map_ptrs=_maps(loss, logits, walk, results) if save else (),
            parts_ptr=parts,
            **_of_cells(logits, target, walk),
        )
        if loss.group is not None:
            join = prepared(
                ("class_join", shape, programs, parts.dtype, parts.device),
                lambda: prepare_join(images, classes, programs),
            )
            join(parts_ptr=parts, sums_ptr=sums)
            return from_sums(loss, sums, logits, weight, results)
        finish = prepared(
            ("class_head", *_kind_of_head(loss, logits, weight), programs),
            lambda: _prepare_head(loss, images, classes, programs),
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


def from_sums(
    loss: ClassLoss,
    sums: torch.Tensor,
    logits: torch.Tensor,
    weight: torch.Tensor | None,
    results: ClassResults,
) -> ClassResults:
    """The loss from this rank's sums [3, N, C + 1]: of all ranks' pixels, if there is a group.

    Of pooled images the sums are added over ranks, of others both parts of the mean.
    """
    ranks = 1
    if not loss.counting.per_image:
        sums = sums.sum(1, keepdim=True)
        if loss.group is not None:
            ranks = add_over_ranks(sums, loss.group)
    images, classes = sums.size(1), logits.size(1)
    totals = sums.new_zeros(3)
    if images > 0:
        launch = prepared(
            ("class_totals", *_kind_of_head(loss, logits, weight), images, results.table.dtype),
            lambda: _prepare_totals(loss, images, classes),
        )
        with device_guard(logits):
            launch(
                sums_ptr=sums,
                weight_ptr=logits if weight is None else weight.contiguous(),
                totals_ptr=totals,
                table_ptr=results.table,
            )
    if loss.counting.per_image and loss.group is not None:
        ranks = add_over_ranks(totals, loss.group)
    total, divisor, taken = totals.unbind()
    divisor = torch.where(taken > 0, divisor, 1.0)
    divisor = torch.where(divisor == 0, torch.nan, divisor)
    results.loss.copy_(total / divisor)
    results.scale.copy_(ranks / divisor)
    return results


def _kind_of_head(
    loss: ClassLoss, logits: torch.Tensor, weight: torch.Tensor | None
) -> tuple[Any, ...]:
    """All that a launch of a head depends on, but for the number of programs."""
    return (
        loss.head, loss.options, loss.counting, loss.numbers, logits.shape[:2], logits.dtype,
        logits.device, weight is None or weight.dtype,
    )  # fmt: skip


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
    walk = _walk_of(loss, logits, target)
    strides = table_strides(loss.counting.per_image, logits)
    key = ("class_sums_backward", id(loss.loss.record), kind(logits), kind(target), walk, strides)
    if walk.upsample is not None:
        tensors = Walked(logits, target, grad_logits)
        launches = prepared(
            key,
            lambda: prepare_gradients(
                (Term(loss.loss, ()),), loss.probabilities, tensors, walk, strides
            ),
        )
        left = Left(kept.scale, kept.table, (kept.first, kept.second))
        with device_guard(logits):
            launch_gradients(launches, upstream, left, tensors, walk)
        return grad_logits
    launch = prepared(key, lambda: _prepare_backward(loss, logits, target, grad_logits, walk))
    with device_guard(logits):
        launch(
            upstream_ptr=upstream,
            scale_ptr=kept.scale,
            logits_ptr=logits,
            target_ptr=target,
            table_ptr=kept.table,
            map_ptrs=_maps(loss, logits, walk, kept),
            grad_ptr=grad_logits,
        )
    return grad_logits


def _walk_of(loss: ClassLoss, logits: torch.Tensor, target: torch.Tensor) -> Walk:
    """The walk that the options ask for; to interpolate to the same size is to do nothing."""
    if logits.shape[2:] == target.shape[1:]:
        return Walk(loss.ignore_index, "mean")
    return Walk(loss.ignore_index, "mean", loss.upsample, loss.align_corners)


def _maps(
    loss: ClassLoss, logits: torch.Tensor, walk: Walk, results: ClassResults
) -> tuple[Any, ...]:
    """The maps that are there: to a custom operator, one that is not is an empty tensor."""
    count = len(loss.loss.saved(logits, walk.upsample is not None))
    return (results.first, results.second)[:count]


def _of_cells(logits: torch.Tensor, target: torch.Tensor, walk: Walk) -> dict[str, Any]:
    """What the walk over cells is given besides; its tables are those of pixelwise losses."""
    if walk.upsample is None:
        return {}
    axes = axes_of_walk(logits, target, walk)
    return {"own_ptrs": (logits,), "other_ptrs": (logits,), "values_ptr": logits, **axes}


# --- launches -------------------------------------------------------------------------------------


def _prepare_sums(
    loss: ClassLoss, logits: torch.Tensor, target: torch.Tensor, walk: Walk, save: bool
) -> tuple[PreparedLaunch, int]:
    """(the launch, its programs of an image)."""
    images, classes = logits.shape[:2]
    _, arguments = over_pixels([loss.loss], "forward", logits, target)
    tile, tiles = arguments["TILE"], arguments.pop("tiles")
    rounds = 1
    if triton.cdiv(classes, tile.lanes) <= tile.unroll:
        rounds = rounds_of(images * tiles)
    programs = triton.cdiv(tiles, rounds)
    constants = {
        **arguments,
        **_around(loss, logits, walk, save),
        **labels_of([loss.loss], logits, target, loss.ignore_index),
        "logits_strides": in_grains(logits, tile),
        "target_strides": in_grains(target, tile),
        "rounds": rounds,
        "programs": programs,
        "images": images,
        "BINS": bins_of(classes),
    }
    if architecture() >= PAIRS:
        # ptxas else decides for 80 registers with 150 classes, and spills up to 16 bytes
        constants |= registers()
    grid = (images * programs,)
    return PreparedLaunch(_class_sums_forward_kernel, grid, constants, tile.grain > 1), programs


def _prepare_head(loss: ClassLoss, images: int, classes: int, programs: int) -> PreparedLaunch:
    constants = {"programs": programs, **_of_head(loss, images, classes)}
    return PreparedLaunch(_class_head_kernel, (images * (classes + 1),), constants, False)


def prepare_join(images: int, classes: int, programs: int) -> PreparedLaunch:
    constants = {"programs": programs, "images": images, "CLASSES": classes}
    return PreparedLaunch(_class_join_kernel, (images * (classes + 1),), constants, False)


def _prepare_totals(loss: ClassLoss, images: int, classes: int) -> PreparedLaunch:
    return PreparedLaunch(_class_totals_kernel, (1,), _of_head(loss, images, classes), False)


def _of_head(loss: ClassLoss, images: int, classes: int) -> dict[str, Any]:
    """What a kernel with the head is given."""
    return {
        "numbers": loss.numbers,
        "images": images,
        "HEAD": loss.head,
        "OPTIONS": loss.options,
        "COUNTING": loss.counting,
        "CLASSES": classes,
        "num_warps": 4,
        "enable_fp_fusion": True,
    }


def _prepare_backward(
    loss: ClassLoss,
    logits: torch.Tensor,
    target: torch.Tensor,
    grad_logits: torch.Tensor,
    walk: Walk,
) -> PreparedLaunch:
    programs, arguments = over_pixels([loss.loss], "backward", logits, target, grad_logits)
    tile = arguments["TILE"]
    constants = {
        **arguments,
        **_around(loss, logits, walk, True),
        **labels_of([loss.loss], logits, target, loss.ignore_index),
        "logits_strides": in_grains(logits, tile),
        "target_strides": in_grains(target, tile),
        "grad_strides": in_grains(grad_logits, tile),
        "table_strides": table_strides(loss.counting.per_image, logits),
    }
    return PreparedLaunch(_class_sums_backward_kernel, (programs,), constants, tile.grain > 1)


def _around(loss: ClassLoss, logits: torch.Tensor, walk: Walk, save: bool) -> dict[str, Any]:
    """What kernels of both passes are compiled for."""
    return {
        "TERMS": terms_of((Term(loss.loss, ()),), logits, walk, save),
        "PROBABILITIES": loss.probabilities,
    }


def table_strides(per_image: bool, logits: torch.Tensor) -> tuple[int, int]:
    """From the first table to the second, and from image to image."""
    images, classes = logits.shape[:2]
    return (images * classes, classes) if per_image else (classes, 0)

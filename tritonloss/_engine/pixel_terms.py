"""What launchers of pixelwise losses are given: losses, as terms of a sum, and the way to walk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from .._core.prepared_launch import is_aligned
from .pixel_walk import Terms
from .pixels import Record
from .planes import compute_dtype, ignored_class

REDUCTIONS = ("mean", "sum", "none")
UPSAMPLINGS = ("bilinear",)


class Loss(NamedTuple):
    """A pixelwise loss as its launchers know it.

    Attributes:
        name: of its operator; configurations are kept under it.
        record: its device functions.
        saved: (logits, whether they are interpolated) -> the dtypes of the maps for the backward
            pass.
        unroll: classes of a lane in one block of the forward pass, where there are so many.
        held: up to so many classes of a lane stay in registers, to be gone through twice.
        binary: whether one class is allowed, with labels 0 and 1.
    """

    name: str
    record: Record
    saved: Callable[[torch.Tensor, bool], tuple[torch.dtype, ...]]
    unroll: int = 8
    held: int = 0
    binary: bool = False


class Term(NamedTuple):
    """A loss with what it was given, as a part of a sum.

    Attributes:
        loss: the loss.
        options: a NamedTuple of what its kernels are compiled for.
        numbers: what its device functions get at run time.
        own_table: [C], a number for a pixel's own class, or None.
        other_table: [C], a number for the other classes, or None.
        share: what the loss is multiplied by.
    """

    loss: Loss
    options: Any
    numbers: tuple[float, ...] = ()
    own_table: torch.Tensor | None = None
    other_table: torch.Tensor | None = None
    share: float = 1.0


class Results(NamedTuple):
    """What the operator of a single loss returns."""

    loss: torch.Tensor  # [], or [N, H, W]
    scale: torch.Tensor  # [1], or [0] for a map
    first: torch.Tensor | None  # the maps for the backward pass, [N, H, W]
    second: torch.Tensor | None


class Kept(NamedTuple):
    """What a forward launch leaves to the backward one."""

    scale: torch.Tensor  # [terms], what the gradient of a value is multiplied by; [0] for a map
    maps: tuple[torch.Tensor, ...]  # [N, H, W] each


class Walk(NamedTuple):
    """How pixels of logits and labels are gone through, whatever the losses.

    Attributes:
        ignore_index: label of pixels that are ignored, or None.
        reduction: "mean", "sum" or "none".
        upsample: "bilinear" if the logits are interpolated to the size of the labels.
        align_corners: of the interpolation.
    """

    ignore_index: int | None
    reduction: str
    upsample: str | None = None
    align_corners: bool = False


def walk_of(options: Any) -> Walk:
    """The walk that a loss's options ask for."""
    return Walk(options.ignore_index, options.reduction, options.upsample, options.align_corners)


class Made(NamedTuple):
    """What a forward launch fills: shapes and dtypes."""

    loss: tuple[int, ...]
    scale: int
    pixels: tuple[int, ...]
    dtype: torch.dtype  # of loss and scale
    maps: tuple[torch.dtype, ...]


def made(
    losses: Sequence[Loss], logits: torch.Tensor, target: torch.Tensor, walk: Walk, save: bool
) -> Made:
    """The tensors that a forward launch fills."""
    pixels = tuple(target.shape)
    interpolated = walk.upsample is not None
    dtypes = tuple(d for loss in losses for d in loss.saved(logits, interpolated)) if save else ()
    # A map needs no scale, and what nobody fills is not there.
    shape, scales = (pixels, 0) if walk.reduction == "none" else ((), len(losses))
    return Made(shape, scales, pixels, compute_dtype(logits.dtype), dtypes)


def allocated(made: Made, logits: torch.Tensor) -> tuple[torch.Tensor, Kept]:
    """The tensors, on the device of ``logits``."""
    loss = logits.new_empty(made.loss, dtype=made.dtype)
    scale = logits.new_empty(made.scale, dtype=made.dtype)
    maps = tuple([logits.new_empty(made.pixels, dtype=dtype) for dtype in made.maps])
    return loss, Kept(scale, maps)


# --- what kernels are given -----------------------------------------------------------------------


def key_of(terms: tuple[Term, ...]) -> tuple[Any, ...]:
    """What a launch depends on of its terms.

    The records stay alive in what is prepared, so that their addresses are theirs.
    """
    return tuple(
        (
            term.loss.name, id(term.loss.record), term.options, term.numbers, term.share,
            None if term.own_table is None else term.own_table.dtype,
            None if term.other_table is None else term.other_table.dtype,
        )
        for term in terms
    )  # fmt: skip


def tables_of(
    terms: tuple[Term, ...], logits: torch.Tensor
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """The tables as the kernels read them: [C] side by side, or anything where there is none."""
    own = tuple([_table(term.own_table, logits) for term in terms])
    other = tuple([_table(term.other_table, logits) for term in terms])
    return own, other


def _table(table: torch.Tensor | None, logits: torch.Tensor) -> torch.Tensor:
    if table is None:
        return logits
    if table.is_contiguous() and is_aligned(table):
        return table
    return table.clone(memory_format=torch.contiguous_format)


def numbers_of(terms: tuple[Term, ...]) -> dict[str, Any]:
    return {
        "numbers": tuple(term.numbers for term in terms),
        "shares": tuple(float(term.share) for term in terms),
    }


def terms_of(terms: tuple[Term, ...], logits: torch.Tensor, walk: Walk, save: bool) -> Terms:
    records = [term.loss.record for term in terms]
    interpolated = walk.upsample is not None
    saved = [term.loss.saved(logits, interpolated) for term in terms]
    counts = tuple(len(dtypes) if save else 0 for dtypes in saved)
    # Where there is no second pass its functions are not called.
    fields = {
        name: tuple(getattr(record, name) or record.add for record in records)
        for name in Record._fields
    }
    return Terms(
        **fields,
        twice=tuple(record.join is not None for record in records),
        passes=2 if any(record.join is not None for record in records) else 1,
        options=tuple(term.options for term in terms),
        maps=counts,
        first_map=tuple(sum(counts[:k]) for k in range(len(terms))),
    )


def labels_of(
    losses: Sequence[Loss], logits: torch.Tensor, target: torch.Tensor, ignore_index: int | None
) -> dict[str, Any]:
    """The kernels' arguments that tell which labels count."""
    binary = logits.size(1) == 1 and all(loss.binary for loss in losses)
    classes = 2 if binary else logits.size(1)
    return {"IGNORED": ignored_class(ignore_index, classes, target.dtype), "BINARY": binary}

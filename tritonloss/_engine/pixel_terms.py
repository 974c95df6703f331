"""What launchers of pixelwise losses are given: losses, as terms of a sum, and the way to walk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from .pixel_walk import Terms
from .pixels import Record
from .planes import compute_dtype, ignored_class

REDUCTIONS = ("mean", "sum", "none")


class Loss(NamedTuple):
    """A pixelwise loss as its launchers know it.

    Attributes:
        name: the name of its operator, under which configurations are kept.
        record: its device functions.
        saved: (logits, whether they are interpolated) -> the dtypes of the maps for the backward
            pass.
        unroll: classes of a lane in one block of the forward pass, if there are that many.
        held: the most classes of a lane that stay in registers, for a loss that goes through them
            twice; 0 for the others.
        held_back: the same of the backward pass.
        held_wide: up to how many of these a lane has four pixels and not two.
        binary: whether a single class is allowed, with labels 0 and 1.
        scaled: whether its functions know what to do where ``Tile.scaled`` says so.
        of_logits: whether what is saved depends on the logits alone. Losses of one walk with the
            same ``saved`` then share their maps.
    """

    name: str
    record: Record
    saved: Callable[[torch.Tensor, bool], tuple[torch.dtype, ...]]
    unroll: int = 8
    held: int = 0
    held_back: int = 0
    held_wide: int = 0
    binary: bool = False
    scaled: bool = False
    of_logits: bool = False


class Term(NamedTuple):
    """A loss with what it was given, as a part of a sum.

    Attributes:
        loss: the loss.
        options: a NamedTuple of what its kernels are compiled for.
        numbers: what its device functions get at run time.
        own_table: [C], a number for a pixel's own class, or None.
        other_table: [C], a number for the other classes, or None.
    """

    loss: Loss
    options: Any
    numbers: tuple[float, ...] = ()
    own_table: torch.Tensor | None = None
    other_table: torch.Tensor | None = None


class Results(NamedTuple):
    """What the operator of a single loss returns."""

    loss: torch.Tensor  # [], or [N, H, W]
    scale: torch.Tensor  # [1], or [0] for a map
    first: torch.Tensor | None  # the maps for the backward pass, [N, H, W]
    second: torch.Tensor | None


class Weights(NamedTuple):
    """What the losses of a sum are multiplied by."""

    numbers: torch.Tensor  # float64, on the device
    places: tuple[int, ...]  # of each loss, where its weight is


class Kept(NamedTuple):
    """What a forward launch leaves to the backward one."""

    scale: torch.Tensor  # [terms], what the gradient of a value is multiplied by; [0] for a map
    maps: tuple[torch.Tensor, ...]  # [N, H, W] each; those beyond what the losses save are ignored


class Walk(NamedTuple):
    """The options that all losses of a walk share.

    Attributes:
        ignore_index: the label of pixels that are ignored, or None.
        reduction: "mean", "sum" or "none".
        upsample: "bilinear" if the logits are interpolated to the size of the labels.
        align_corners: of the interpolation.
        group: the name of a process group, whose ranks' pixels are summed up together, or None.
    """

    ignore_index: int | None
    reduction: str
    upsample: str | None = None
    align_corners: bool = False
    group: str | None = None


class Way(NamedTuple):
    """A kernel and how it goes through pixels: what is known before the tensors are."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    aligned: bool  # as PreparedLaunch takes it


def walk_of(options: Any, logits: torch.Tensor, target: torch.Tensor) -> Walk:
    """The walk that a loss's options ask for; to interpolate to the same size is to do nothing."""
    if options.upsample is None or logits.shape[2:] == target.shape[1:]:
        return Walk(options.ignore_index, options.reduction, group=options.group)
    return Walk(
        options.ignore_index,
        options.reduction,
        options.upsample,
        options.align_corners,
        options.group,
    )


class Made(NamedTuple):
    """A tensor that a forward launch fills."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]  # said in full: PyTorch is quicker with them than without
    dtype: torch.dtype


def made(
    losses: Sequence[Loss], logits: torch.Tensor, target: torch.Tensor, walk: Walk, save: bool
) -> tuple[Made, ...]:
    """The tensors that a forward launch fills: the loss, the scales and the maps."""
    images, height, width = target.shape
    pixels, strides = (images, height, width), (height * width, width, 1)
    dtype = compute_dtype(logits.dtype)
    if walk.reduction == "none":  # needs no scale, and what nobody fills is not there
        loss, scales = Made(pixels, strides, dtype), 0
    else:
        loss, scales = Made((), (), dtype), len(losses)
    saved = maps_of(losses, logits, walk.upsample is not None) if save else []
    maps = [Made(pixels, strides, dtype) for its in saved for dtype in its.stored]
    return loss, Made((scales,), (1,), dtype), *maps


class Maps(NamedTuple):
    """The maps that a loss of a walk leaves to the backward pass."""

    first: int  # the place of its first one among those of all losses
    size: int
    stored: tuple[torch.dtype, ...]  # those that it stores; none that it has from an earlier loss


def maps_of(losses: Sequence[Loss], logits: torch.Tensor, interpolated: bool) -> list[Maps]:
    """The maps of every loss: what depends on the logits alone is stored once."""
    found: list[Maps] = []
    places: dict[Any, int] = {}
    total = 0
    for loss in losses:
        dtypes = loss.saved(logits, interpolated)
        known = places.get(loss.saved) if loss.of_logits else None
        stored = dtypes if known is None else ()
        first = total if known is None else known
        if loss.of_logits:
            places[loss.saved] = first
        found.append(Maps(first, len(dtypes), stored))
        total += len(stored)
    return found


def allocated(made: tuple[Made, ...], logits: torch.Tensor) -> tuple[torch.Tensor, Kept]:
    """(loss, what is kept): these tensors, on the device of ``logits``."""
    loss, scale, *maps = [logits.new_empty_strided(s, t, dtype=dtype) for s, t, dtype in made]
    return loss, Kept(scale, tuple(maps))


# --- what kernels are given -----------------------------------------------------------------------


def key_of(terms: tuple[Term, ...]) -> tuple[Any, ...]:
    """All of its terms that a launch depends on.

    A record is known by its address. The prepared launch keeps it alive, so that no other record
    ever has that address.
    """
    return tuple([
        (
            loss.name, id(loss.record), options, numbers,
            None if own is None else own.dtype, None if other is None else other.dtype,
        )
        for loss, options, numbers, own, other in terms
    ])  # fmt: skip


def tables_of(
    terms: tuple[Term, ...], logits: torch.Tensor
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """(own, other) tables as kernels read them, contiguous [C]; the logits for a missing one."""
    own = tuple([_table(term.own_table, logits) for term in terms])
    other = tuple([_table(term.other_table, logits) for term in terms])
    return own, other


def _table(table: torch.Tensor | None, logits: torch.Tensor) -> torch.Tensor:
    """A table as the kernels read it: contiguous and aligned; the logits for a missing one."""
    if table is None:
        return logits
    if table.is_contiguous() and table.data_ptr() % 16 == 0:
        return table
    return table.clone(memory_format=torch.contiguous_format)


def numbers_of(terms: tuple[Term, ...], weights: Weights | None) -> dict[str, Any]:
    """The kernels' arguments that are numbers of the losses."""
    return {
        "numbers": tuple(term.numbers for term in terms),
        "weight_places": (0,) if weights is None else weights.places,
        "WEIGHTED": weights is not None,
    }


def terms_of(
    terms: tuple[Term, ...], logits: torch.Tensor, walk: Walk, save: bool, adds: bool = False
) -> Terms:
    """The losses as the walk knows them; their maps are stored if ``save``.

    With ``adds`` their gradient is added to what is there.
    """
    records = [term.loss.record for term in terms]
    maps = maps_of([term.loss for term in terms], logits, walk.upsample is not None)
    # A loss without a second pass gets ``add`` for the functions of that pass; none is called.
    fields = {
        name: tuple(getattr(record, name) or record.add for record in records)
        for name in Record._fields
        if name not in ("silent", "weighs")
    }
    return Terms(
        **fields,
        twice=tuple(record.join is not None for record in records),
        passes=2 if any(record.join is not None for record in records) else 1,
        silent=tuple(term.loss.record.silent(term.options) for term in terms),
        weighs=tuple(term.loss.record.weighs(term.options) for term in terms),
        options=tuple(term.options for term in terms),
        maps=tuple(its.size if save else 0 for its in maps),
        stored=tuple(len(its.stored) if save else 0 for its in maps),
        first_map=tuple(its.first for its in maps),
        adds=adds,
    )


def labels_of(
    losses: Sequence[Loss], logits: torch.Tensor, target: torch.Tensor, ignore_index: int | None
) -> dict[str, Any]:
    """The kernels' arguments that say which labels count: IGNORED and BINARY."""
    binary = logits.size(1) == 1 and all(loss.binary for loss in losses)
    classes = 2 if binary else logits.size(1)
    return {"IGNORED": ignored_class(ignore_index, classes, target.dtype), "BINARY": binary}

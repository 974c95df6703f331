"""Launches of class sums over interpolated logits, alone or with pixelwise losses.

The terms of such a walk begin with that of the class sums. Configurations are heuristics.
"""

from __future__ import annotations

from collections import namedtuple
from typing import Any, NamedTuple

import torch
import triton

from .._core.backend import architecture, registers
from .._core.configurations import Configuration
from .._core.prepared_launch import PreparedLaunch
from .cell_grid import (
    _IS_OLD,
    are_even,
    axes_of,
    axes_of_walk,
    blocks_of,
    cell_heuristic,
    over_cells,
    over_strips,
)
from .cell_kernels import _upsampled_backward_kernel
from .class_cells import _class_cells_forward_kernel, _class_cells_project_kernel
from .class_sums import Probabilities
from .held_cells import _class_cells_held_kernel
from .pixel_grid import PAIRS, rounds_of
from .pixel_terms import Loss, Term, Walk, numbers_of, terms_of
from .pixel_walk import Terms

# Pixels of a lane at once, and classes in one block: with more, what the pixels have takes too many
# registers.
_PIXELS = 16
_MOST_UNROLL = 4
# Where several losses have slopes of their own, the pixels of a lane at once going forward, and the
# classes of a block going back: of 16 and of ten, ptxas of Triton 3.6 spills up to 136 bytes.
_PIXELS_OF_SEVERAL = 8
_UNROLL_OF_SEVERAL = 7
_WARPS = 1  # going forward: to add up over them would take as long as over all pixels of a lane
# Classes that a lane holds going forward, and the columns of its pixels; of more classes with cross
# entropy, or of as many columns on GPUs that add pairs of registers, ptxas spills up to 24 bytes.
_HELD = 20
_COLUMNS_HELD = 4
_COLUMNS_HELD_IN_PAIRS = 2
# Lanes that share a cell going forward, and classes of each: of 20 ptxas spills, and of 18 that of
# Triton 3.6.
_MOST_HOLDERS = 4
_HELD_OF_SHARED = 16 if _IS_OLD else 18
# Classes of a lane that shares a cell, where ten are too many: with more columns of pixels ptxas
# spills 56 bytes, and 8 if cells differ in their columns; in pairs of registers 8 with a loss that
# is taken in, and without one that of Triton 3.6 spills 32.
_COLUMNS_OF_SHARED = 4
_UNROLL_OF_SHARED = 7
_MOST_PARTS = 4  # lanes that share a cell going back: of so many, every eighth repeats others' work

# ``Terms`` whose last losses have no slope: the first one's factors take in theirs. And those where
# the first loss compares all of a pixel's classes going back, too. Types of their own, since every
# kernel is compiled for its terms, and most do neither.
_named: Any = namedtuple
TakingTerms = _named("TakingTerms", (*Terms._fields, "take_in"))
ComparingTerms = _named("ComparingTerms", (*TakingTerms._fields, "product", "less"))


class Gradients(NamedTuple):
    """The launches of a backward pass."""

    project: PreparedLaunch | None  # writes the projections, if there are any
    back: PreparedLaunch
    maps: int  # that the losses have saved


class Walked(NamedTuple):
    """What a backward pass goes over."""

    logits: torch.Tensor
    target: torch.Tensor
    gradient: torch.Tensor


class Left(NamedTuple):
    """What the forward pass has left to it."""

    scale: torch.Tensor  # of the class sums and of every pixelwise loss
    table: torch.Tensor  # [2, images or 1, C]: what own pixels get on top, what all get
    maps: tuple[Any, ...]  # [N, H, W] each
    own: tuple[torch.Tensor, ...] = ()  # of every pixelwise loss [C]
    other: tuple[torch.Tensor, ...] = ()


def prepare_sums(
    terms: tuple[Term, ...],
    probabilities: Probabilities,
    logits: torch.Tensor,
    target: torch.Tensor,
    walk: Walk,
    save: bool,
    taken: int = 0,
) -> tuple[PreparedLaunch, int]:
    """(the launch of the forward pass, its programs of an image)."""
    images, classes = logits.shape[:2]
    losses = [term.loss for term in terms]
    alone = len(terms) - taken == 1
    pixels = _PIXELS if alone else _PIXELS_OF_SEVERAL
    holders = _holders(losses, logits, target, walk) if alone else 0
    all_programs, arguments = _over_cells(
        losses, logits, target, walk, pixels, holders, num_warps=_WARPS
    )
    kernel = _class_cells_forward_kernel
    if holders > 0:
        kernel = _class_cells_held_kernel
        tiles, rounds = all_programs // images, rounds_of(all_programs)
        all_programs = images * triton.cdiv(tiles, rounds)
        arguments |= {"tiles": tiles, "rounds": rounds}
    constants = {
        **arguments,
        "numbers": numbers_of(terms, None)["numbers"],
        "logits_strides": logits.stride(),
        "target_strides": target.stride(),
        "programs": all_programs // images,
        "images": images,
        "TERMS": terms_of(terms, logits, walk, save),
        "PROBABILITIES": probabilities,
        "BINS": bins_of(classes),
    }
    launch = PreparedLaunch(kernel, (all_programs,), constants, False)
    return launch, all_programs // images


def prepare_gradients(
    terms: tuple[Term, ...],
    probabilities: Probabilities,
    tensors: Walked,
    walk: Walk,
    table_strides: tuple[int, int],
    *,
    taken: int = 0,
    adds: bool = False,
) -> Gradients:
    """The launches of the backward pass; so many of the last terms are taken in by the first."""
    logits, target, grad_logits = tensors
    losses = [term.loss for term in terms]
    axes = axes_of(logits, target, walk.align_corners)
    known = terms_of(terms, logits, walk, True, adds)
    saved = sum(known.stored)
    strides = {"logits_strides": logits.stride(), "target_strides": target.stride()}
    heuristic: dict[str, Any] = dict(cell_heuristic(losses, "backward", axes[1].most))
    parts, project = 0, None
    if len(terms) - taken > 1:
        heuristic["UNROLL"] = min(heuristic["UNROLL"], _UNROLL_OF_SEVERAL)
    elif probabilities.compared:
        parts, heuristic = _shared(heuristic, logits, target, walk, axes[1].most, taken > 0)
    if probabilities.compared and parts == 0:
        programs, arguments = _over_cells(losses[:1], logits, target, walk, _PIXELS)
        constants = {
            **arguments,
            **strides,
            "table_strides": table_strides,
            "programs": programs // logits.size(0),
            "TERMS": terms_of(terms[:1], logits, walk, True),
            "PROBABILITIES": probabilities,
        }
        project = PreparedLaunch(_class_cells_project_kernel, (programs,), constants, False)
        known = _with_projections(known)
    if parts > 0:
        slopes = known._replace(slope=(probabilities.product_slope,))
        known = ComparingTerms(
            *slopes, probabilities.take_in, probabilities.product, probabilities.less
        )
    elif taken:
        known = TakingTerms(*with_slopes(known, probabilities, taken), probabilities.take_in)
    programs, arguments = over_strips(losses, logits, target, walk, axes, heuristic, parts)
    constants = {
        **arguments,
        **strides,
        **numbers_of(terms, None),
        "TERMS": known,
        "upstream_strides": (0, 0, 0),
        "grad_strides": grad_logits.stride(),
        "table_strides": (table_strides[1], *(0,) * (len(terms) - 1)),
    }
    back = PreparedLaunch(_upsampled_backward_kernel, (programs,), constants, False)
    return Gradients(project, back, saved)


def _shared(
    heuristic: dict[str, Any],
    logits: torch.Tensor,
    target: torch.Tensor,
    walk: Walk,
    widest: int,
    takes: bool,
) -> tuple[int, dict[str, Any]]:
    """(lanes that share a cell, the configuration); 0 lanes if they would be too many."""
    columns = heuristic["PIXEL_COLUMNS"]
    many = columns > _COLUMNS_OF_SHARED or not are_even(columns, widest, logits, target, walk)
    in_pairs = architecture() >= PAIRS
    shared = dict(heuristic)
    if many or (in_pairs if takes else _IS_OLD):
        shared["UNROLL"] = min(heuristic["UNROLL"], _UNROLL_OF_SHARED)
    parts = blocks_of(logits.size(1), shared)
    return (parts, shared) if parts <= _MOST_PARTS else (0, heuristic)


def _with_projections(known: Terms) -> Terms:
    """The terms where the projections are saved after the statistics, which are the first map."""
    first_map = tuple(place + (place > 0) for place in known.first_map)
    return known._replace(maps=(2, *known.maps[1:]), first_map=first_map)


def with_slopes(known: Terms, probabilities: Probabilities, taken: int) -> Terms:
    """The terms with the slopes of all but the last ones, so many, which are taken in."""
    if not taken:
        return known
    own = known.slope[1 : len(known.slope) - taken]
    return known._replace(slope=(probabilities.slope, *own))


def launch_gradients(
    launches: Gradients, upstream: torch.Tensor, left: Left, tensors: Walked, walk: Walk
) -> None:
    """Write the gradient of interpolated logits."""
    axes = axes_of_walk(tensors.logits, tensors.target, walk)
    maps = left.maps[: launches.maps]
    if launches.project is not None:
        projection = torch.empty_like(maps[0])
        launches.project(
            logits_ptr=tensors.logits,
            target_ptr=tensors.target,
            map_ptr=maps[0],
            table_ptr=left.table,
            projection_ptr=projection,
            **axes,
        )
        maps = (maps[0], projection, *maps[1:])
    launches.back(
        upstream_ptr=upstream,
        scale_ptr=left.scale,
        logits_ptr=tensors.logits,
        target_ptr=tensors.target,
        own_ptrs=(left.table[0], *left.own),
        other_ptrs=(left.table[1], *left.other),
        map_ptrs=maps,
        grad_ptr=tensors.gradient,
        weights_ptr=left.scale,
        **axes,
    )


def _over_cells(
    losses: list[Loss],
    logits: torch.Tensor,
    target: torch.Tensor,
    walk: Walk,
    pixels: int,
    holders: int = 0,
    **more: int,
) -> tuple[int, dict[str, Any]]:
    """(programs, arguments) of a kernel that goes forward over cells, so many pixels of each.

    Of all classes at once, pixel after pixel, if so many lanes hold them between them.
    """
    axes = axes_of(logits, target, walk.align_corners)
    heuristic = cell_heuristic(losses, "forward", axes[1].most)
    columns = min(int(heuristic["PIXEL_COLUMNS"]), pixels)
    if holders > 0:
        columns = _columns_held(losses, columns)
    rows = int(heuristic["PIXEL_ROWS"]) * int(heuristic["PIXEL_COLUMNS"]) // columns
    rows = min(rows, pixels // columns, triton.next_power_of_2(axes[0].most))
    unroll = min(int(heuristic["UNROLL"]), _MOST_UNROLL)
    configuration: Configuration = {
        **heuristic,
        "PIXEL_COLUMNS": columns,
        "PIXEL_ROWS": max(rows, holders),  # each of them counts the labels of some rows
        "UNROLL": logits.size(1) if holders > 0 else unroll,
        **more,
    }
    parts = holders if holders > 1 else 0
    programs, arguments = over_cells(losses, logits, target, walk, axes, configuration, parts)
    return programs, {**arguments, **registers()}


def _holders(losses: list[Loss], logits: torch.Tensor, target: torch.Tensor, walk: Walk) -> int:
    """Lanes that hold a pixel's classes between them, going forward; 0 if these are too many.

    Each finishes one of as many pixels, side by side: cells have to be as wide.
    """
    widest = axes_of(logits, target, walk.align_corners)[1].most
    columns = int(cell_heuristic(losses, "forward", widest)["PIXEL_COLUMNS"])
    classes = logits.size(1)
    lanes = triton.next_power_of_2(triton.cdiv(classes, _HELD_OF_SHARED)) if classes > _HELD else 1
    if logits.dtype == torch.float64 or lanes > min(_MOST_HOLDERS, _columns_held(losses, columns)):
        return 0
    return int(lanes)


def _columns_held(losses: list[Loss], columns: int) -> int:
    """Columns of pixels of a lane that holds the classes, of so many."""
    in_pairs = architecture() >= PAIRS and len(losses) > 1
    return min(columns, _COLUMNS_HELD_IN_PAIRS if in_pairs else _COLUMNS_HELD)


def bins_of(classes: int) -> int:
    """A histogram's size for all labels; not fewer than a warp has lanes."""
    return max(1 << (max(classes, 2) - 1).bit_length(), 64)

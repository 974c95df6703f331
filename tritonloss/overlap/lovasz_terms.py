"""What the Lovász losses' operators are given and return, and what their launchers fill."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
import triton

from .._core import checks
from .._core.backend import warp_size
from .._engine.pixel_terms import Loss
from .._engine.pixels import Record, no_lookups
from .._engine.planes import compute_dtype
from ..pixelwise.softmax import softmax_add, softmax_start
from .lovasz_bins import SPREAD, Bins

# Nothing but the fold of this record is called.
SOFTMAX = Loss(
    "lovasz_softmax",
    Record(softmax_start, softmax_add, softmax_add, softmax_add, softmax_add, no_lookups),
    saved=lambda logits, interpolated: (),
)
HINGE = SOFTMAX._replace(name="lovasz_hinge", binary=True)

# Whether a histogram takes Triton as long with many bins as with few, on NVIDIA's GPUs.
IS_QUICK = tuple(map(int, re.findall(r"\d+", triton.__version__)[:2])) >= (3, 9)
# Bins of a class that take so few registers, where a histogram takes some for each, that a lane has
# many pixels.
FEW_BINS = 1024
# Counters of each bin of a hinge for own errors, where each of these is an atomic sum: those at one
# address wait for each other.
_OF_OWN = 16
# Pixels from which on 32 bits do not hold their count.
_MANY = 2**31


class Options(NamedTuple):
    """The options of both losses; those of the hinge choose among no classes."""

    bins: int
    classes: str = "present"  # or "all", or numbers with commas between them
    per_image: bool = False
    ignore_index: int | None = checks.IGNORE_INDEX
    exact: bool = False
    upsample: str | None = None
    align_corners: bool = False
    group: str | None = None  # a process group's name


def is_interpolated(logits: torch.Tensor, target: torch.Tensor, options: Options) -> bool:
    """Whether logits are interpolated: to the same size, that is to do nothing."""
    return options.upsample is not None and logits.shape[2:] != target.shape[1:]


class Results(NamedTuple):
    """What the operators return."""

    loss: torch.Tensor  # []
    scale: torch.Tensor  # [groups]: the factor of the gradients of each group's classes
    table: torch.Tensor | None  # increments [groups, C, 2 * bins of a class, 2], or [N, C, H, W]
    largest: torch.Tensor | None  # [N, H, W], of the softmax; not of interpolated logits in bins
    log_sum: torch.Tensor | None  # [N, H, W], of the softmax; of those the log-sum-exp


def bins_of(loss: Loss, options: Options) -> Bins:
    """The bins of a class."""
    each = options.bins // (16 if loss.binary else 32)
    apart = 0 if not loss.binary or IS_QUICK or warp_size() > 32 else _OF_OWN
    row = options.bins * (1 + max(apart, 1)) if loss.binary else options.bins * 4 + SPREAD.value
    return Bins(
        count=options.bins if loss.binary else 2 * options.bins,
        each=each,
        digits=each.bit_length() - 1,
        hinge=loss.binary,
        row=row,
        apart=apart,
    )


def allocated(
    loss: Loss, logits: torch.Tensor, target: torch.Tensor, options: Options, save: bool
) -> Results:
    """The results, not filled; what is only for the backward pass is None unless ``save``."""
    return kept(filled_by_kernels(loss, logits, target, options, save), save)


def filled_by_kernels(
    loss: Loss, logits: torch.Tensor, target: torch.Tensor, options: Options, save: bool
) -> Results:
    """All that the kernels of the forward pass fill."""
    dtype = compute_dtype(logits.dtype)
    images, classes = logits.shape[:2]
    groups = images if options.per_image else 1
    largest = log_sum = table = None
    if not options.exact:
        entries = 2 * bins_of(loss, options).count
        table = logits.new_empty((groups, classes, entries, 2), dtype=dtype)
    elif save:
        table = logits.new_empty((images, classes, *target.shape[1:]), dtype=dtype)
    if not loss.binary:
        log_sum = logits.new_empty(target.shape, dtype=dtype)
        if options.exact or not is_interpolated(logits, target, options):
            largest = torch.empty_like(log_sum)
    scale = logits.new_empty(groups, dtype=dtype)
    return Results(logits.new_empty((), dtype=dtype), scale, table, largest, log_sum)


def kept(results: Results, save: bool) -> Results:
    return results if save else results._replace(table=None, largest=None, log_sum=None)


def is_quick() -> bool:
    """Whether histograms of many bins are quick. On AMD's GPUs lanes vote on every bin."""
    return IS_QUICK and warp_size() == 32


class Counts(NamedTuple):
    """What the kernels count: zeros before that, and integers in the same memory."""

    histogram: torch.Tensor  # [groups * C * counters of a class]; empty where nothing is binned
    of_groups: torch.Tensor  # [groups * 2]: pixels whose numbers are none; counted, or own ones
    both: torch.Tensor  # all of that memory


def zero_counts(loss: Loss, logits: torch.Tensor, target: torch.Tensor, options: Options) -> Counts:
    """The counts before anything is counted."""
    groups = logits.size(0) if options.per_image else 1
    entries = 0 if options.exact else groups * logits.size(1) * bins_of(loss, options).row
    # Over ranks there may be more, and all have to agree.
    is_few = target.numel() < _MANY and options.group is None
    dtype = torch.int32 if is_few else torch.int64
    zeros = logits.new_zeros(entries + 2 * groups, dtype=dtype)
    return Counts(zeros[:entries], zeros[entries:], zeros)


def chosen(classes: str) -> tuple[int, ...]:
    """The classes that take part, as their numbers are given; empty for "present" and "all"."""
    return () if classes in ("present", "all") else tuple(map(int, classes.split(",")))

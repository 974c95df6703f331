"""Label statistics: how often each class occurs, and the margin offsets that follow from it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Sized
from typing import NamedTuple

import torch
from torch.distributed import ProcessGroup, all_reduce, get_backend

from . import _checks

# Labels are widened to int64 this many at a time: a large map would take eight times its size.
_CHUNK = 1 << 24


class MarginOffsets(NamedTuple):
    """What :func:`margin_offsets` returns, float32 [C] each.

    Attributes:
        own: rho_k0, taken off the margin of a pixel's own class k.
        other: rho_0k, added to the margin of every class k that is not the pixel's own.
    """

    own: torch.Tensor
    other: torch.Tensor


def count_labels(
    labels: torch.Tensor | Iterable[torch.Tensor],
    num_classes: int,
    *,
    ignore_index: int | None = 255,
    process_group: ProcessGroup | None = None,
    progress: bool = False,
) -> torch.Tensor:
    """Count the pixels of each class, exactly, in one label map or in a stream of them.

    Args:
        labels: integer labels of any shape, dtype and device, or an iterable of such tensors, for
            example a DataLoader that yields label maps. Only one of them is held at a time.
        num_classes: C; labels are 0 to C - 1.
        ignore_index: label of pixels that are not counted, any integer or None. Default 255.
        process_group: given one, the counts of all of its ranks are summed; every rank must call.
        progress: True shows on stderr how many maps of an iterable have been counted.

    Returns:
        The counts, int64 [C], on the device of the (first) labels; on the CPU if there are none.

    Raises:
        TypeError: an argument has the wrong type, or labels are not integers.
        ValueError: num_classes is below 1, or labels lie outside [0, C) and are not ignore_index;
            with a process group on every rank.

    Example:
        >>> import torch, tritonloss
        >>> tritonloss.count_labels(torch.tensor([[0, 2, 2], [2, 255, 0]]), 3)
        tensor([2, 0, 3])
    """
    _checks.check_positive("num_classes", num_classes)
    _checks.check_ignore_index(ignore_index)
    _checks.check_flag("progress", progress)
    try:
        counts = _count(labels, num_classes, ignore_index, progress)
    except ValueError:
        if process_group is not None:  # the other ranks are waiting for this one
            _summed_over_ranks(torch.zeros(num_classes, dtype=torch.int64), True, process_group)
        raise
    if process_group is None:
        return counts
    return _summed_over_ranks(counts, False, process_group)


def _count(
    labels: torch.Tensor | Iterable[torch.Tensor],
    classes: int,
    ignore_index: int | None,
    progress: bool,
) -> torch.Tensor:
    if isinstance(labels, torch.Tensor):
        _checks.check_labels(labels, "labels")
        return _count_map(labels, classes, ignore_index, "labels")
    if not isinstance(labels, Iterable):
        raise TypeError(
            f"labels must be an integer tensor or an iterable of them; got {type(labels).__name__}"
        )
    counts: torch.Tensor | None = None
    total = len(labels) if isinstance(labels, Sized) else None
    for position, label_map in enumerate(labels):
        name = f"labels, map {position},"
        _checks.check_labels(label_map, name)
        found = _count_map(label_map, classes, ignore_index, name)
        counts = found if counts is None else counts.add_(found.to(counts.device))
        if progress:
            _show(position + 1, total)
    if progress:
        print(file=sys.stderr)
    return torch.zeros(classes, dtype=torch.int64) if counts is None else counts


def _count_map(
    labels: torch.Tensor, classes: int, ignore_index: int | None, name: str
) -> torch.Tensor:
    """Counts of one label map."""
    counts = torch.zeros(classes, dtype=torch.int64, device=labels.device)
    outside: dict[int, int] = {}
    for part in labels.detach().reshape(-1).split(_CHUNK):
        chunk = part.to(torch.int64)
        wrong = (chunk < 0) | (chunk >= classes)
        counted = ~wrong
        if ignore_index is not None:
            wrong &= chunk != ignore_index
            counted &= chunk != ignore_index
        if bool(wrong.any()):
            values, occurrences = torch.unique(chunk[wrong], return_counts=True)
            for value, count in zip(values.tolist(), occurrences.tolist(), strict=True):
                outside[value] = outside.get(value, 0) + count
        # Uncounted labels go to a place of their own, which is cut off.
        kept = torch.where(counted, chunk, classes)
        counts += torch.bincount(kept, minlength=classes + 1)[:classes]
    if outside:
        raise ValueError(
            _checks.labels_outside(name, classes, ignore_index, sorted(outside.items()))
        )
    return counts


def _summed_over_ranks(counts: torch.Tensor, failed: bool, group: ProcessGroup) -> torch.Tensor:
    """The counts of all ranks.

    Raises:
        ValueError: another rank has failed; without it the others would wait for ever.
    """
    device = counts.device
    if get_backend(group) == "nccl" and device.type != "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    message = torch.cat((counts, counts.new_tensor([int(failed)]))).to(device)
    all_reduce(message, group=group)
    if int(message[-1]) and not failed:
        raise ValueError(
            f"labels must be in range on every rank; {int(message[-1])} other ranks found labels "
            "outside, and name them"
        )
    return message[:-1].to(counts.device)


def _show(done: int, total: int | None) -> None:
    share = "" if not total else f" of {total} [{'#' * (30 * done // total):30}]"
    print(f"\rcounting labels: {done}{share} maps", end="", file=sys.stderr, flush=True)


def margin_offsets(
    label_counts: torch.Tensor, *, tau: float = 10.0, upsilon: float = 1.0
) -> MarginOffsets:
    """Margin offsets of each class from how often it occurs: the rarer, the larger.

    With N_k pixels of class k, N of all and P_k = N_k / N:

        other = rho_0k = tau sqrt(N - N_k) / N_k
        own = rho_k0 = rho_0k P_k sqrt(N_k) / (upsilon (N - N_k) - P_k sqrt(N - N_k))

    They shrink with 1 / sqrt(N): on a large data set tau decides whether they matter at all.

    Args:
        label_counts: integer counts [C], C >= 2, as :func:`count_labels` returns them.
        tau: scale of all offsets, in (0, 1e9]. Default 10.
        upsilon: the balance of the two kinds, in (0, 1e9]. Default 1.

    Returns:
        The offsets, float32. A class that does not occur gets the largest finite ``other`` and 0
        for ``own``, with a warning that names it.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: fewer than two classes occur, a count is negative, an option is out of range, or
            upsilon is so small that an offset would not be positive.

    Reference:
        Yu et al., "Distribution-Aware Margin Calibration for Semantic Segmentation in Images",
        Algorithm 1.

    Example:
        >>> import torch, tritonloss
        >>> offsets = tritonloss.margin_offsets(torch.tensor([9000, 900, 100]))
        >>> bool(offsets.other[2] > offsets.other[0])
        True
    """
    accepted = (
        "label_counts must hold non-negative integer counts of shape (C,) with C of 2 or more"
    )
    _checks.check_labels(label_counts, "label_counts")
    _checks.check_range("tau", tau, 0.0, 1e9, interval="(]")
    _checks.check_range("upsilon", upsilon, 0.0, 1e9, interval="(]")
    if label_counts.dim() != 1 or label_counts.numel() < 2:
        raise ValueError(f"{accepted}; got shape {tuple(label_counts.shape)}")
    n_k = label_counts.detach().double()
    if bool((n_k < 0).any()):
        raise ValueError(f"{accepted}; got {int(n_k.min())}")
    present = n_k > 0
    if int(present.sum()) < 2:
        raise ValueError(
            f"label_counts must hold at least two classes that occur; got "
            f"{present.nonzero().flatten().tolist()}"
        )
    n = n_k.sum()
    share = n_k / n
    other = tau * (n - n_k).sqrt() / n_k
    divisor = upsilon * (n - n_k) - share * (n - n_k).sqrt()
    if bool((divisor <= 0).any()):
        raise ValueError(f"upsilon must be larger for these label_counts; got {upsilon}")
    own = share * n_k.sqrt() / divisor * other

    if not bool(present.all()):
        absent = (~present).nonzero().flatten().tolist()
        other = torch.where(present, other, other[present].max())
        own = torch.where(present, own, 0.0)
        warnings.warn(
            f"label_counts holds no pixel of the classes {absent}: they get the largest offset of "
            "the others as other, and 0 as own",
            stacklevel=2,
        )
    return MarginOffsets(own.float(), other.float())

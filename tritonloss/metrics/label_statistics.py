"""Label statistics: how often each class occurs, and the margin offsets that follow from it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Sized
from typing import NamedTuple

import torch
from torch.distributed import ProcessGroup, all_reduce, get_backend
from torch.utils.data import Dataset

from .._core import checks

# So many labels at a time are widened to int64: all of a large map would take eight times its size.
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
    labels: torch.Tensor | Iterable[torch.Tensor] | Dataset[torch.Tensor],
    num_classes: int,
    *,
    ignore_index: int | None = checks.IGNORE_INDEX,
    process_group: ProcessGroup | None = None,
    progress: bool = False,
) -> torch.Tensor:
    """Count the pixels of each class, exactly, in one label map or in a stream of them.

    Args:
        labels: integer labels of any shape, dtype and device, or an iterable of such tensors, for
            example a DataLoader that yields label maps, or a data set that is indexed from 0 to its
            length. Only one of them is held at a time.
        num_classes: C; labels are 0 to C - 1.
        ignore_index: label of pixels that are not counted, any integer or None. Default 255, which
            has to be given where there are more than 255 classes and it is one of them.
        process_group: the counts of all ranks of this group are summed; every rank must call. None
            (default): no other rank takes part.
        progress: True shows on stderr how many maps of an iterable have been counted. Default
            False.

    Returns:
        The counts, int64 [C], on the device of the (first) labels; on the CPU if there are none.

    Raises:
        TypeError: an argument has the wrong type, or labels are not integers.
        ValueError: num_classes is below 1, or labels lie outside [0, C) and are not ignore_index.
        RuntimeError: another rank of the process group has failed; whatever goes wrong while one
            rank counts, none waits for it.

    Example:
        >>> import torch, tritonloss
        >>> tritonloss.count_labels(torch.tensor([[0, 2, 2], [2, 255, 0]]), 3)
        tensor([2, 0, 3])
    """
    checks.check_positive("num_classes", num_classes)
    checks.check_ignore_index(ignore_index, num_classes)
    checks.check_flag("progress", progress)
    if process_group is not None and not isinstance(process_group, ProcessGroup):
        raise TypeError(
            f"process_group must be a ProcessGroup that this rank is in, or None; "
            f"got {type(process_group).__name__}"
        )
    try:
        counts = _count(labels, num_classes, ignore_index, progress)
    except Exception:
        if process_group is not None:  # the other ranks wait for this one's counts
            _summed_over_ranks(torch.zeros(num_classes, dtype=torch.int64), True, process_group)
        raise
    if process_group is None:
        return counts
    return _summed_over_ranks(counts, False, process_group)


def _count(
    labels: torch.Tensor | Iterable[torch.Tensor] | Dataset[torch.Tensor],
    classes: int,
    ignore_index: int | None,
    progress: bool,
) -> torch.Tensor:
    if isinstance(labels, torch.Tensor):
        checks.check_labels(labels, "labels")
        return _count_map(labels, classes, ignore_index, "labels")
    total = _length(labels) if progress else None
    counts: torch.Tensor | None = None
    try:
        for position, label_map in enumerate(_maps(labels)):
            name = f"labels, map {position},"
            checks.check_labels(label_map, name)
            found = _count_map(label_map, classes, ignore_index, name)
            counts = found if counts is None else counts.add_(found.to(counts.device))
            if progress:
                _show(position + 1, total)
    finally:
        if progress:  # end the line of the progress, also after an error
            print(file=sys.stderr)
    return torch.zeros(classes, dtype=torch.int64) if counts is None else counts


def _maps(labels: Iterable[torch.Tensor] | Dataset[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The label maps one by one."""
    accepted = "labels must be an integer tensor or an iterable of them"
    if hasattr(labels, "__array__"):
        raise TypeError(
            f"{accepted}; got {type(labels).__name__}, of which torch.as_tensor makes a tensor"
        )
    if isinstance(labels, Iterable):
        return iter(labels)
    length = _length(labels)
    if length is None or not hasattr(labels, "__getitem__"):
        raise TypeError(f"{accepted}; got {type(labels).__name__}")
    # Not iter(labels), which ends with an IndexError: a data set need not raise one.
    return (labels[index] for index in range(length))


def _length(labels: object) -> int | None:
    """The number of label maps, or None if it is not known."""
    if not isinstance(labels, Sized):
        return None
    try:
        return len(labels)
    except TypeError:  # a DataLoader over a stream has a __len__ that raises
        return None


def _count_map(
    labels: torch.Tensor, classes: int, ignore_index: int | None, name: str
) -> torch.Tensor:
    """The counts of one label map, int64 [classes]."""
    counts = torch.zeros(classes, dtype=torch.int64, device=labels.device)
    outside: dict[int, int] = {}
    for part in torch.split(labels.detach().reshape(-1), _CHUNK):
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
        # Labels that do not count get a place behind the classes, which is cut off.
        kept = torch.where(counted, chunk, classes)
        counts += torch.bincount(kept, minlength=classes + 1)[:classes]
    if outside:
        raise ValueError(
            checks.labels_outside(name, classes, ignore_index, sorted(outside.items()))
        )
    return counts


def _summed_over_ranks(counts: torch.Tensor, failed: bool, group: ProcessGroup) -> torch.Tensor:
    """The counts of all ranks.

    Raises:
        RuntimeError: another rank has failed. A failed rank takes part too: without it the others
            would wait for ever.
    """
    device = counts.device
    if get_backend(group) == "nccl" and device.type != "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    message = torch.cat((counts, counts.new_tensor([int(failed)]))).to(device)
    all_reduce(message, group=group)
    if int(message[-1]) and not failed:
        raise RuntimeError(
            f"labels must be countable on every rank; {int(message[-1])} failed, and say why"
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
    checks.check_labels(label_counts, "label_counts")
    checks.check_range("tau", tau, 0.0, 1e9, interval="(]")
    checks.check_range("upsilon", upsilon, 0.0, 1e9, interval="(]")
    if label_counts.dim() != 1 or label_counts.numel() < 2:
        raise ValueError(f"{accepted}; got shape {tuple(label_counts.shape)}")
    counts = label_counts.tolist()
    if min(counts) < 0:
        raise ValueError(f"{accepted}; got {min(counts)}")
    # Differences of Python integers: float64 would round away a rare class beside 2^53 others.
    total = sum(counts)
    device = label_counts.device
    n_k = torch.tensor(counts, dtype=torch.float64, device=device)
    rest = torch.tensor([total - count for count in counts], dtype=torch.float64, device=device)
    present = n_k > 0
    if int(present.sum()) < 2:
        raise ValueError(
            f"label_counts must hold at least two classes that occur; got "
            f"{present.nonzero().flatten().tolist()}"
        )
    share = n_k / total
    other = tau * rest.sqrt() / n_k
    divisor = upsilon * rest - share * rest.sqrt()
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

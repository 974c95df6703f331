"""Pixel contrast: anchors are pulled to keys of their class and pushed from those of others."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_gather

from kernels_reference.base import over_ranks, without_autocast, working_dtype


def pixel_contrast_loss(
    anchors: Tensor,
    anchor_labels: Tensor,
    keys: Tensor | None = None,
    key_labels: Tensor | None = None,
    *,
    temperature: float = 0.1,
    base_temperature: float = 0.07,
    hardest: float | None = None,
    precision: str = "tf32x3",
    ignore_index: int | None = 255,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """The mean loss over the anchors that have a positive.

        temperature / base_temperature * mean over positives p of softplus(ln_i - s_ip)

    where s_ij = a_i . k_j / temperature and ln_i is the log of the sum of exp(s_ij) over the
    negatives. Without keys they are the anchors, of which none is its own positive. What has no
    class is left out. ``precision`` is for the kernels alone.
    """
    own = keys is None or key_labels is None
    anchor_classes = classes_of(anchor_labels, ignore_index)
    anchors = torch.where(anchor_classes[:, None] >= 0, anchors, 0)
    anchors = anchors.to(working_dtype(anchors.dtype))
    if keys is None or key_labels is None:
        # On each rank the loss of all ranks' anchors.
        keys = anchors = all_anchors(anchors, process_group)
        key_classes = anchor_classes = all_anchors(anchor_classes, process_group)
        process_group = None
    else:
        key_classes = classes_of(key_labels, ignore_index)
        keys = torch.where(key_classes[:, None] >= 0, keys.detach(), 0)
        dtype = torch.promote_types(anchors.dtype, keys.dtype)
        anchors, keys = anchors.to(dtype), keys.to(dtype)

    with without_autocast(anchors):
        s = anchors @ keys.T / temperature
    there = (anchor_classes >= 0)[:, None] & (key_classes >= 0)
    same = anchor_classes[:, None] == key_classes
    positive, negative = there & same, there & ~same
    if own:
        positive = positive & ~torch.eye(len(s), dtype=torch.bool, device=s.device)
    if hardest is not None:
        positive, negative = hard_ones(-s, positive, hardest), hard_ones(s, negative, hardest)

    log_sum = s.masked_fill(~negative, -torch.inf).logsumexp(1, keepdim=True)
    # Where nothing is summed, its gradient is no number.
    log_sum = torch.where(negative.any(1, keepdim=True), log_sum, -torch.inf)
    losses = torch.where(positive, softplus(log_sum - s), 0).sum(1)
    counts = positive.sum(1)
    losses = losses / counts.clamp(min=1)
    total = over_ranks(losses.sum(), process_group)
    taken = over_ranks((counts > 0).sum(), process_group)
    return temperature / base_temperature * total / taken.clamp(min=1)


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x) without overflow; of minus infinity 0, and so is its gradient."""
    return torch.logaddexp(x, torch.zeros_like(x))


def classes_of(labels: Tensor, ignore_index: int | None) -> Tensor:
    """Labels in int64, -1 where there is none: of negative ones, of 2^31 - 1 and above, ignored."""
    classes = labels.to(torch.int64)
    none = (classes < 0) | (classes >= 2**31 - 1)
    if ignore_index is not None:
        none = none | (classes == ignore_index)
    return torch.where(none, -1, classes)


def hard_ones(hardness: Tensor, there: Tensor, share: float) -> Tensor:
    """Of each row the share of the largest ones of those that are there, with all equal ones.

    Of n that is the smallest integer that is no less than n times the share in float32.
    """
    counts = there.sum(1, keepdim=True)
    taken = (counts.float() * share).ceil().long().clamp(min=1)
    hardness = hardness.detach()
    if hardness.size(1) == 0:
        return there
    descending = hardness.masked_fill(~there, -torch.inf).sort(1, descending=True).values
    last = descending.gather(1, (taken - 1).clamp(max=descending.size(1) - 1))
    return there & ~(hardness < last)


def all_anchors(own: Tensor, process_group: ProcessGroup | None) -> Tensor:
    """The rows of all ranks in their order, with a gradient to the own ones times the ranks."""
    if process_group is None:
        return own
    parts = [torch.empty_like(own) for _ in range(process_group.size())]
    all_gather(parts, own.detach().contiguous(), group=process_group)
    rank = process_group.rank()
    if own.is_floating_point():
        parts[rank] = own.detach() + process_group.size() * (own - own.detach())
    return torch.cat(parts)

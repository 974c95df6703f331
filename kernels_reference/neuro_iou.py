"""NeuroIoU: a network that has learnt the IoU loss from sums over right and wrong pixels."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from kernels_reference.base import at_labels, one_hot, sanitised, valid_pixels


class MembershipSums(NamedTuple):
    """Of every image and class: over true positives, false positives and false negatives."""

    sums: Tensor  # [N, C, 3], of each pixel's probability of the class, or of its hinge
    counts: Tensor  # int64 [N, C, 3]


def membership_sums(
    logits: Tensor,
    target: Tensor,
    *,
    score: str = "probability",
    ignore_index: int | None = 255,
    upsample: str | None = None,
    align_corners: bool = False,
) -> MembershipSums:
    """The sums over the pixels that are predicted as a class, labelled so, or both.

    Which pixels these are has no derivative.
    """
    logits = at_labels(logits, target, upsample, align_corners)
    classes = logits.size(1)
    valid = valid_pixels(target, classes, ignore_index)
    z = sanitised(logits, valid)
    label = one_hot(target, classes) & valid
    predicted = (z > 0) & valid if classes == 1 else one_hot(z.argmax(1), classes) & valid
    if score == "hinge":
        x = torch.where(label, 1 - z, 1 + z).clamp(min=0)
    else:
        x = z.sigmoid() if classes == 1 else z.softmax(1)
    members = torch.stack((label & predicted, ~label & predicted, label & ~predicted), 2)
    sums = torch.where(members, x.unsqueeze(2), 0).flatten(3).sum(3)
    return MembershipSums(sums, members.flatten(3).sum(3))


def neuro_iou_loss(
    logits: Tensor,
    target: Tensor,
    surrogate: nn.Module,
    *,
    ignore_index: int | None = 255,
    upsample: str | None = None,
    align_corners: bool = False,
) -> Tensor:
    """What the surrogate makes of the sums, mean over the images' present classes; 0 of none.

    The surrogate, (sums, counts, pixels) -> losses, says in ``score`` what is summed up.
    """
    sums, counts = membership_sums(
        logits,
        target,
        score=str(surrogate.score),
        ignore_index=ignore_index,
        upsample=upsample,
        align_corners=align_corners,
    )
    pixels = target[0].numel() if target.numel() else 1
    true_positives, _, false_negatives = counts.unbind(2)
    present = true_positives + false_negatives > 0
    losses = surrogate(sums, counts, pixels)
    return torch.where(present, losses, 0).sum() / present.sum().clamp(min=1)

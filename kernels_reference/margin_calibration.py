"""Margin-calibrated log-loss: each class against the best of the others, with offsets."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from kernels_reference.base import at_labels, one_hot, reduced, sanitised, valid_pixels

_LN_2 = 0.6931471805599453


def margin_calibrated_loss(
    logits: Tensor,
    target: Tensor,
    offsets: tuple[Tensor, Tensor],
    *,
    variant: str = "paper",
    ignore_index: int | None = 255,
    reduction: str = "mean",
    upsample: str | None = None,
    align_corners: bool = False,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Sum over classes of a penalty on the margin, Eq. 16-18 ("paper") or Eq. 9 ("margin")."""
    logits = at_labels(logits, target, upsample, align_corners)
    classes = logits.size(1)
    valid = valid_pixels(target, classes, ignore_index)
    scores = sanitised(logits, valid)
    own = one_hot(target, classes)
    own_offset, other_offset = (o.detach().to(scores.dtype).view(1, -1, 1, 1) for o in offsets)

    margin = margins(scores)
    # A margin that is NaN makes all margins of its pixel NaN: the loss, and all of its gradient.
    margin = margin * torch.where(margin.isnan().any(1, keepdim=True), torch.nan, 1)
    mu = torch.where(own, -margin, margin)
    rho = torch.where(own, own_offset, other_offset)
    if variant == "margin":
        penalty = _ramp(mu, rho)
    elif variant == "paper":
        penalty = -F.logsigmoid(-(mu + rho) * _LN_2) / _LN_2
    else:
        penalty = -F.logsigmoid(-(mu + rho)) / torch.where(own, 1, classes)
    valid = valid.squeeze(1)
    return reduced(penalty.sum(1), valid, valid, reduction, process_group)


def margins(scores: Tensor) -> Tensor:
    """s_k - max_{j != k} s_j, Eq. 8; of equal scores the first is the maximum."""
    index = torch.arange(scores.size(1), device=scores.device).view(1, -1, 1, 1)
    best = scores.argmax(1, keepdim=True)
    # Clamped, so that a class with the score -inf still comes before the best itself.
    others = scores.clamp(min=torch.finfo(scores.dtype).min)
    runner_up = others.masked_fill(index == best, -torch.inf).argmax(1, keepdim=True)
    opponent = torch.where(index == best, runner_up, best)
    return scores - scores.gather(1, opponent)


def _ramp(mu: Tensor, rho: Tensor) -> Tensor:
    """phi_rho(-mu) = min(1, max(0, 1 + mu / rho)), Eq. 9; a step for rho = 0."""
    inside = 1 + mu / torch.where(rho == 0, 1, rho)
    return torch.where(mu >= 0, 1, torch.where(mu <= -rho, 0, inside))

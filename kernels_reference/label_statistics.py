"""Label counts, and the margin offsets that follow from them."""

import torch
from torch import Tensor


def count_labels(labels: Tensor, num_classes: int, *, ignore_index: int | None = 255) -> Tensor:
    """How many pixels carry each class, int64 [num_classes]."""
    classes = torch.arange(num_classes, device=labels.device)
    kept = labels if ignore_index is None else labels[labels != ignore_index]
    return (kept.reshape(-1, 1) == classes).sum(0)


def margin_offsets(
    label_counts: Tensor, *, tau: float = 10.0, upsilon: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(rho_k0, rho_0k), margin paper, Algorithm 1, float64 [C] each; every class must occur."""
    n_k = label_counts.double()
    n = n_k.sum()
    share = n_k / n
    other = tau * (n - n_k).sqrt() / n_k
    ratio = share * n_k.sqrt() / (upsilon * (n - n_k) - share * (n - n_k).sqrt())
    return ratio * other, other

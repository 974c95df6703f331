"""Affinity fields: neighbours of one class agree in their probabilities, others differ."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from kernels_reference.base import one_hot, over_ranks, sanitised, valid_pixels

# The least that a probability, or the rest to 1, counts as.
LEAST = 1e-4
# The eight neighbours, (rows, columns) away.
DIRECTIONS = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]


def affinity_field_loss(
    logits: Tensor,
    target: Tensor,
    *,
    size: int | tuple[int, ...] = 1,
    margin: float = 3.0,
    edge_weight: float = 1.0,
    non_edge_weight: float = 1.0,
    edge_table: Tensor | None = None,
    non_edge_table: Tensor | None = None,
    decay: float = 1.0,
    void: str = "triple",
    ignore_index: int | None = 255,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Decay times the sum over sizes of both weighted means: of edges, and of other entries."""
    classes = logits.size(1)
    valid = valid_pixels(target, classes, ignore_index)
    own = one_hot(target, classes)
    log_p = sanitised(logits, valid).log_softmax(1)
    p = log_p.exp().clamp(LEAST, 1)
    q = (-torch.expm1(log_p)).clamp(LEAST, 1)  # 1 - p, whose digits are kept where p is about 1
    sizes = (size,) if isinstance(size, int) else size
    total = log_p.new_zeros(())
    for position, distance in enumerate(sizes):
        edges, others = _entries(p, q, own, valid, distance, margin, void)
        for factor, table, (entries, count) in (
            (edge_weight, edge_table, edges),
            (non_edge_weight, non_edge_table, others),
        ):
            weight = _of_centres(table, position, own, entries)
            entries = over_ranks((weight * entries).sum(), process_group)
            total = total + factor * entries / over_ranks(count, process_group).clamp(min=1)
    return decay * total


def _entries(
    p: Tensor, q: Tensor, own: Tensor, valid: Tensor, size: int, margin: float, void: str
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(sum over neighbours and classes [N, 1, H, W], number of entries), of edges and of others."""
    height, width = p.shape[2:]
    around = [F.pad(x, (size,) * 4, value=1) for x in (p, q)]
    own_around, valid_around = (F.pad(x, (size,) * 4) for x in (own, valid))

    def shifted(x: Tensor, dy: int, dx: int) -> Tensor:
        return x.narrow(2, size + dy, height).narrow(3, size + dx, width)

    sums = [p.new_zeros(valid.shape), p.new_zeros(valid.shape)]
    counts = [torch.zeros((), dtype=torch.int64, device=p.device) for _ in range(2)]
    for dy, dx in ((size * dy, size * dx) for dy, dx in DIRECTIONS):
        p_there, q_there = (shifted(x, dy, dx) for x in around)
        divergence = p_there * (p_there.log() - p.log()) + q_there * (q_there.log() - q.log())
        pairs = valid & shifted(valid_around, dy, dx)
        if void == "triple":
            pairs = pairs & shifted(valid_around, -dy, -dx)
        is_edge = own != shifted(own_around, dy, dx)
        # As max(0, margin - divergence), but NaN stays NaN.
        beyond = torch.where(divergence >= margin, 0, margin - divergence)
        for kind, (where, entry) in enumerate(((is_edge, beyond), (~is_edge, divergence))):
            sums[kind] = sums[kind] + torch.where(where & pairs, entry, 0).sum(1, keepdim=True)
            counts[kind] = counts[kind] + (where & pairs).sum()
    return (sums[0], counts[0]), (sums[1], counts[1])


def _of_centres(table: Tensor | None, position: int, own: Tensor, like: Tensor) -> Tensor:
    """The weight of every centre pixel's class for a size, [N, 1, H, W]; 1 without a table."""
    if table is None:
        return like.new_ones(())
    column = table if table.dim() == 1 else table[:, position]
    weights = column.to(like.dtype).view(1, -1, 1, 1)
    return torch.where(own, weights, 0).sum(1, keepdim=True)

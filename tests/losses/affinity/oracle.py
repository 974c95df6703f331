"""Affinity fields from their definition: pixel by pixel, in float64, nothing of the package."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

LEAST = 1e-4


def loss_by_definition(
    logits: Tensor,
    target: Tensor,
    *,
    sizes: tuple[int, ...] = (1,),
    margin: float = 3.0,
    weights: tuple[float, float] = (1.0, 1.0),
    tables: tuple[Tensor, Tensor] | None = None,
    triple: bool = True,
    ignored: int = 255,
) -> Tensor:
    """The loss as a tensor that can be differentiated; ``tables`` are [C, sizes]."""
    probabilities = torch.softmax(logits.double(), 1)
    images, classes, height, width = logits.shape

    def label(n: int, y: int, x: int) -> int | None:
        if not (0 <= y < height and 0 <= x < width) or int(target[n, y, x]) == ignored:
            return None
        return int(target[n, y, x])

    def clamped(value: Tensor) -> Tensor:
        return value.clamp(LEAST, 1.0)

    total = probabilities.new_zeros(())
    for position, size in enumerate(sizes):
        edges, others = [], []
        places = itertools.product(range(images), range(height), range(width))
        for (n, y, x), dy, dx in itertools.product(places, (-size, 0, size), (-size, 0, size)):
            own, there = label(n, y, x), label(n, y + dy, x + dx)
            opposite = label(n, y - dy, x - dx)
            if (dy, dx) == (0, 0) or own is None or there is None or (triple and opposite is None):
                continue
            for c in range(classes):
                p_i, p_j = probabilities[n, c, y, x], probabilities[n, c, y + dy, x + dx]
                one, other = clamped(p_i), clamped(p_j)
                rest, other_rest = clamped(1 - p_i), clamped(1 - p_j)
                divergence = other * (other / one).log() + other_rest * (other_rest / rest).log()
                is_edge = (own == c) != (there == c)
                entry = (margin - divergence).clamp(min=0) if is_edge else divergence
                if tables is not None:
                    entry = entry * tables[0 if is_edge else 1][own, position].double()
                (edges if is_edge else others).append(entry)
        for weight, entries in zip(weights, (edges, others), strict=True):
            if entries:
                total = total + weight * torch.stack(entries).mean()
    return total


def count_by_definition(height: int, width: int, size: int, triple: bool) -> int:
    """How many pairs an image without void has."""
    reach = 2 if triple else 1
    straight = math.prod((max(height - size * reach, 0), width))
    across = math.prod((height, max(width - size * reach, 0)))
    oblique = max(height - size * reach, 0) * max(width - size * reach, 0)
    return 2 * straight + 2 * across + 4 * oblique

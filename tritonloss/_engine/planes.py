"""What all walks over maps have in common, on the host."""

from __future__ import annotations

import torch


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def ignored_class(ignore_index: int | None, classes: int, dtype: torch.dtype) -> int:
    """The ignore label if it would otherwise be a class; else -1: the range check does it."""
    if ignore_index is None or not 0 <= ignore_index < min(classes, torch.iinfo(dtype).max + 1):
        return -1
    return ignore_index

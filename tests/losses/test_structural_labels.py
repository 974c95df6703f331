"""The look at the labels: which classes occur where, and how many pixels are valid."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tritonloss.windows.structural_labels import (
    PATCH_COLUMNS,
    PATCH_ROWS,
    empty_found,
    look_at_labels,
)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
@pytest.mark.parametrize(
    ("classes", "radius", "ignore_index", "width"),
    [(40, 1, 255, 140), (33, 5, 7, 257), (2, 0, None, 3), (1, 15, 255, 129)],
)
def test_bits_are_those_of_what_windows_see(
    classes: int,
    radius: int,
    ignore_index: int | None,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Dilated one-hot maps are the truth; there are labels out of range, and bits of two words."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, 35, width)
    target = torch.full(shape, 200, dtype=dtype)
    some = torch.rand(shape, generator=generator) < 0.01
    labels = torch.randint(0, max(classes, 2) + 2, shape, generator=generator).to(dtype)
    target = torch.where(some, labels, target)
    target[0, 0, 0] = ignore_index or 0
    target = target.to(device)

    logits = torch.empty(2, classes, 35, width, device="meta")
    found = torch.empty(empty_found(logits).shape, dtype=torch.int32, device=device)
    valid = look_at_labels(target, found, classes, radius, ignore_index)

    index = target.long() if classes > 1 else 1 - target.long()
    is_valid = target.long() < max(classes, 2)
    if ignore_index is not None:
        is_valid &= target.long() != ignore_index
    hot = (index[:, None] == torch.arange(classes, device=device).view(-1, 1, 1)) & is_valid[
        :, None
    ]
    seen = F.max_pool2d(hot.float(), 2 * radius + 1, 1, radius)
    rows, columns = PATCH_ROWS.value, PATCH_COLUMNS.value
    seen = F.max_pool2d(seen, (rows, columns), ceil_mode=True)  # [N, C, patches in y, in x]
    places = torch.arange(classes, device=device)
    bits = (found[..., places // 32] >> (places % 32)) & 1
    assert torch.equal(bits.movedim(-1, 1), seen.int())
    assert valid == is_valid.sum()

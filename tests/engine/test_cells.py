"""Where the pixels of an axis lie between its nodes: PyTorch's own arithmetic, to the last bit."""

from __future__ import annotations

import operator
import random

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.losses.pixelwise.cases import kernel_gradient
from tests.losses.pixelwise.upsampled import upsampled_case
from tritonloss._core import configurations
from tritonloss._engine import cell_grid
from tritonloss._engine.cell_grid import axis_tables
from tritonloss._engine.pixel_tuning import cell_candidates
from tritonloss.functional import cross_entropy
from tritonloss.pixelwise.cross_entropy import LOSS

CPU = torch.device("cpu")


def interpolated(axis: Tensor, pixels: int, align_corners: bool) -> Tensor:
    return F.interpolate(
        axis.view(1, 1, 1, -1), (1, pixels), mode="bilinear", align_corners=align_corners
    ).flatten()


def pairs() -> list[tuple[int, int]]:
    """(nodes, pixels): all small ones, the usual crops, and others."""
    found = {(n, p) for n in range(1, 13) for p in range(n, 41)}
    found |= {
        (n, n * ratio + more) for n in (32, 97, 128) for ratio in (2, 3, 4, 8) for more in (0, 1)
    }
    chosen = random.Random(0)
    for _ in range(400):
        nodes = chosen.randint(2, 300)
        found.add((nodes, chosen.randint(nodes, 2100)))
    return sorted(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("align_corners", [False, True])
def test_axes_are_torchs(align_corners: bool, dtype: torch.dtype) -> None:
    """Of alternating zeros and ones, interpolation leaves the very shares."""
    for nodes, pixels in pairs():
        tables = axis_tables.__wrapped__(nodes, pixels, align_corners, dtype)
        counts = tables.starts.diff()
        assert tables.starts.dtype == torch.int32 and tables.starts.shape == (nodes + 2,)
        assert tables.starts[0] == 0 and tables.starts[-1] == pixels and (counts >= 0).all()
        assert tables.most == counts.max()
        cells = torch.repeat_interleave(torch.arange(nodes + 1), counts)
        assert tables.shares.dtype == dtype and cells.shape == tables.shares.shape == (pixels,)

        left, right = (cells - 1).clamp(min=0), cells.clamp(max=nodes - 1)
        odd = torch.arange(nodes) % 2
        of_odd = interpolated(odd.to(dtype), pixels, align_corners)
        of_even = interpolated((1 - odd).to(dtype), pixels, align_corners)
        share = torch.where(odd[right] == 1, of_odd, of_even)
        inner = left != right
        # In 64 bits the place is rounded once more: so far off may it be.
        off = nodes * torch.finfo(dtype).eps if dtype == torch.float64 else 0.0
        assert ((tables.shares - share)[inner].abs() <= off).all(), (nodes, pixels)
        assert ((tables.shares >= 0) & (tables.shares <= 1)).all()

        # Beyond the outermost nodes no sum of gradients is for a node that is not there.
        assert (tables.shares[cells == 0] == 1).all() and (tables.shares[cells == nodes] == 0).all()
        ramp = torch.arange(nodes, dtype=dtype)
        place = torch.lerp(ramp[left], ramp[right], tables.shares)
        tolerance = 4 * nodes * torch.finfo(dtype).eps
        expected = interpolated(ramp, pixels, align_corners)
        assert (place - expected).abs().max() <= tolerance, (nodes, pixels)


@pytest.mark.parity
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_whatever_the_tuner_tries_computes_the_same(direction: str, device: torch.device) -> None:
    logits, target = upsampled_case((1, 2), (4, 8), classes=6, device=device)
    candidates = cell_candidates(LOSS, direction, 4)
    results = []
    for candidate in candidates:
        with configurations.forced(f"cross_entropy_upsampled_{direction}", candidate):
            results.append(kernel_gradient(cross_entropy, logits, target, upsample="bilinear"))
    assert len(candidates) > 5
    for value, gradient in results[1:]:
        torch.testing.assert_close(value, results[0][0], rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient, results[0][1], rtol=1e-5, atol=1e-7)


def axes(*sizes: int) -> cell_grid.Axes:
    height, width, rows, columns = sizes
    logits, target = torch.empty(1, 2, height, width), torch.empty(1, rows, columns)
    return cell_grid.axes_of(logits, target, align_corners=False)


@pytest.mark.parity
def test_every_stream_copies_its_tables_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that has not copied them itself does not know when the copy is there."""
    monkeypatch.setattr(cell_grid, "_copies", {})
    first = axes(3, 4, 7, 9)
    assert all(map(operator.is_, first, axes(3, 4, 7, 9)))
    monkeypatch.setattr(cell_grid, "stream_of", lambda device: 1)
    assert not any(map(operator.is_, first, axes(3, 4, 7, 9)))


@pytest.mark.parity
def test_a_captured_graph_uses_the_tables_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is copied from the host while a graph is captured would be read when it runs."""
    monkeypatch.setattr(cell_grid, "_copies", {})
    first = axes(3, 4, 7, 9)
    monkeypatch.setattr(cell_grid, "stream_of", lambda device: 1)
    monkeypatch.setattr(cell_grid, "is_captured", lambda device: True)
    assert all(map(operator.is_, first, axes(3, 4, 7, 9)))
    with pytest.raises(RuntimeError, match="run the loss once on .* of these sizes before"):
        axes(3, 4, 7, 10)


def test_tables_are_made_on_the_host_whatever_the_default_device() -> None:
    with torch.device("meta"):
        tables = axis_tables.__wrapped__(3, 7, False, torch.float32)
    assert tables.starts.device == tables.shares.device == CPU

"""The engine's sums: any number of programs, any order, tickets put back."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from tritonloss._core import backend
from tritonloss._core.backend import device_guard
from tritonloss._engine import sums as engine_sums
from tritonloss._engine.sums import Sums, comes_last, leave, sizes, sums_over, tickets, total
from tritonloss._tools.launches import offline


@triton.jit(do_not_specialize=["count", "programs"])
def _moments_kernel(x_ptr, out_ptr, scratch_ptr, tickets_ptr, programs, count, BLOCK: tl.constexpr):
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offset, mask=offset < count, other=0.0)
    sums = Sums(scratch=scratch_ptr, tickets=tickets_ptr, programs=programs, rows=2)
    leave(sums, 0, tl.sum(x))
    leave(sums, 1, tl.sum(x * x))
    if comes_last(sums):
        tl.store(out_ptr, total(sums, 0))
        tl.store(out_ptr + 1, total(sums, 1))


@pytest.mark.parity
@pytest.mark.parametrize("count", [1, 4, 5, 4 * 128, 4 * 128 + 1, 4 * 128 * 2 + 2])
def test_sums_are_those_of_all_programs(count: int, device: torch.device) -> None:
    x = torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x.to(device)
    out = x.new_full((2,), float("nan"))
    programs = triton.cdiv(count, 4)
    sums = sums_over(programs, 2, device)
    for _ in range(2):  # the second launch finds the tickets as the first one did
        out.fill_(float("nan"))
        with device_guard(x):
            _moments_kernel[(programs,)](x, out, count=count, BLOCK=4, **sums)
        assert not sums["tickets_ptr"].any()
        torch.testing.assert_close(out, torch.stack([x.sum(), (x * x).sum()]))


@pytest.mark.gpu
def test_streams_have_tickets_of_their_own() -> None:
    device = torch.device("cuda", 0)
    with torch.cuda.stream(torch.cuda.Stream()):
        first = tickets(10, device)
    with torch.cuda.stream(torch.cuda.Stream()):
        second = tickets(10, device)
    assert first.data_ptr() != second.data_ptr()


def test_room_is_kept_as_large_as_was_ever_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "INTERPRETED", False)
    monkeypatch.setattr(engine_sums, "_kept", {})
    device = torch.device("cpu")
    with offline(GPUTarget("cuda", 90, 32)):
        counters = tickets(5000, device)
        assert counters.numel() == 5000 and not counters.any()
        sums = sums_over(100_000, 3, device)
        assert sums["tickets_ptr"].numel() == 5000
        assert sums["scratch_ptr"].numel() >= 3 * 100_001
        assert sums_over(10, 3, device)["scratch_ptr"] is sums["scratch_ptr"]
        assert tickets(10, device) is sums["tickets_ptr"]


def test_levels() -> None:
    """Elements and groups of a level are those that the level below leaves."""
    assert sizes(1) == (1, 1) and sizes(256) == (256, 1)
    assert sizes(257) == (257 + 2, 2 + 1)
    assert sizes(256**2 + 1) == (256**2 + 1 + 257 + 2, 257 + 2 + 1)

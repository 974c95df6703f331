"""Arithmetic of fewer instructions than Triton's own: right to the last digits."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonloss._engine.cell_grid import _divisor
from tritonloss._engine.cells import divided
from tritonloss._engine.math import log2_normal, log2_one_plus

pytestmark = pytest.mark.parity

SIZE = 4096


@triton.jit
def _apply_kernel(x_ptr, y_ptr, FUNCTION: tl.constexpr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(y_ptr + index, FUNCTION(tl.load(x_ptr + index)))


def applied(function: Any, x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    _apply_kernel[(1,)](x, y, function, x.numel())
    return y.double()


def floats(lowest: float, highest: float, device: torch.device) -> Tensor:
    """Floats whose logarithms lie evenly, and those at the powers of 2 and two thirds of them."""
    ends = torch.tensor((lowest, highest), dtype=torch.float64).log2()
    numbers = torch.linspace(ends[0], ends[1], SIZE, dtype=torch.float64).exp2().float()
    powers = 2.0 ** torch.arange(-124, 125, dtype=torch.float64)
    edges = torch.stack((powers, powers * (2 / 3))).float().view(torch.int32)
    edges = (edges.flatten()[:, None] + torch.arange(-2, 3).int()).view(torch.float32).flatten()
    edges = edges[(edges >= lowest) & (edges <= highest)]
    numbers[: edges.numel()] = edges
    return numbers.to(device)


def test_logarithm_of_a_normal_number(device: torch.device) -> None:
    for lowest, highest in ((1e-37, 1e38), (0.5, 2.0), (0.999, 1.001)):
        x = floats(lowest, highest, device)
        truth = x.double().log2()
        error = (applied(log2_normal, x) - truth).abs()
        assert (error <= 1.6e-7 * truth.abs()).all()
    x = torch.full((16,), float("nan"), device=device)
    assert applied(log2_normal, x).isnan().all()
    assert (applied(log2_normal, torch.ones(16, device=device)) == 0).all()


def test_logarithm_of_one_and_a_number(device: torch.device) -> None:
    for lowest, highest in ((1e-37, 1e-5), (1e-5, 3.0), (0.3, 2.0**96)):
        x = floats(lowest, highest, device)
        truth = x.double().log1p() / torch.tensor(2.0, dtype=torch.float64).log().item()
        error = (applied(log2_one_plus, x) - truth).abs()
        assert (error <= 2.4e-7 * truth).all()
    x = torch.full((16,), float("nan"), device=device)
    assert applied(log2_one_plus, x).isnan().all()
    assert (applied(log2_one_plus, torch.zeros(16, device=device)) == 0).all()


@triton.jit
def _divide_kernel(number_ptr, quotient_ptr, remainder_ptr, divisor, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    quotient, remainder = divided(tl.load(number_ptr + index), divisor)
    tl.store(quotient_ptr + index, quotient)
    tl.store(remainder_ptr + index, remainder)


def test_division_by_a_number_of_the_host(device: torch.device) -> None:
    chosen = random.Random(0)
    most = 2**31 - 1
    divisors = [1, 2, 3, 5, 7, 64, 513, 2**30 - 1, 2**30, 2**30 + 1, most - 1, most]
    divisors += [chosen.randint(1, 2 ** chosen.randint(1, 31) - 1) for _ in range(40)]
    for divisor in divisors:
        numbers = [0, 1, most - 1, most, divisor - 1, divisor, min(divisor + 1, most)]
        numbers += [most // divisor * divisor - 1, most // divisor * divisor]
        numbers += [chosen.randint(0, most) for _ in range(64 - len(numbers))]
        number = torch.tensor(numbers, dtype=torch.int32, device=device).clamp(min=0)
        quotient, remainder = torch.empty_like(number), torch.empty_like(number)
        _divide_kernel[(1,)](number, quotient, remainder, _divisor(divisor), 64)
        assert torch.equal(quotient, number // divisor)
        assert torch.equal(remainder, number % divisor)

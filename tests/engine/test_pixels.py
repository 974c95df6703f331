"""The walk over pixels: where programs are, a loss of one's own, several losses in one read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.oracle import as_layout, segmentation_case
from tritonloss._engine.pixel_launch import launch_backward, launch_forward
from tritonloss._engine.pixel_terms import Loss, Term, Walk, Weights
from tritonloss._engine.pixel_walk import run_of_pixels
from tritonloss._engine.pixels import (
    Record,
    Tile,
    class_of,
    for_classes,
    no_lookups,
    nothing_yet,
    sum_of_lanes,
)
from tritonloss.pixelwise import binary_cross_entropy, cross_entropy, focal_loss, margin_calibration

pytestmark = pytest.mark.parity


@triton.jit
def _run_kernel(first_ptr, inside_ptr, pixels, tiles, TILE: tl.constexpr):
    run = run_of_pixels(pixels, 1, tiles, TILE)
    tl.store(first_ptr + tl.program_id(0), run.first)
    tl.store(inside_ptr + tl.program_id(0) * TILE.pixels + run.local, run.inside.to(tl.int32))


def test_images_of_2_to_the_31_pixels(device: torch.device) -> None:
    """The number of pixels fits into 32 bits only when it is counted in grains."""
    tile = Tile(64, 1, 1, grain=4, flat=True, classes=1, double=False, bundle=4, slots=1)
    first = torch.empty(2, dtype=torch.int64, device=device)
    inside = torch.empty(2, 64, dtype=torch.int32, device=device)
    _run_kernel[(2,)](first, inside, 2**29, 2**25, tile)
    assert first.tolist() == [0, 64] and inside.all()


# A loss of one's own, as CONTRIBUTING.md shows it.


class State(NamedTuple):
    total: Any


class Factors(NamedTuple):
    scale: Any
    own: Any


@triton.jit
def start(OPTIONS: tl.constexpr, TILE: tl.constexpr):
    return State(total=nothing_yet(0.0, TILE))


@triton.jit
def add(state, block, pixel, given, OPTIONS: tl.constexpr, TILE: tl.constexpr):
    own = for_classes(pixel.own, TILE)
    total = state.total
    for j in tl.static_range(len(block.logits)):
        z = tl.where(class_of(block, j, TILE) == own, 0.0, tl.maximum(block.logits[j], 0.0))
        total += z * z
    return State(total=total)


@triton.jit
def finish(state, own, pixel, given, OPTIONS: tl.constexpr, TILE: tl.constexpr):
    loss = sum_of_lanes(state.total, TILE) * given.numbers[0]
    return loss, tl.zeros_like(loss) + 1.0, ()


@triton.jit
def factors(scale, saved, looked_up, pixel, given, OPTIONS: tl.constexpr, TILE: tl.constexpr):
    scale = for_classes(scale * given.numbers[0], TILE)
    return Factors(scale=scale, own=for_classes(pixel.own, TILE))


@triton.jit
def slope(factors, block, SLOT: tl.constexpr, given, OPTIONS: tl.constexpr, TILE: tl.constexpr):
    is_own = class_of(block, SLOT, TILE) == factors.own
    return tl.where(is_own, 0.0, 2 * factors.scale * tl.maximum(block.logits[SLOT], 0.0))


RECORD = Record(start, add, finish, factors, slope, no_lookups)
SQUARES = Loss("squares", RECORD, saved=lambda logits, upsampled: ())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_loss_of_ones_own(reduction: str, layout: str, device: torch.device) -> None:
    logits, target = segmentation_case((2, 7, 6, 12), device=device)
    leaf = as_layout(logits, layout).requires_grad_()
    valid = target != 255
    index = torch.arange(7, device=device).view(1, -1, 1, 1)
    others = torch.where(target[:, None] == index, 0, leaf.clamp(min=0))
    expected = torch.where(valid, 0.5 * others.square().sum(1), 0)
    if reduction != "none":
        expected = expected.sum() / (valid.sum() if reduction == "mean" else 1)
    upstream = torch.ones_like(expected)

    loss, gradient = both_passes((Term(SQUARES, (), (0.5,)),), leaf, target, reduction, upstream)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, *torch.autograd.grad(expected, leaf, upstream))


def both_passes(
    terms: tuple[Term, ...],
    logits: Tensor,
    target: Tensor,
    reduction: str,
    upstream: Tensor,
    weights: Weights | None = None,
    values: Tensor | None = None,
    before: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    logits, walk = logits.detach(), Walk(255, reduction)
    if logits.shape[2:] != target.shape[1:]:
        walk = walk._replace(upsample="bilinear")
    given = {"weights": weights}
    loss, kept = launch_forward(terms, logits, target, walk, True, **given, values=values)
    given["before"] = before
    return loss, launch_backward(terms, upstream, kept, logits, target, walk, **given)


def check_a_sum(
    terms: tuple[Term, ...], logits: Tensor, target: Tensor, reduction: str, upstream: Tensor
) -> None:
    """Each loss times its own weight, its value alone, and a gradient that is added to another."""
    numbers = torch.tensor([0.5, -1.0, 2.0, 0.25], dtype=torch.float64, device=logits.device)
    places = tuple(range(4))[::-1][: len(terms)]
    values = logits.new_empty(len(terms))
    before = torch.rand_like(logits)
    given = Weights(numbers, places), values, before.clone()
    loss, gradient = both_passes(terms, logits, target, reduction, upstream, *given)
    alone = [both_passes((term,), logits, target, reduction, upstream) for term in terms]
    shares = numbers[list(places)].float()
    for k, (value, _) in enumerate(alone):
        if reduction != "none":
            torch.testing.assert_close(values[k], value)
    expected = [sum(s * found[i] for s, found in zip(shares, alone, strict=True)) for i in (0, 1)]
    torch.testing.assert_close(loss, expected[0])
    torch.testing.assert_close(gradient, before + expected[1])
    assert gradient.data_ptr() == given[2].data_ptr()


def terms_of(classes: int, device: torch.device) -> tuple[Term, ...]:
    """All four losses, each with options of its own."""
    weight = torch.linspace(0.5, 2.0, classes, device=device)
    offset = torch.linspace(0.1, 0.4, classes, device=device)
    logits = torch.empty(1, classes, 1, 1)
    smooth, steep = cross_entropy.Options(0.1), focal_loss.Options(gamma=1.5)
    released = margin_calibration.Options("released")
    plain = binary_cross_entropy.Options()
    return (
        cross_entropy._term(logits, weight, None, smooth, True),
        binary_cross_entropy._term(logits, None, None, plain, True),
        focal_loss._term(logits, None, None, steep, True),
        margin_calibration._term(logits, offset, offset, released, True),
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chosen", [(0, 1), (0, 2), (3, 1), (1, 0, 1), (2, 1, 0, 3)], ids=str)
def test_several_losses_in_one_read(
    chosen: tuple[int, ...], reduction: str, layout: str, device: torch.device
) -> None:
    logits, target = segmentation_case((2, 7, 6, 12), device=device)
    logits = as_layout(logits, layout)
    terms = tuple(terms_of(7, device)[i] for i in chosen)
    upstream = torch.rand(target.shape if reduction == "none" else (), device=device)
    check_a_sum(terms, logits, target, reduction, upstream)


@pytest.mark.parametrize("chosen", [(1, 1), (0, 1), (2, 1, 0), (3, 1)], ids=str)
def test_several_losses_of_interpolated_logits(
    chosen: tuple[int, ...], device: torch.device
) -> None:
    """Scaled logits are for those that know of them: only if all of the walk's losses do."""
    logits, _ = segmentation_case((1, 9, 2, 3), device=device)
    _, target = segmentation_case((1, 9, 5, 7), device=device)
    terms = tuple(terms_of(9, device)[i] for i in chosen)
    for reduction in ("mean", "none"):
        upstream = torch.rand(target.shape if reduction == "none" else (), device=device)
        check_a_sum(terms, logits, target, reduction, upstream)


def test_contributing_shows_the_loss_that_is_run() -> None:
    guide = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = guide.split("```python\n")[1].split("```")[0]
    own = Path(__file__).read_text(encoding="utf-8")

    def lines(text: str) -> list[str]:
        return [line.split("  #")[0] for line in text.splitlines() if line]

    assert "\n".join(lines(shown)) in "\n".join(lines(own))

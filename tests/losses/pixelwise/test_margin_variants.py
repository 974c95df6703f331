"""Margin-calibrated loss: what each variant computes, and which to take."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import kernels_reference
import tritonloss
from tests.losses.pixelwise.margins import kernel_gradient, offsets_for
from tests.oracle import segmentation_case
from tritonloss import MarginOffsets
from tritonloss.functional import margin_calibrated_loss

pytestmark = pytest.mark.parity


def test_value_and_gradient_of_the_specification(device: torch.device) -> None:
    """ds_k = u_k - [k = a] sum of u_j for j != a - [k = b] u_a, by hand; it sums to 0 over k."""
    logits, target = segmentation_case((1, 5, 4, 6), dtype=torch.float64, ignore_index=None)
    own, other = (x.double() for x in offsets_for(5))
    index = torch.arange(5).view(1, -1, 1, 1)
    y = target[:, None] == index
    top = logits.topk(2, 1)
    best = index == top.indices[:, :1]
    margin = logits - torch.where(best, top.values[:, 1:], top.values[:, :1])
    calibrated = margin + torch.where(y, -own.view(1, -1, 1, 1), other.view(1, -1, 1, 1))
    sign = torch.where(y, -1.0, 1.0).double()
    value = torch.log2(1 + 2 ** (sign * calibrated)).sum() / target.numel()
    u = sign * torch.sigmoid(math.log(2) * sign * calibrated) / target.numel()
    others = (u * ~best).sum(1, keepdim=True)
    gradient = u - best * others - (index == top.indices[:, 1:]) * (u * best).sum(1, keepdim=True)

    found = kernel_gradient(logits.to(device), target.to(device), offsets=(own, other))
    torch.testing.assert_close(found[0].cpu(), value)
    torch.testing.assert_close(found[1].cpu(), gradient)
    assert found[1].sum(1).abs().max() < 1e-15


def released_loss(logits: Tensor, target: Tensor, offsets: MarginOffsets) -> Tensor:
    """The authors' formulation: a weight of C for the own class, mean over pixels and classes."""
    classes = logits.size(1)
    y = F.one_hot(target.long(), classes).movedim(-1, 1).double()
    own, other = (x.double().view(1, -1, 1, 1) for x in offsets)
    calibrated = kernels_reference.margins(logits) - y * own + (1 - y) * other
    return F.binary_cross_entropy_with_logits(
        calibrated, y, pos_weight=torch.full((classes, 1, 1), float(classes))
    )


def test_released_variant_is_the_authors() -> None:
    logits, target = segmentation_case((2, 5, 4, 6), dtype=torch.float64, ignore_index=None)
    value, _ = kernel_gradient(logits, target, variant="released")
    torch.testing.assert_close(value, released_loss(logits, target, offsets_for(5)))


def wrong_winner(classes: int, offsets: MarginOffsets, variant: str, backend: str) -> float:
    """Derivative of a pixel's loss by its best score, which is not the label's, at equal scores.

    Class 0 wins by next to nothing. The labels of the two pixels are the last class and class 1.
    """
    logits = torch.zeros(1, classes, 1, 2, dtype=torch.float64)
    logits[:, 0] = 1e-9
    target = torch.tensor([[[classes - 1, 1]]])
    leaf = logits.to(offsets.own.device).requires_grad_()
    with tritonloss.use_backend(backend):
        value = margin_calibrated_loss(leaf, target.to(leaf.device), offsets, variant=variant)
    return torch.autograd.grad(value, leaf)[0][:, 0].sum().item()


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("classes", [2, 3, 4, 5, 6, 8, 19, 150])
@pytest.mark.shipped_sizes
def test_paper_raises_a_wrong_winner_from_five_classes_on(
    classes: int, backend: str, device: torch.device
) -> None:
    """The docstring's closed form: (4 - C) / 2, where "released" has 3 / (2 C) and lowers it."""
    zero = torch.zeros(classes, dtype=torch.float64, device=device)
    offsets = MarginOffsets(zero, zero)
    paper = wrong_winner(classes, offsets, "paper", backend)
    assert paper == pytest.approx((4 - classes) / 2, abs=1e-6)
    released = wrong_winner(classes, offsets, "released", backend)
    assert released == pytest.approx(3 / (2 * classes), abs=1e-6)
    # The ramp has no slope at the two wrong margins: the other classes raise the winner.
    one = zero + 1
    ramp = wrong_winner(classes, MarginOffsets(one, one), "margin", backend)
    assert ramp == pytest.approx(2 - classes, abs=1e-6)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(
    ("classes", "paper", "released"), [(8, -2.0, 0.19), (19, -7.6, 0.07), (150, -79.0, -0.05)]
)
@pytest.mark.shipped_sizes
def test_wrong_winner_with_the_offsets_of_forty_million_pixels(
    classes: int, paper: float, released: float, backend: str, device: torch.device
) -> None:
    """The docstring's numbers, and its sums over the classes."""
    counts = torch.full((classes,), 40_000_000 // classes, device=device)
    offsets = MarginOffsets(*(x.double() for x in tritonloss.margin_offsets(counts)))
    for variant, stated, base, share in (
        ("paper", paper, math.log(2), 1.0),
        ("released", released, 1.0, 1 / classes),
    ):
        own, other = ((base * x[0]).sigmoid().item() for x in offsets)
        expected = own - share * (classes - 3) * other
        assert expected == pytest.approx(stated, rel=0.01, abs=0.005)
        found = wrong_winner(classes, offsets, variant, backend)
        assert found == pytest.approx(expected, abs=1e-6)


def test_the_readme_shows_a_loss_that_lowers_a_wrong_winner() -> None:
    """The README's lines run as they are, on 19 classes of 200 000 pixels each."""
    readme = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"```python\n(# label_loader.*?)```", readme, flags=re.DOTALL)
    names = {"tritonloss": tritonloss, "label_loader": torch.arange(19).repeat(200_000)}
    exec(lines, names)
    shown = names["criterion"]
    assert wrong_winner(19, MarginOffsets(shown.own, shown.other), shown.variant, "reference") > 0


@pytest.mark.parametrize(
    ("margin", "own", "other"), [(2.5, 0.0, 0.375), (1.0, 0.5, 0.75), (0.5, 0.75, 0.875)]
)
def test_margin_variant_by_hand(
    margin: float, own: float, other: float, device: torch.device
) -> None:
    """The ramp falls from 1 at a margin of 0 to 0 at rho: 2 for the own class, 4 for the others."""
    logits = torch.tensor([margin, 0.0], device=device).view(1, 2, 1, 1)
    offsets = (torch.full((2,), 2.0, device=device), torch.full((2,), 4.0, device=device))
    target = torch.zeros(1, 1, 1, dtype=torch.uint8, device=device)
    value, gradient = kernel_gradient(logits, target, offsets=offsets, variant="margin")
    assert value.item() == pytest.approx(own + other)
    slope = (0.5 if margin < 2 else 0.0) + 0.25
    assert gradient.flatten().tolist() == pytest.approx([-slope, slope])


def test_offsets_of_zero_make_a_step(device: torch.device) -> None:
    """With rho = 0, as absent classes have it, right is 0, wrong or tied is 1, and all is flat."""
    logits = torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 2.0]], device=device).view(1, 2, 1, 3)
    zero = torch.zeros(2, device=device)
    target = torch.zeros(1, 1, 3, dtype=torch.uint8, device=device)
    value, gradient = kernel_gradient(
        logits, target, offsets=(zero, zero), variant="margin", reduction="none"
    )
    assert value.flatten().tolist() == [0.0, 2.0, 2.0] and (gradient == 0).all()

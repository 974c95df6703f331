"""What docstrings say of other libraries' losses: the tables row by row."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.losses.overlap.cases import (
    LOSSES,
    Loss,
    reference_gradient,
    without_classes,
)
from tests.oracle import segmentation_case
from tritonloss.functional import dice_loss, generalized_dice_loss, soft_iou_loss, tversky_loss

S = 0.25
ROW = r"^ +\| (\S+) \| (.*) \| (.*) \|$"
MONAI = {
    dice_loss: "DiceLoss",
    generalized_dice_loss: "GeneralizedDiceLoss",
    soft_iou_loss: "DiceLoss",
    tversky_loss: "TverskyLoss",
}


def rows() -> list[Any]:
    """(loss, library, its options, options here) of every row of every table."""
    found = []
    for loss in LOSSES:
        theirs = ""
        for library, there, here in re.findall(ROW, loss.__doc__ or "", flags=re.MULTILINE):
            if library in ("library", "|---"):
                continue
            said = ", ".join(re.findall("``(.*?)``", there))
            theirs = f"{theirs}, {said}" if there.startswith("these") else said
            given = re.findall("``(.*?)``", here)[0]
            name = f"{loss.__name__}-{library}-{said}"
            found.append(pytest.param(loss, library, theirs, given, id=name))
    return found


def options_of(text: str) -> dict[str, Any]:
    return dict(eval(f"dict({text})", {"s": S}))


def monai(loss: Loss, options: dict[str, Any]) -> Callable[[Tensor, Tensor], Tensor]:
    losses = pytest.importorskip("monai.losses")
    if loss is tversky_loss:
        options = {"alpha": 0.3, "beta": 0.7, **options}
    theirs = getattr(losses, MONAI[loss])(to_onehot_y=True, softmax=True, **options)
    return lambda logits, target: theirs(logits, target[:, None])


def kornia(loss: Loss, options: dict[str, Any]) -> Callable[[Tensor, Tensor], Tensor]:
    losses = pytest.importorskip("kornia.losses")
    return lambda logits, target: losses.dice_loss(logits, target, eps=0.0, **options)


def segmentation_models(loss: Loss, options: dict[str, Any]) -> Callable[[Tensor, Tensor], Tensor]:
    """Its multiclass losses, as their source was read: absent classes have a loss of 0."""

    def theirs(logits: Tensor, target: Tensor) -> Tensor:
        p = logits.softmax(1)
        y = torch.nn.functional.one_hot(target, logits.size(1)).movedim(-1, 1).to(p)
        axes, s = (0, 2, 3), options["smooth"]
        both, all_pixels = (p * y).sum(axes), (p + y).sum(axes)
        if loss is dice_loss:
            score = (2 * both + s) / (all_pixels + s).clamp_min(1e-7)
        elif loss is soft_iou_loss:
            score = (both + s) / (all_pixels - both + s).clamp_min(1e-7)
        else:
            false = 0.3 * (p * (1 - y)).sum(axes) + 0.7 * ((1 - p) * y).sum(axes)
            score = (both + s) / (both + false + s).clamp_min(1e-7)
        return torch.where(y.sum(axes) > 0, 1 - score, 0).mean()

    return theirs


def nnunet(loss: Loss, options: dict[str, Any]) -> Callable[[Tensor, Tensor], Tensor]:
    """Its memory-efficient soft dice loss, as its source was read: a score and no loss."""

    def theirs(logits: Tensor, target: Tensor) -> Tensor:
        p = logits.softmax(1)
        y = torch.nn.functional.one_hot(target, logits.size(1)).movedim(-1, 1).to(p)
        axes, s = (0, 2, 3), options["smooth"]
        both, all_pixels = (p * y).sum(axes), (p + y).sum(axes)
        return 1 - ((2 * both + s) / (all_pixels + s).clamp_min(1e-8)).mean()

    return theirs


LIBRARIES = {
    "MONAI": monai,
    "kornia": kornia,
    "segmentation-models-pytorch": segmentation_models,
    "smp": segmentation_models,
    "nnU-Net": nnunet,
}


def test_every_docstring_has_a_table() -> None:
    found = {(row.values[0], row.values[1]) for row in rows()}
    assert {loss for loss, _ in found} == set(LOSSES) and len(rows()) == 13
    assert {library for _, library in found} == set(LIBRARIES)


@pytest.mark.parametrize(("loss", "library", "theirs", "given"), rows())
def test_both_sides_of_a_row_give_the_same(
    loss: Loss, library: str, theirs: str, given: str
) -> None:
    logits, target = segmentation_case(
        (2, 5, 12, 16), dtype=torch.float64, label_dtype=torch.int64, ignore_index=None
    )
    if library == "kornia" or loss is generalized_dice_loss:  # each class in each image
        target[:, 0, :5] = torch.arange(5)
    else:
        target = without_classes(target, 3)
    leaf = logits.clone().requires_grad_()
    expected = LIBRARIES[library](loss, options_of(theirs))(leaf, target)
    (gradient,) = torch.autograd.grad(expected, leaf)
    value, found = reference_gradient(loss, logits, target, **options_of(given))
    torch.testing.assert_close(value, expected.detach().double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(found, gradient, rtol=0, atol=1e-6 * gradient.abs().max().item())


def test_weights_of_monai() -> None:
    """Its mean divides by the number of classes."""
    losses = pytest.importorskip("monai.losses")
    logits, target = segmentation_case((2, 4, 5, 7), dtype=torch.float64, ignore_index=None)
    weight = torch.tensor([1.0, 2.0, 3.0, 0.5], dtype=torch.float64)
    theirs = losses.DiceLoss(to_onehot_y=True, softmax=True, weight=weight)
    expected = theirs(logits, target.long()[:, None])
    value, _ = reference_gradient(
        dice_loss, logits, target, per_image=True, classes="all", weight=weight
    )
    torch.testing.assert_close(value * weight.mean(), expected)

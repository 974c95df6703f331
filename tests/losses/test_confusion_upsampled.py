"""The confusion matrix and the prediction of interpolated logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tritonloss
from tests.losses.test_confusion_matrix import Recorded, counted, largest
from tests.oracle import as_layout, segmentation_case
from tritonloss import confusion_matrix, predict

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(
    ("low", "size"), [((3, 5), (12, 20)), ((5, 7), (8, 23)), ((1, 6), (9, 6)), ((4, 1), (5, 8))]
)
@pytest.mark.parametrize("classes", [1, 4, 40])
def test_interpolated_logits(
    classes: int, low: tuple[int, int], size: tuple[int, int], align_corners: bool,
    device: torch.device,
) -> None:  # fmt: skip
    """As torch interpolates, but where the two largest are nearer than rounding."""
    logits, _ = segmentation_case((2, classes, *low), device=device)
    _, target = segmentation_case((2, classes, *size), device=device)
    wide = torch.nn.functional.interpolate(
        logits.double(), size, mode="bilinear", align_corners=align_corners
    )
    against = torch.cat((wide, torch.zeros_like(wide)), 1) if classes == 1 else wide
    first, second = against.topk(2, dim=1).values.unbind(1)
    clear = first - second > 1e-5
    assert clear.float().mean() > 0.99
    target = torch.where(clear, target, 255)
    options: dict[str, Any] = {"upsample": "bilinear", "align_corners": align_corners}
    found = confusion_matrix(logits, target, **options)
    assert torch.equal(found.cpu(), counted(largest(wide), target, max(classes, 2)))
    prediction = predict(logits, size, align_corners=align_corners)
    assert torch.equal(prediction[clear].cpu().long(), largest(wide)[clear.cpu()])
    with tritonloss.use_backend("reference"):
        assert torch.equal(confusion_matrix(logits, target, **options), found)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "transposed"])
@pytest.mark.parametrize(
    ("dtype", "labels"),
    [(torch.float16, torch.int64), (torch.bfloat16, torch.int16), (torch.float64, torch.int8)],
    ids=str,
)
def test_interpolated_in_every_layout(
    dtype: torch.dtype, labels: torch.dtype, layout: str, device: torch.device
) -> None:
    """Of several programs, with voids at the border and NaN under them."""
    logits, _ = segmentation_case((2, 5, 9, 13), dtype=dtype, device=device)
    _, target = segmentation_case((2, 5, 23, 31), ignore_index=100, device=device)
    wide = torch.nn.functional.interpolate(logits.double(), (23, 31), mode="bilinear")
    first, second = wide.topk(2, dim=1).values.unbind(1)
    target = torch.where(first - second > 1e-5, target, 100)
    logits[:, 1, 0], target[:, :4] = float("nan"), 100
    given = as_layout(logits, layout), as_layout(target.to(labels), layout)
    found = confusion_matrix(*given, upsample="bilinear", ignore_index=100)
    prediction = predict(given[0], (23, 31))
    assert torch.equal(found.cpu(), counted(largest(wide), target, 5, 100))
    # Of a row of NaN all pixels see something that lie between it and the next one.
    assert (prediction[:, :3] == 1).all()


@pytest.mark.parametrize("classes", [3, 40])
def test_interpolated_far_and_not_at_all(classes: int, device: torch.device) -> None:
    """Cells of more pixels than a lane has at once; and logits of the labels' own size."""
    options: dict[str, Any] = {"upsample": "bilinear", "ignore_index": None}
    logits, _ = segmentation_case((1, classes, 2, 3), device=device)
    logits[:, classes - 1] += 1
    _, target = segmentation_case((1, classes, 21, 56), ignore_index=None, device=device)
    target = target.to(torch.int32)
    found = confusion_matrix(logits, target, **options)
    wide = torch.nn.functional.interpolate(logits, (21, 56), mode="bilinear")
    assert torch.equal(found.cpu(), counted(largest(wide), target, classes, None))

    found = confusion_matrix(wide, target, **options)
    assert torch.equal(found, confusion_matrix(wide, target, ignore_index=None))
    assert torch.equal(predict(wide, (21, 56)), predict(wide))


@pytest.mark.parametrize("align_corners", [False, True])
def test_interpolated_ties_go_to_the_first_class(align_corners: bool, device: torch.device) -> None:
    """Two classes with the same logits everywhere, and one that is nowhere larger."""
    logits, _ = segmentation_case((1, 4, 3, 4), device=device)
    logits[:, 2], logits[:, 3] = logits[:, 1], logits[:, 0] - 1
    prediction = predict(logits, (11, 13), align_corners=align_corners)
    assert set(prediction.unique().tolist()) == {0, 1}


def test_between_infinities(device: torch.device) -> None:
    """An infinite logit is that of all pixels around it, and a lowest one wins nothing."""
    logits = torch.zeros(1, 3, 2, 4, device=device)
    logits[:, 1, :, 0], logits[:, 2, :, 3] = float("inf"), -float("inf")
    prediction = predict(logits, (4, 8))
    assert (prediction[..., :3] == 1).all() and not prediction[..., 3:].any()


def test_inside_pytorch(device: torch.device) -> None:
    """The operators are sound, and compiled for any sizes."""
    torch._dynamo.reset()

    def both(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        found = confusion_matrix(logits, target, upsample="bilinear")
        return found, predict(logits, target.shape[1:])

    how = "inductor" if device.type == "cuda" else "aot_eager"
    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend=how)
    for height in (4, 6):
        logits, _ = segmentation_case((1, 3, height, 5), device=device)
        _, target = segmentation_case((1, 3, 3 * height, 13), device=device)
        expected = both(logits, target)
        results = compiled(logits, target)
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))

    with Recorded() as recorded:
        both(logits, target)
    assert len(recorded.calls) == 2
    for func, arguments in recorded.calls:
        torch.library.opcheck(func, arguments)

"""The confusion matrix and the prediction: number for number what torch and torchmetrics find."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kernels_reference
import tritonloss
from perf.measuring.memory import allocated_peak
from tests.hostile import bounds_checked, filled
from tests.oracle import LAYOUTS, as_layout, segmentation_case
from tests.ranks import of_ranks
from tritonloss import confusion_matrix, metrics, predict
from tritonloss._core import checks
from tritonloss._core.backend import INTERPRETED
from tritonloss._core.configurations import forced

pytestmark = pytest.mark.parity

LABELS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# A histogram of few pairs, the same full to the brim, pairs drawn one after the other, more classes
# than a byte holds.
CLASSES = (1, 2, 7, 32, 33, 300)


def counted(prediction: Tensor, target: Tensor, classes: int, ignore: int | None = 255) -> Tensor:
    """The matrix, one comparison after the other."""
    valid = torch.ones_like(target, dtype=torch.bool) if ignore is None else target != ignore
    pairs = zip(target[valid].tolist(), prediction[valid].tolist(), strict=True)
    matrix = torch.zeros(classes, classes, dtype=torch.int64)
    for label, found in pairs:
        if 0 <= label < classes and 0 <= found < classes:
            matrix[label, found] += 1
    return matrix


def largest(logits: Tensor) -> Tensor:
    logits = logits.detach().cpu()
    return (logits[:, 0] > 0).long() if logits.size(1) == 1 else logits.argmax(1)


def case(
    classes: int, shape: tuple[int, int, int] = (2, 7, 12), *, ignore: int | None = 255,
    device: torch.device | str = "cpu", **given: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Logits with ties, NaN and infinities, and labels."""
    images, height, width = shape
    logits, target = segmentation_case(
        (images, classes, height, width), ignore_index=ignore, label_dtype=torch.int64, **given
    )
    generator = torch.Generator().manual_seed(3)
    logits = logits.round()
    for value, share in ((float("nan"), 0.02), (float("inf"), 0.03), (-float("inf"), 0.3)):
        logits[torch.rand(logits.shape, generator=generator) < share] = value
    logits[0, :, 0] = -float("inf")
    return logits.to(device), target.to(device)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("classes", CLASSES)
def test_ties_and_numbers_that_are_none(classes: int, layout: str, device: torch.device) -> None:
    ignore = 255 if classes <= 255 else 299
    logits, target = case(classes, ignore=ignore, device=device)
    logits, target = as_layout(logits, layout), as_layout(target, layout)
    expected = counted(largest(logits), target, max(classes, 2), ignore)
    found = confusion_matrix(logits, target, ignore_index=ignore)
    assert found.dtype == torch.int64 and torch.equal(found.cpu(), expected)

    prediction = predict(logits)
    assert prediction.dtype == (torch.uint8 if classes <= 256 else torch.int32)
    assert torch.equal(prediction.cpu().long(), largest(logits))
    options = {"num_classes": max(classes, 2), "ignore_index": ignore}
    again = confusion_matrix(as_layout(prediction, layout), target, **options)
    assert torch.equal(again, found)
    with tritonloss.use_backend("reference"):
        assert torch.equal(confusion_matrix(logits, target, ignore_index=ignore), found)
        assert torch.equal(confusion_matrix(prediction, target, **options), found)
        assert torch.equal(predict(logits), prediction)


@pytest.mark.parametrize("labels", LABELS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [1, 5, 40])
def test_every_dtype(
    classes: int, dtype: torch.dtype, labels: torch.dtype, device: torch.device
) -> None:
    logits, target = case(classes, ignore=100, dtype=dtype, device=device)
    found = confusion_matrix(logits, target.to(labels), ignore_index=100)
    expected = counted(largest(logits), target, max(classes, 2), 100)
    assert torch.equal(found.cpu(), expected)
    prediction = predict(logits).to(labels)
    options = {"num_classes": max(classes, 2), "ignore_index": 100}
    assert torch.equal(confusion_matrix(prediction, target, **options), found)


@pytest.mark.parametrize("classes", [3, 40])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 17), (1, 13, 1), (2, 31, 33)], ids=str)
def test_odd_sizes(shape: tuple[int, int, int], classes: int, device: torch.device) -> None:
    """Also of several programs, whose pixels are of few pairs or of many."""
    logits, target = case(classes, shape, device=device)
    scattered = torch.randint(0, classes, target.shape, generator=torch.Generator().manual_seed(5))
    with forced("confusion_matrix_forward", {"PIXELS": 64, "num_warps": 1}):
        for labels in (target, scattered.to(device), torch.zeros_like(target)):
            found = confusion_matrix(logits, labels)
            assert torch.equal(found.cpu(), counted(largest(logits), labels, classes))


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 0, 5), (2, 4, 0)], ids=str)
def test_nothing_to_count(shape: tuple[int, int, int], device: torch.device) -> None:
    images, height, width = shape
    logits = torch.zeros(images, 3, height, width, device=device)
    target = torch.zeros(shape, dtype=torch.uint8, device=device)
    assert predict(logits).shape == shape
    assert not confusion_matrix(logits, target).any()
    assert not confusion_matrix(target, target, num_classes=3).any()


def test_all_pixels_ignored(device: torch.device) -> None:
    logits, target = case(4, ignore=2, device=device)
    assert not confusion_matrix(logits, torch.full_like(target, 255)).any()
    matrix = confusion_matrix(logits, target, ignore_index=2)
    assert not matrix[2].any() and matrix.sum() == (target != 2).sum()


def test_labels_that_nobody_looked_at(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: what is out of range is not counted, whatever its width."""
    monkeypatch.setattr(checks, "check_labels_in_range", lambda *_: None)
    logits, target = case(5, device=device)
    wild = torch.tensor([-(2**63), -(2**31), -1, 5, 2**31, 2**32 + 1, 2**63 - 1], device=device)
    prediction = predict(logits).long()
    for row, value in enumerate(wild):
        target[1, row], prediction[0, row] = value, value
    found = confusion_matrix(logits, target, ignore_index=None)
    assert torch.equal(found.cpu(), counted(largest(logits), target, 5, None))
    found = confusion_matrix(prediction, target, num_classes=5, ignore_index=None)
    assert torch.equal(found.cpu(), counted(prediction, target, 5, None))


@pytest.mark.skipif(not INTERPRETED, reason="for Triton's interpreter")
@pytest.mark.parametrize("upsample", [None, "bilinear"])
@pytest.mark.parametrize("classes", [1, 5, 40])
def test_no_access_leaves_the_tensors(
    classes: int, upsample: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever logits and labels are; the matrix and the prediction included."""
    monkeypatch.setattr(checks, "check_labels_in_range", lambda *_: None)
    logits, target = filled(torch.zeros(2, classes, 5, 6)), filled(torch.ones(2, 5, 6).long())
    count = max(classes, 2)
    target[0] = torch.arange(30).view(5, 6) % count
    if upsample is not None:
        logits = logits[..., :3, :4].clone()
    with bounds_checked():
        found = confusion_matrix(logits, target, upsample=upsample, ignore_index=None)
        prediction = predict(logits, target.shape[1:])
        labels = confusion_matrix(target, target, num_classes=count, ignore_index=None)
    assert (prediction < count).all()
    assert torch.equal(found, counted(prediction, target, count, None))
    assert torch.equal(labels, counted(target, target, count, None)) and labels.sum() == 30


@pytest.mark.parametrize("classes", [2, 40])
def test_counts_past_two_to_the_31(classes: int, device: torch.device) -> None:
    """Sums of programs are 64 bits wide: what is added to past 2^31 stays a number."""
    from tritonloss.metrics import confusion_launch

    logits, target = case(classes, device=device)
    before = torch.full((classes, classes), 2**40 + 2**31 - 3, dtype=torch.int64, device=device)
    zeros = torch.Tensor.new_zeros
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_zeros", lambda *_, **__: before.clone())
        found = confusion_launch.launch_matrix(logits, target, 255)
    assert torch.Tensor.new_zeros is zeros
    assert torch.equal(found - before, confusion_matrix(logits, target))


@pytest.mark.gpu
@pytest.mark.large
def test_more_than_two_to_the_31_pixels(device: torch.device) -> None:
    shape = (9, 16384, 16384)
    logits = torch.zeros(1, 2, 1, 1, dtype=torch.float16, device=device)
    logits[:, 1] = 1
    target = torch.ones(1, dtype=torch.uint8, device=device).expand(shape)
    found = confusion_matrix(logits.expand(9, 2, *shape[1:]), target)
    assert found.tolist() == [[0, 0], [0, 9 * 2**28]]


# --- inside PyTorch -------------------------------------------------------------------------------


class Recorded(TorchDispatchMode):
    """The calls of the package's own operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "tritonloss":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def both(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    prediction = predict(logits)
    labels = confusion_matrix(prediction, target, num_classes=3)
    return confusion_matrix(logits, target), prediction, labels


def test_opcheck(device: torch.device) -> None:
    logits, target = segmentation_case((1, 3, 3, 4), device=device)
    with tritonloss.use_backend("triton"), Recorded() as recorded:
        both(logits.requires_grad_(), target)
    assert len(recorded.calls) == 3
    with tritonloss.use_backend("triton"):
        for func, arguments in recorded.calls:
            torch.library.opcheck(func, arguments)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_compile_without_a_graph_break(backend: Any, device: torch.device) -> None:
    torch._dynamo.reset()
    how = "inductor" if device.type == "cuda" else "aot_eager"
    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend=how)
    with tritonloss.use_backend(backend):
        for height in (4, 6, 9):
            logits, target = segmentation_case((1, 3, height, 5), device=device)
            expected = both(logits, target)
            results = compiled(logits.requires_grad_(), target)
            assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_no_gradient_and_no_derivative_in_the_way(device: torch.device) -> None:
    """Labels that a network predicts for itself, inside what is differentiated."""
    logits, target = segmentation_case((1, 3, 4, 5), device=device)

    def loss(x: Tensor) -> Tensor:
        found = predict(x)
        assert not found.requires_grad
        return torch.where(found == 1, x[:, 1], 0.0).sum()

    leaf = logits.clone().requires_grad_()
    assert not confusion_matrix(leaf, target).requires_grad
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    assert torch.equal(torch.func.grad(loss)(logits), expected)
    _, tangent = torch.func.jvp(loss, (logits,), (torch.ones_like(logits),))
    assert torch.equal(tangent, expected.sum())


def test_vmap(device: torch.device) -> None:
    logits, target = segmentation_case((3, 3, 4, 5), device=device)
    found = torch.vmap(lambda x, t: confusion_matrix(x[None], t[None]))(logits, target)
    expected = [
        confusion_matrix(x, t) for x, t in zip(logits.split(1), target.split(1), strict=True)
    ]
    assert torch.equal(found, torch.stack(expected))
    assert torch.equal(torch.vmap(lambda x: predict(x[None])[0])(logits), predict(logits))


def test_without_data(device: torch.device) -> None:
    logits = torch.empty(2, 300, 4, 5, device="meta")
    target = torch.empty(2, 16, 20, device="meta", dtype=torch.uint8)
    with tritonloss.use_backend("reference"):
        found = confusion_matrix(logits, target, upsample="bilinear", ignore_index=None)
        assert found.is_meta and found.shape == (300, 300) and found.dtype == torch.int64
        prediction = predict(logits, (16, 20))
        assert prediction.shape == (2, 16, 20) and prediction.dtype == torch.int32


def test_nothing_of_the_maps_size_is_allocated(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.type != "cpu":
        pytest.skip("asks the CPU's allocator")
    monkeypatch.setattr(checks, "check_labels_in_range", lambda *_: None)  # as on a GPU
    logits, target = segmentation_case((1, 3, 64, 64))
    found = allocated_peak(lambda: confusion_matrix(logits, target))
    with tritonloss.use_backend("reference"):
        eager = allocated_peak(lambda: confusion_matrix(logits, target))
    assert found < 1024 < target.numel() < eager
    assert allocated_peak(lambda: predict(logits)) == target.numel()


# --- the module -----------------------------------------------------------------------------------


def test_the_module_adds_up_batches(device: torch.device) -> None:
    metric = metrics.ConfusionMatrix(5, ignore_index=9)
    expected = torch.zeros(5, 5, dtype=torch.int64)
    for seed in range(3):
        logits, target = segmentation_case((1, 5, 6, 7), seed=seed, ignore_index=9, device=device)
        if seed == 1:
            metric(predict(logits), target)
        else:
            metric.update(logits, target)
        expected += counted(largest(logits), target, 5, 9)
        assert torch.equal(metric.compute().cpu(), expected)
    kept = metric.compute()
    metric.reset()
    assert not metric.compute().any() and torch.equal(kept.cpu(), expected)
    assert metric.matrix.device == kept.device and not metric.state_dict()
    assert "num_classes=5" in repr(metric) and "ignore_index=9" in repr(metric)


def test_the_module_interpolates(device: torch.device) -> None:
    logits, _ = segmentation_case((1, 4, 3, 4), device=device)
    _, target = segmentation_case((1, 4, 12, 16), device=device)
    metric = metrics.ConfusionMatrix(4, upsample="bilinear", align_corners=True)
    metric.update(logits, target)
    options: dict[str, Any] = {"upsample": "bilinear", "align_corners": True}
    assert torch.equal(metric.compute(), confusion_matrix(logits, target, **options))


def count_on_one_rank(rank: int) -> tuple[Tensor, Tensor]:
    metric = metrics.ConfusionMatrix(3)
    metric.update(torch.full((1, 2, 2), rank), torch.full((1, 2, 2), 2))
    metric.all_reduce()
    everywhere = metric.compute()
    metric.all_reduce(torch.distributed.group.WORLD)
    return everywhere, metric.compute()


def test_process_groups(tmp_path: Path) -> None:
    for everywhere, again in of_ranks(2, count_on_one_rank, tmp_path):
        assert everywhere.tolist() == [[0, 0, 0], [0, 0, 0], [4, 4, 0]]
        assert torch.equal(again, 2 * everywhere)


# --- scores ---------------------------------------------------------------------------------------


def test_scores_by_hand() -> None:
    """Class 2 is absent; class 3 has labels, and is never predicted."""
    matrix = torch.tensor([[3, 1, 0, 0], [0, 4, 0, 0], [0, 0, 0, 0], [2, 0, 0, 0]])
    nan = float("nan")
    found = [metrics.iou_per_class(matrix), metrics.dice_per_class(matrix)]
    wanted = [[3 / 6, 4 / 5, nan, 0.0], [6 / 9, 8 / 9, nan, 0.0]]
    for scores, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(
            scores, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=0, equal_nan=True
        )
    assert metrics.mean_iou(matrix).item() == pytest.approx((0.5 + 0.8) / 3, abs=1e-15)
    assert metrics.pixel_accuracy(matrix).item() == 7 / 10
    nothing = torch.zeros(3, 3, dtype=torch.int64)
    assert metrics.mean_iou(nothing).isnan() and metrics.pixel_accuracy(nothing).isnan()
    assert metrics.iou_per_class(nothing).isnan().all()


def test_a_rare_class_beside_very_many_pixels() -> None:
    matrix = torch.tensor([[2**60, 0], [1, 1]])
    assert metrics.iou_per_class(matrix)[1] == 0.5
    assert metrics.dice_per_class(matrix)[1] == 2 / 3


@pytest.mark.parametrize("ignore", [None, 255, 1])
@pytest.mark.parametrize("classes", [2, 7])
def test_torchmetrics(classes: int, ignore: int | None, device: torch.device) -> None:
    library = pytest.importorskip("torchmetrics.classification")
    options = {"num_classes": classes, "ignore_index": ignore}
    of_matrix = library.MulticlassConfusionMatrix(**options).to(device)
    of_classes = library.MulticlassJaccardIndex(average=None, **options).to(device)
    of_all = library.MulticlassJaccardIndex(**options).to(device)
    metric = metrics.ConfusionMatrix(classes, ignore_index=ignore)
    for seed in range(3):
        logits, target = segmentation_case(
            (2, classes, 9, 11), seed=seed, ignore_index=ignore, label_dtype=torch.int64,
            device=device,
        )  # fmt: skip
        for theirs in (of_matrix, of_classes, of_all):
            theirs.update(logits, target)
        metric.update(logits, target)
    matrix = metric.compute()
    assert torch.equal(of_matrix.compute(), matrix)
    # There absent classes are 0, and scores float32.
    scores = metrics.iou_per_class(matrix).float().nan_to_num(0.0)
    assert torch.equal(of_classes.compute(), scores)
    if ignore != 1:  # a class that torchmetrics leaves out of the mean, wherever it is predicted
        torch.testing.assert_close(of_all.compute(), metrics.mean_iou(matrix).float())


# --- errors ---------------------------------------------------------------------------------------

LOGITS = torch.zeros(2, 3, 4, 5)
TARGET = torch.zeros(2, 4, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("kind", "message", "given"),
    [
        (ValueError, "logits must be .* or integer labels of shape", {"logits": TARGET[0]}),
        (TypeError, "logits must be .*; got bool", {"logits": TARGET.bool()}),
        (ValueError, "num_classes must be given", {"logits": TARGET}),
        (ValueError, "num_classes must be 3 or None .*; got 5", {"num_classes": 5}),
        (ValueError, "num_classes must be .*; got 0", {"num_classes": 0}),
        (TypeError, "num_classes must be .*; got 2.0", {"num_classes": 2.0}),
        (ValueError, "target must .* to match", {"target": TARGET[:, 1:]}),
        (TypeError, "target must .*; got float32", {"target": TARGET.float()}),
        (ValueError, "target must hold labels from 0 to 2 .*3 \\(40x\\)", {"target": TARGET + 3}),
        (ValueError, "logits must hold labels from 0 to 2 .*4 \\(40x\\)",
         {"logits": TARGET + 4, "num_classes": 3}),
        (ValueError, "upsample must be .*'nearest'", {"upsample": "nearest"}),
        (TypeError, "align_corners must be", {"upsample": "bilinear", "align_corners": 1}),
        (TypeError, "ignore_index must be", {"ignore_index": "255"}),
        (ValueError, "ignore_index must be given for 300", {"logits": TARGET, "num_classes": 300}),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_wrong_arguments(kind: type[Exception], message: str, given: dict[str, Any]) -> None:
    arguments = {"logits": LOGITS, "target": TARGET, **given}
    with pytest.raises(kind, match=f"^{message}"):
        confusion_matrix(**arguments)


@pytest.mark.parametrize(
    ("kind", "message", "given"),
    [
        (ValueError, "size must be .* H of at least 4 .* W of at least 5", {"size": (3, 9)}),
        (ValueError, "size must be", {"size": (8, 9, 10)}),
        (TypeError, "size must be", {"size": 8}),
        (TypeError, "size must be", {"size": (8.0, 10)}),
        (ValueError, "size must be .* upsample", {"size": (8, 10), "upsample": None}),
        (ValueError, "upsample must be", {"upsample": "nearest"}),
        (TypeError, "align_corners must be", {"align_corners": 1}),
        (TypeError, "logits must be .*; got int64", {"logits": TARGET[None]}),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_wrong_sizes(kind: type[Exception], message: str, given: dict[str, Any]) -> None:
    with pytest.raises(kind, match=f"^{message}"):
        predict(**{"logits": LOGITS, **given})


def test_wrong_matrices_and_modules() -> None:
    for score in (metrics.iou_per_class, metrics.mean_iou, metrics.dice_per_class,
                  metrics.pixel_accuracy):  # fmt: skip
        with pytest.raises(TypeError, match="^matrix must be a tensor of integers; got float32"):
            score(torch.ones(2, 2))
        with pytest.raises(ValueError, match=r"^matrix must hold counts .* got shape \(2, 3\)"):
            score(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="^num_classes must be"):
        metrics.ConfusionMatrix(0)
    with pytest.raises(ValueError, match="^ignore_index must be given for 300"):
        metrics.ConfusionMatrix(300)
    with pytest.raises(ValueError, match="^num_classes must be 3"):
        metrics.ConfusionMatrix(4).update(LOGITS, TARGET)


def test_the_references_are_public() -> None:
    assert torch.equal(kernels_reference.predict(LOGITS), torch.zeros_like(TARGET).byte())

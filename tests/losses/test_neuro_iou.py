"""NeuroIoU: the sums against a count pixel by pixel, the surrogate, and the loss of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kernels_reference
import tritonloss
from tests.oracle import LAYOUTS, ROUNDING, as_layout, segmentation_case
from tritonloss import IoUPairs, IoUSurrogate, collect_iou_pairs, fit_iou_surrogate
from tritonloss._engine import pixel_grid
from tritonloss.functional import neuro_iou_loss
from tritonloss.overlap.iou_surrogate import fit_network
from tritonloss.overlap.neuro_iou import membership_sums

pytestmark = pytest.mark.parity

CLASSES = (1, 2, 7, 40)
SCORES = ("probability", "hinge")


def summed(logits: Tensor, target: Tensor, score: str, ignore: int | None) -> tuple[Tensor, Tensor]:
    """The sums and counts, one pixel after the other."""
    images, classes = logits.shape[:2]
    sums = torch.zeros(images, classes, 3, dtype=torch.float64)
    counts = torch.zeros(images, classes, 3, dtype=torch.int64)
    for image in range(images):
        z = logits[image].double().flatten(1)
        p = z.sigmoid() if classes == 1 else z.softmax(0)
        for i, label in enumerate(target[image].flatten().tolist()):
            if label == ignore or not 0 <= label < max(classes, 2):
                continue
            for c in range(classes):
                has = label == 1 if classes == 1 else label == c
                found = z[0, i] > 0 if classes == 1 else int(z[:, i].argmax()) == c
                if not has and not found:
                    continue
                place = 0 if has and found else 1 if found else 2
                hinge = max(0.0, 1 - float(z[c, i])) if has else max(0.0, 1 + float(z[c, i]))
                sums[image, c, place] += p[c, i] if score == "probability" else hinge
                counts[image, c, place] += 1
    return sums, counts


def fitted_like(inputs: int = 3, score: str = "probability") -> IoUSurrogate:
    """A network whose outputs depend on all inputs."""
    torch.manual_seed(1)
    surrogate = IoUSurrogate(inputs, score=score, layers=2, nodes=16)
    surrogate.scale.fill_(4.0)
    return surrogate.requires_grad_(False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_sums_and_their_gradient(
    score: str, classes: int, layout: str, dtype: torch.dtype, device: torch.device
) -> None:
    logits, target = segmentation_case((2, classes, 7, 12), dtype=dtype, device=device)
    logits[0, :, 0, :2] = float("nan")
    target[0, 0, :2] = 255
    logits, target = as_layout(logits, layout), as_layout(target, layout)
    leaf = logits.clone().requires_grad_() if layout == "contiguous" else logits.requires_grad_()
    sums, counts = membership_sums(leaf, target, score=score, ignore_index=255)
    upstream = torch.linspace(-1, 2, sums.numel()).view(sums.shape).to(sums)
    (gradient,) = torch.autograd.grad(sums, leaf, upstream)
    assert gradient.dtype == dtype and counts.dtype == torch.int64

    expected, expected_counts = summed(logits.detach().cpu(), target.cpu(), score, 255)
    assert torch.equal(counts.cpu(), expected_counts)
    torch.testing.assert_close(sums.detach().cpu().double(), expected, rtol=2e-6, atol=2e-6)
    truth = logits.detach().double().requires_grad_()
    found = kernels_reference.membership_sums(truth, target, score=score)
    (right,) = torch.autograd.grad(found.sums, truth, upstream.double())
    assert (gradient.double() - right).abs().max() <= ROUNDING[dtype] * right.abs().max()


@pytest.mark.parametrize("programs", [1024, 3])
def test_the_same_class_in_many_tiles_and_the_same_bits(
    programs: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With few programs each has several tiles, and the last one fewer."""
    monkeypatch.setattr(pixel_grid, "PROGRAMS", programs)
    logits, target = segmentation_case((2, 5, 70, 90 + programs % 7), device=device)
    first = membership_sums(logits, target, score="probability", ignore_index=255)
    again = membership_sums(logits, target, score="probability", ignore_index=255)
    truth = kernels_reference.membership_sums(logits.double(), target)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(first[1], truth.counts)
    torch.testing.assert_close(first[0].double(), truth.sums, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("label_dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("inputs", [3, 6])
@pytest.mark.parametrize("score", SCORES)
def test_the_loss_is_the_references(
    score: str, inputs: int, label_dtype: torch.dtype, device: torch.device
) -> None:
    surrogate = fitted_like(inputs, score).to(device)
    logits, target = segmentation_case((2, 5, 9, 13), device=device, label_dtype=label_dtype)
    leaf = logits.requires_grad_()
    value = neuro_iou_loss(leaf, target, surrogate)
    (gradient,) = torch.autograd.grad(value, leaf)
    truth = logits.detach().double().requires_grad_()
    expected = kernels_reference.neuro_iou_loss(truth, target, surrogate)
    (right,) = torch.autograd.grad(expected, truth)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)
    assert (gradient.double() - right).abs().max() <= 4e-6 * right.abs().max()
    assert all(parameter.grad is None for parameter in surrogate.parameters())


@pytest.mark.parametrize("classes", [1, 4])
@pytest.mark.parametrize("score", SCORES)
def test_compiled(score: str, classes: int, device: torch.device) -> None:
    """Some save no map for the backward pass, or one: to compiled code the others are empty."""
    torch._dynamo.reset()
    surrogate = fitted_like(3, score).to(device)
    logits, target = segmentation_case((1, classes, 5, 7), device=device)
    results = []
    for function in (
        neuro_iou_loss,
        torch.compile(neuro_iou_loss, fullgraph=True, backend="aot_eager"),
    ):
        leaf = logits.clone().requires_grad_()
        with tritonloss.use_backend("triton"):
            value = function(leaf, target, surrogate)
        results.append((value.detach(), torch.autograd.grad(value, leaf)[0]))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_volumes_and_sequences(backend: str, device: torch.device) -> None:
    """Their sums are those of images with as many pixels, and are divided by that number."""
    surrogate = fitted_like(6).to(device)
    for classes in (1, 4):
        logits, target = segmentation_case((2, classes, 12, 5), device=device)
        shapes = (
            (logits.unflatten(2, (3, 4)), target.unflatten(1, (3, 4))),
            (logits.flatten(2), target.flatten(1)),
        )
        with tritonloss.use_backend(backend):
            leaf = logits.clone().requires_grad_()
            expected = neuro_iou_loss(leaf, target, surrogate)
            (right,) = torch.autograd.grad(expected, leaf)
            for given, labels in shapes:
                leaf = given.clone().requires_grad_()
                value = neuro_iou_loss(leaf, labels, surrogate)
                (gradient,) = torch.autograd.grad(value, leaf)
                torch.testing.assert_close(value, expected)
                torch.testing.assert_close(gradient.reshape(right.shape), right)
    pairs = collect_iou_pairs([(shapes[0][0], shapes[0][1])])
    assert set(pairs.pixels.tolist()) == {60}


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_no_valid_pixel(backend: str, device: torch.device) -> None:
    logits = torch.randn(2, 3, 5, 6, device=device, requires_grad=True)
    target = torch.full((2, 5, 6), 255, device=device)
    with tritonloss.use_backend(backend):
        value = neuro_iou_loss(logits, target, fitted_like().to(device))
        value.backward()
    assert value == 0 and logits.grad is not None and not logits.grad.any()


def test_wrong_arguments() -> None:
    logits, target = torch.randn(1, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64)
    wrong: Any = torch.nn.Linear(3, 1)
    with pytest.raises(TypeError, match="surrogate must be an IoUSurrogate; got Linear"):
        neuro_iou_loss(logits, target, wrong)
    with pytest.raises(ValueError, match="surrogate must be on the device of logits, cpu"):
        neuro_iou_loss(logits, target, IoUSurrogate().to("meta"))
    with pytest.raises(ValueError, match="from 2 to 1024 classes"):
        neuro_iou_loss(torch.randn(1, 1025, 4, 4), target, IoUSurrogate(), ignore_index=None)
    for options in ({"inputs": 4}, {"score": "margin"}, {"layers": 0}, {"activation": "relu"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            IoUSurrogate(**options)  # type: ignore[arg-type]
    few = IoUPairs(torch.rand(3, 3), torch.ones(3, 3, dtype=torch.int64), torch.ones(3))
    with pytest.raises(ValueError, match="at least 10 examples; got 3"):
        fit_iou_surrogate(few)


# --- the surrogate --------------------------------------------------------------------------------


def made_pairs(count: int = 400) -> IoUPairs:
    """Examples as a network gives them: right pixels surer than wrong ones."""
    generator = torch.Generator().manual_seed(2)
    sizes = torch.randint(20, 2000, (count, 1), generator=generator)
    counts = (sizes * torch.rand(count, 3, generator=generator)).long() + 1
    usual = torch.tensor([0.9, 0.6, 0.3])
    sums = counts * (usual + 0.02 * torch.randn(count, 3, generator=generator))
    return IoUPairs(sums, counts, torch.full((count,), 9216))


def test_a_fit_learns_the_iou_and_says_its_error(capfd: pytest.CaptureFixture[str]) -> None:
    pairs = made_pairs()
    fit = fit_iou_surrogate(pairs, inputs=6, steps=400, batch=64)
    assert "done" in capfd.readouterr().err
    assert fit.truth.numel() == fit.predicted.numel() == 80
    error = (fit.truth - fit.predicted).square().mean().sqrt()
    assert fit.error == pytest.approx(float(error)) and fit.error < 0.06 < pairs.iou_loss().std()
    assert not any(parameter.requires_grad for parameter in fit.surrogate.parameters())
    again = fit_iou_surrogate(pairs, inputs=6, steps=400, batch=64, progress=False)
    assert again.error == fit.error


def test_a_saved_surrogate_is_the_same(tmp_path: Path) -> None:
    surrogate = fitted_like(6, "hinge")
    surrogate.save(tmp_path / "surrogate.pt")
    again = IoUSurrogate.load(tmp_path / "surrogate.pt")
    sums, counts = torch.rand(4, 3), torch.randint(0, 5, (4, 3))
    assert repr(again) == repr(surrogate)
    assert torch.equal(again(sums, counts, 100), surrogate(sums, counts, 100))


def test_pairs_of_a_network_are_those_of_its_logits() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout(0.5))
    images, target = torch.randn(2, 3, 6, 7), torch.randint(0, 4, (2, 6, 7))
    target[1] = 255
    target[1, 0] = 2
    pairs = collect_iou_pairs(network, [(images, target)], score="hinge")
    assert network.training and network[1].training
    logits = network.eval()(images).detach()
    expected = collect_iou_pairs(iter([(logits, target)]), score="hinge")
    assert all(torch.equal(a, b) for a, b in zip(pairs[:3], expected[:3], strict=True))
    assert pairs.sums.shape == (5, 3) and set(pairs.pixels.tolist()) == {42}
    sums, counts = summed(logits, target, "hinge", 255)
    present = counts[..., 0] + counts[..., 2] > 0
    torch.testing.assert_close(pairs.sums.double(), sums[present])
    union = counts[present].sum(1)
    torch.testing.assert_close(pairs.iou_loss(), (1 - counts[present][:, 0] / union).float())


def test_a_network_approximates_a_function_with_a_jump() -> None:
    """The paper's figure 2: one hidden layer, 2 - x below 1 and x + 0.1 from there on."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(1, 50), nn.Tanh(), nn.Linear(50, 1))
    x = torch.linspace(0, 2, 401).unsqueeze(1)
    y = torch.where(x < 1, 2 - x, x + 0.1)
    fit_network(
        lambda given: network(given),
        list(network.parameters()),
        (x, y),
        steps=2000,
        batch=401,
        learning_rate=3e-2,
        generator=torch.Generator(),
        progress=False,
    )
    leaf = x.clone().requires_grad_()
    found = network(leaf)
    (slope,) = torch.autograd.grad(found.sum(), leaf)
    away = (x - 1).abs() >= 0.2
    expected = torch.where(x < 1, -1.0, 1.0)
    assert (found - y).abs()[away].max() < 0.04 and (found - y).abs().mean() < 0.02
    assert (slope - expected).abs()[away].max() < 0.4
    assert (slope - expected).abs()[away].mean() < 0.1
    assert -1 < slope[200] < 1  # at the jump, which the paper points out

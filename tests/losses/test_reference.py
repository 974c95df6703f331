"""The reference against formulas written a second time, and the numbers the papers print."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import kernels_reference
from tests.oracle import segmentation_case

F64 = torch.float64


def naive_window(window_size: int, sigma: float) -> Tensor:
    offsets = torch.arange(window_size, dtype=F64) - window_size // 2
    weights = torch.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / (2 * sigma**2))
    return weights / weights.sum()


def naive_mean(x: Tensor, window_size: int, sigma: float, padding: str) -> Tensor:
    reach = window_size // 2
    if padding == "zeros":
        x = F.pad(x, (reach,) * 4)
    elif padding != "valid":
        x = F.pad(x, (reach,) * 4, mode=padding)
    kernel = naive_window(window_size, sigma).expand(x.shape[1], 1, -1, -1)
    return F.conv2d(x, kernel, groups=x.shape[1])


def naive_covariance(x: Tensor, y: Tensor, *window: object) -> Tensor:
    return naive_mean(x * y, *window) - naive_mean(x, *window) * naive_mean(y, *window)


def naive_structural_similarity_loss(
    logits: Tensor,
    target: Tensor,
    *,
    window_size: int,
    beta: float,
    bce_weight: float,
    hard_mining: bool,
    reweight: bool,
    ignore_index: int | None,
    sigma: float = 1.5,
    stability: float = 0.01,
) -> tuple[Tensor, Tensor]:
    """(loss, closed-form gradient) in loops over pixels, with zero padding."""
    batch, classes, height, width = logits.shape
    reach = window_size // 2
    weights = naive_window(window_size, sigma)
    centre = weights[reach, reach].item()
    largest = 2 * (1 - centre) / (math.sqrt(centre * (1 - centre)) + stability)
    z, t = logits.tolist(), target.tolist()
    valid = torch.tensor(
        [[[0 <= v < classes and v != ignore_index for v in row] for row in image] for image in t]
    )

    def normalized(image: Tensor, row: int, column: int) -> float:
        values = torch.zeros(window_size, window_size, dtype=F64)
        for i in range(window_size):
            for j in range(window_size):
                r, c = row + i - reach, column + j - reach
                if 0 <= r < height and 0 <= c < width:
                    values[i, j] = image[r, c]
        mean = (weights * values).sum().item()
        deviation = (weights * (values - mean) ** 2).sum().sqrt().item()
        return (image[row, column].item() - mean + stability) / (deviation + stability)

    bce_sum = ssl_sum = 0.0
    samples = []
    for n in range(batch):
        for k in range(classes):
            y = torch.tensor([[float(v == k) for v in row] for row in t[n]], dtype=F64) * valid[n]
            p = (
                torch.tensor([[1 / (1 + math.exp(-v)) for v in row] for row in z[n][k]], dtype=F64)
                * valid[n]
            )
            for r in range(height):
                for c in range(width):
                    if not valid[n, r, c]:
                        continue
                    bce = math.log1p(math.exp(z[n][k][r][c])) - y[r, c].item() * z[n][k][r][c]
                    bce_sum += bce
                    e = abs(normalized(y, r, c) - normalized(p, r, c))
                    if not hard_mining or e > beta * largest:
                        weight = e if reweight else 1.0
                        ssl_sum += weight * bce
                        samples.append((n, k, r, c, weight))
    pixels, hard = max(int(valid.sum()), 1), max(len(samples), 1)
    one_hot = (target[:, None] == torch.arange(classes).view(1, -1, 1, 1)) & valid[:, None]
    scale = bce_weight / pixels * valid[:, None].to(F64).expand(logits.shape).clone()
    for *sample, weight in samples:
        scale[tuple(sample)] += (1 - bce_weight) * weight / hard
    loss = bce_weight * bce_sum / pixels + (1 - bce_weight) * ssl_sum / hard
    return torch.tensor(loss, dtype=F64), (logits.sigmoid() - one_hot.to(F64)) * scale


@pytest.mark.parametrize("padding", ["zeros", "reflect", "replicate", "valid"])
@pytest.mark.parametrize("window_size", [1, 3, 5, 11])
def test_statistics_are_the_window_s_moments(window_size: int, padding: str) -> None:
    x = torch.randn(2, 3, 13, 17, dtype=F64)
    mean, variance = kernels_reference.gaussian_statistics(x, window_size, 1.2, padding)
    window = (window_size, 1.2, padding)
    torch.testing.assert_close(mean, naive_mean(x, *window), rtol=0, atol=1e-13)
    torch.testing.assert_close(variance, naive_covariance(x, x, *window), rtol=0, atol=1e-13)


@pytest.mark.parametrize("window_size", [1, 3, 7, 31])
def test_window_is_a_normalised_gaussian(window_size: int) -> None:
    weights = kernels_reference.gaussian_window(window_size, 0.8)
    assert sum(weights) == pytest.approx(1, abs=1e-15)
    assert weights == weights[::-1]
    separable = torch.outer(*[torch.tensor(weights, dtype=F64)] * 2)
    torch.testing.assert_close(separable, naive_window(window_size, 0.8), rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("window_size", "hard_mining", "reweight", "ignore_index"),
    [(3, True, True, 255), (5, True, True, 1), (3, False, True, None), (3, True, False, 255)],
)
def test_loss_is_the_paper_s(
    window_size: int, hard_mining: bool, reweight: bool, ignore_index: int | None
) -> None:
    logits, target = segmentation_case((2, 3, 6, 7), dtype=F64, label_dtype=torch.int64)
    options = {
        "window_size": window_size,
        "hard_mining": hard_mining,
        "reweight": reweight,
        "ignore_index": ignore_index,
        "bce_weight": 0.3,
        "beta": 0.2,
    }
    expected, expected_gradient = naive_structural_similarity_loss(logits, target, **options)
    logits.requires_grad_()
    loss = kernels_reference.structural_similarity_loss(logits, target, **options)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-13)


@pytest.mark.parametrize("padding", ["reflect", "replicate", "valid"])
def test_loss_pads_as_told(padding: str) -> None:
    logits, target = segmentation_case((1, 2, 9, 8), dtype=F64)
    one_hot = (target[:, None] == torch.arange(2).view(1, -1, 1, 1)).to(F64)
    p = torch.where((target < 2)[:, None], logits.sigmoid(), 0)
    reach = 2 if padding == "valid" else 0

    def normalized(x: Tensor) -> Tensor:
        mean = naive_mean(x, 5, 1.5, padding)
        deviation = naive_covariance(x, x, 5, 1.5, padding).clamp(min=0).sqrt()
        return (x[..., reach : 9 - reach, reach : 8 - reach] - mean + 0.01) / (deviation + 0.01)

    e = kernels_reference.structural_difference(logits, target, window_size=5, padding=padding)
    expected = (normalized(one_hot) - normalized(p)).abs()
    # Flat windows: the naive variance is off by 1e-17, its root by 3e-9, against a C4 of 0.01.
    torch.testing.assert_close(e, expected, rtol=1e-5, atol=1e-5)


def test_window_of_one_pixel_weighs_by_the_error() -> None:
    logits, target = segmentation_case((1, 2, 5, 6), dtype=F64)
    valid = (target != 255)[:, None]
    y = (target[:, None] == torch.arange(2).view(1, -1, 1, 1)).to(F64)
    e = torch.where(valid, (y - logits.sigmoid()).abs(), 0)
    hard = e > 0.1
    bce = F.binary_cross_entropy_with_logits(logits, y, reduction="none")
    loss = kernels_reference.structural_similarity_loss(
        logits, target, window_size=1, bce_weight=0.0
    )
    torch.testing.assert_close(loss, (e * hard * bce).sum() / hard.sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("form", ["full", "contrast_structure"])
def test_ssim_is_wang_s(form: str) -> None:
    window = (5, 1.5, "zeros")
    logits, target = segmentation_case((2, 3, 9, 8), dtype=F64)
    valid = (target != 255)[:, None].to(F64)
    y = (target[:, None] == torch.arange(3).view(1, -1, 1, 1)).to(F64)
    logits.requires_grad_()
    x = logits.sigmoid() * valid
    mean_x, mean_y = naive_mean(x, *window), naive_mean(y, *window)
    similarity = (2 * naive_covariance(x, y, *window) + 9e-4) / (
        naive_covariance(x, x, *window) + naive_covariance(y, y, *window) + 9e-4
    )
    if form == "full":
        similarity = similarity * (2 * mean_x * mean_y + 1e-4) / (mean_x**2 + mean_y**2 + 1e-4)
    expected = ((1 - similarity) * valid).sum() / (3 * valid.sum())
    loss = kernels_reference.ssim_loss(logits, target, form=form, window_size=5)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-13)


def test_ssim_is_scikit_image_s() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    x, y = torch.rand(2, 1, 1, 24, 20, dtype=F64)
    _, expected = metrics.structural_similarity(
        x[0, 0].numpy(),
        y[0, 0].numpy(),
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=1.0,
        full=True,
    )
    similarity = kernels_reference.ssim(x, y, padding="valid", reduction="none")
    torch.testing.assert_close(
        similarity[0, 0], torch.from_numpy(expected)[5:-5, 5:-5], rtol=0, atol=1e-12
    )


def test_gradients_are_those_of_the_values() -> None:
    x, y = torch.rand(2, 1, 1, 5, 4, dtype=F64).requires_grad_().unbind()
    target = torch.tensor([[[0, 0, 1, 1]] * 4 + [[255, 1, 1, 0]]])
    for padding in ("zeros", "reflect", "replicate", "valid"):
        assert torch.autograd.gradcheck(
            lambda x, padding=padding: kernels_reference.gaussian_statistics(x, 3, 1.5, padding), x
        )
    assert torch.autograd.gradcheck(
        lambda x, y: kernels_reference.ssim(x, y, window_size=3, reduction="none"), (x, y)
    )
    assert torch.autograd.gradcheck(lambda x: kernels_reference.ssim_loss(x, target), x)
    # With e frozen the loss has the gradient that autograd gives; a live e would have another.
    assert torch.autograd.gradcheck(
        lambda x: kernels_reference.structural_similarity_loss(x, target, reweight=False), x
    )


def test_figure_2_of_the_paper() -> None:
    y = torch.tensor([[0, 0, 0], [1, 0, 1], [1, 1, 1]])
    p = torch.tensor([[0.1, 0.1, 0.1], [0.8, 0.8, 0.9], [0.8, 0.9, 0.8]], dtype=F64)
    bce = -torch.where(y == 1, p, 1 - p).log()
    assert bce.sum().item() == pytest.approx(2.805, abs=1e-3)
    assert bce[1, 1].item() / bce.sum().item() == pytest.approx(0.57, abs=5e-3)

    # Wrapped around, every 3 x 3 window holds the whole patch: its statistics, at each pixel.
    logits = F.pad(p.logit()[None, None], (1, 1, 1, 1), mode="circular")
    target = F.pad(y[None, None].to(F64), (1, 1, 1, 1), mode="circular")[0].to(torch.uint8)
    e = kernels_reference.structural_difference(
        torch.cat((-logits, logits), 1), target, sigma=1e6, stability=0.0, padding="valid"
    )
    weighted = e[0, 1] * bce
    assert weighted.sum().item() == pytest.approx(3.060, abs=5e-4)
    assert weighted[1, 1].item() / weighted.sum().item() == pytest.approx(0.91, abs=5e-3)


@pytest.mark.parametrize(
    ("window_size", "expected"),
    [(1, 1.0), (3, 4.6716), (5, 6.322), (7, 6.850), (9, 6.961), (11, 6.976)],
)
def test_largest_difference(window_size: int, expected: float) -> None:
    largest = kernels_reference.largest_difference(window_size, 1.5, 0.01)
    assert largest == pytest.approx(expected, abs=6e-4)
    # Attained where the label is a lone 1 among zeros and the prediction a lone 0 among ones.
    middle, size = window_size, 2 * window_size + 1
    target = torch.zeros(1, size, size, dtype=torch.uint8)
    target[0, middle, middle] = 1
    logits = torch.full((1, 2, size, size), 60.0, dtype=F64)
    logits[0, 1, middle, middle] = -60.0
    e = kernels_reference.structural_difference(logits, target, window_size=window_size)
    assert e[0, 1, middle, middle].item() == pytest.approx(largest, rel=1e-12)


def test_labels_never_wrap_around() -> None:
    logits = torch.randn(1, 64, 2, 3)
    for outside in (300, 256, 2**32 + 1, -1, -212):
        target = torch.full((1, 2, 3), outside)
        loss = kernels_reference.structural_similarity_loss(logits, target)
        assert loss.item() == 0
    # 44 is 300 in eight bits: as an ignore label 300 must not hide it.
    target = torch.full((1, 2, 3), 44, dtype=torch.uint8)
    loss = kernels_reference.structural_similarity_loss(logits, target, ignore_index=300)
    assert loss.item() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_values_are_float32_or_better(dtype: torch.dtype) -> None:
    logits, target = segmentation_case((1, 2, 6, 5), dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    for function in (kernels_reference.structural_similarity_loss, kernels_reference.ssim_loss):
        leaf = logits.clone().requires_grad_()
        loss = function(leaf, target)
        loss.backward()
        assert loss.dtype == wide and leaf.grad is not None and leaf.grad.dtype == dtype
    assert all(s.dtype == wide for s in kernels_reference.gaussian_statistics(logits))
    assert kernels_reference.ssim(logits, logits).dtype == wide

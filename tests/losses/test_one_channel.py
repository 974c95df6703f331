"""Logits of one channel: a binary mask, y = (label == 1), for every loss that takes them.

The oracles are written out here in float64, from float masks and torch's own functions: nothing of
the package or of its reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import tritonloss
from tests.oracle import LAYOUTS, as_layout
from tests.slices import one_of_each
from tritonloss import IoUSurrogate
from tritonloss._core import checks
from tritonloss.functional import (
    binary_cross_entropy,
    lovasz_hinge_loss,
    neuro_iou_loss,
    rmi_loss,
    ssim_loss,
    structural_similarity_loss,
)

Oracle = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def programs_for_the_interpreter(small_programs: dict[str, int]) -> None:
    """Programs of 64 columns and 8 rows."""


def mask_case(
    shape: tuple[int, int, int] = (1, 7, 9), *, ignored: float = 0.1, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Logits [N, 1, H, W] in float64 and labels 0 and 1 in flat areas, some of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    batch, height, width = shape
    coarse = torch.rand((batch, height // 4 + 1, width // 4 + 1), generator=generator) < 0.5
    target = coarse.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, :height, :width].long()
    logits = 2 * torch.randn((batch, 1, height, width), generator=generator, dtype=torch.float64)
    logits += 3 * target[:, None] - 1
    target[torch.rand(target.shape, generator=generator) < ignored] = 255
    return logits, target


# The oracles take logits and the masks y and m, floating-point [N, 1, H, W].


def entropy_oracle(z: Tensor, y: Tensor, m: Tensor) -> Tensor:
    entropy = F.binary_cross_entropy_with_logits(z, y, reduction="none")
    return (entropy * m).sum() / m.sum()


def moments(x: Tensor, y: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Means, variances and covariance under a Gaussian window of sigma 1.5, zeros around."""
    place = torch.arange(size, dtype=torch.float64) - size // 2
    line = torch.exp(-place.square() / 4.5)
    window = torch.outer(line, line).view(-1, 1)
    window = window / window.sum()
    xs, ys = (F.unfold(values, size, padding=size // 2) for values in (x, y))
    mean_x, mean_y = ((window * values).sum(1, keepdim=True) for values in (xs, ys))
    xs, ys = xs - mean_x, ys - mean_y
    spreads = ((window * a * b).sum(1) for a, b in ((xs, xs), (ys, ys), (xs, ys)))
    return tuple(part.reshape(x.shape) for part in (mean_x, mean_y, *spreads))


def ssim_oracle(z: Tensor, y: Tensor, m: Tensor, form: str = "full", size: int = 5) -> Tensor:
    mean_x, mean_y, var_x, var_y, both = moments(z.sigmoid() * m, y, size)
    similarity = (2 * both + 9e-4) / (var_x + var_y + 9e-4)
    if form == "full":
        squares = mean_x.square() + mean_y.square()
        similarity = similarity * (2 * mean_x * mean_y + 1e-4) / (squares + 1e-4)
    return ((1 - similarity) * m).sum() / m.sum()


def ssl_oracle(z: Tensor, y: Tensor, m: Tensor, size: int = 3) -> Tensor:
    with torch.no_grad():
        p = z.sigmoid() * m
        mean_p, mean_y, var_p, var_y, _ = moments(p, y, size)
        normal_p = (p - mean_p + 0.01) / (var_p.sqrt() + 0.01)
        normal_y = (y - mean_y + 0.01) / (var_y.sqrt() + 0.01)
        e = (normal_y - normal_p).abs()
        delta = torch.zeros(1, 1, size, size, dtype=torch.float64)
        delta[..., size // 2, size // 2] = 1
        centre = moments(delta, delta, size)[0][0, 0, size // 2, size // 2]
        largest = 2 * (1 - centre) / ((centre * (1 - centre)).sqrt() + 0.01)
        share = (e - 0.1 * largest)[m > 0].abs().min() / largest
        assert share > 1e-6  # nearer to the threshold rounding could decide
        f = (e > 0.1 * largest) * m
    entropy = F.binary_cross_entropy_with_logits(z, y, reduction="none")
    hard = (e * f * entropy).sum() / f.sum().clamp(min=1)
    return 0.5 * entropy_oracle(z, y, m) + 0.5 * hard


def rmi_oracle(
    z: Tensor, y: Tensor, m: Tensor, pooling: str | None = "avg", ignore: str = "zero"
) -> Tensor:
    """Regions of 2 x 2, cells of 2 x 2, epsilon 1e-2."""
    entropy = entropy_oracle(z, y, m)
    p = z.sigmoid() * m
    touched = 1 - m
    if pooling == "avg":
        y, p, touched = (F.avg_pool2d(x, 2, 2, padding=1) for x in (y, p, touched))
    elif pooling == "max":
        y, p, touched = (F.max_pool2d(x, 2, 2, padding=1) for x in (y, p, touched))
    elif pooling == "nearest":
        size = (z.size(2) // 2, z.size(3) // 2)
        linear = {"size": size, "mode": "bilinear", "align_corners": True}
        touched = F.interpolate(touched, **linear) + F.interpolate(touched, size)
        y, p = F.interpolate(y, size), F.interpolate(p, **linear)
    total = torch.zeros((), dtype=torch.float64)
    for image in range(z.size(0)):
        y_, p_, t_ = (F.unfold(x[image : image + 1], 2)[0] for x in (y, p, touched))
        if ignore == "drop":
            y_, p_ = (x[:, (t_ > 1e-12).sum(0) == 0] for x in (y_, p_))
        n = y_.size(1)
        if n == 0:
            continue
        y_, p_ = y_ - y_.mean(1, keepdim=True), p_ - p_.mean(1, keepdim=True)
        ridge = 1e-2 * torch.eye(4, dtype=torch.float64)
        gain = torch.linalg.solve(p_ @ p_.T / n + ridge, p_ @ y_.T / n)
        total = total + torch.logdet(y_ @ y_.T / n - y_ @ p_.T / n @ gain + ridge) / 8
    return 0.3 * entropy + 0.7 * total / z.size(0)


def neuro_oracle(z: Tensor, y: Tensor, m: Tensor) -> Tensor:
    """The mask's IoU loss as the network below takes it for, mean over images that have a mask."""
    found = (z > 0).double() * m
    parts = (y * found, (1 - y) * found, y * (1 - found) * m)
    sums = torch.stack([(z.sigmoid() * part).sum((1, 2, 3)) for part in parts], 1)
    first, last = (layer for layer in NETWORK.linear if isinstance(layer, torch.nn.Linear))
    hidden = (sums / z[0].numel() * 3.0) @ first.weight.double().T + first.bias.double()
    losses = (hidden.tanh() @ last.weight.double().T + last.bias.double()).squeeze(1)
    present = (y * m).sum((1, 2, 3)) > 0
    return torch.where(present, losses, 0).sum() / present.sum().clamp(min=1)


def hinge_oracle(z: Tensor, y: Tensor, m: Tensor) -> Tensor:
    """The published Lovász hinge: a sort of the errors, and differences of the Jaccard loss."""
    s, own = z[m > 0], y[m > 0]
    errors, order = (1 - s * (2 * own - 1)).sort(descending=True)
    own = own[order]
    jaccard = 1 - (own.sum() - own.cumsum(0)) / (own.sum() + (1 - own).cumsum(0))
    return (errors.clamp(min=0) * jaccard.diff(prepend=torch.zeros(1).double())).sum()


def network() -> IoUSurrogate:
    """A network of one hidden layer that nobody has fitted."""
    torch.manual_seed(5)
    surrogate = IoUSurrogate(layers=1, nodes=8).requires_grad_(False)
    surrogate.scale.fill_(3.0)
    return surrogate


NETWORK = network()
RMI: dict[str, Any] = {"region_size": 2, "pool_size": 2, "epsilon": 1e-2, "bce_weight": 0.3}
WAYS: dict[str, tuple[Callable[..., Any], dict[str, Any], Oracle, dict[str, Any]]] = {
    "bce": (binary_cross_entropy, {}, entropy_oracle, {}),
    "ssl-3": (structural_similarity_loss, {}, ssl_oracle, {}),
    "ssl-7": (structural_similarity_loss, {"window_size": 7}, ssl_oracle, {"size": 7}),
    "ssim-5": (ssim_loss, {"window_size": 5}, ssim_oracle, {}),
    "ssim-contrast": (
        ssim_loss, {"window_size": 5, "form": "contrast_structure"}, ssim_oracle,
        {"form": "contrast_structure"},
    ),
    **{
        f"rmi-{pooling}-{ignore}": (
            rmi_loss, {**RMI, "pooling": pooling, "ignore": ignore}, rmi_oracle,
            {"pooling": pooling, "ignore": ignore},
        )
        for pooling in ("avg", "max", "nearest", None)
        for ignore in ("zero", "drop")
    },
    "lovasz": (lovasz_hinge_loss, {"exact": True}, hinge_oracle, {}),
    "neuro": (neuro_iou_loss, {"surrogate": NETWORK}, neuro_oracle, {}),
}  # fmt: skip


# One for each kernel that reads labels.
FEW_WAYS = [
    "bce", "ssl-3", "ssl-7", "ssim-5", "rmi-avg-zero", "rmi-max-zero", "rmi-nearest-drop",
    "rmi-None-zero", "rmi-None-drop",
]  # fmt: skip
FEW = pytest.mark.parametrize("way", FEW_WAYS)
BACKENDS = pytest.mark.parametrize("backend", ["triton", "reference"])


def called(way: str, logits: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Value and gradient of the package's function."""
    function, own_options, _, _ = WAYS[way]
    leaf = logits.detach().requires_grad_()
    value = function(leaf, target, **own_options, **options)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def expected(way: str, logits: Tensor, target: Tensor, ignored: int = 255) -> tuple[Tensor, Tensor]:
    """Value and gradient of the oracle, on the CPU."""
    _, _, oracle, options = WAYS[way]
    leaf = logits.detach().cpu().double().requires_grad_()
    target = target.cpu()
    m = ((target == 0) | (target == 1)) & (target != ignored)
    y = ((target == 1) & m)[:, None].double()
    value = oracle(leaf, y, m[:, None].double(), **options)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def assert_agree(
    found: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor], tolerance: float = 1e-7
) -> None:
    assert abs(found[0].item() - truth[0].item()) <= tolerance * max(1, abs(truth[0].item()))
    error = (found[1].cpu().double() - truth[1]).abs().max() / truth[1].abs().max()
    assert error <= tolerance


@BACKENDS
@pytest.mark.parametrize("way", WAYS)
def test_value_and_gradient_of_the_mask(way: str, backend: str, device: torch.device) -> None:
    """Two images of several strips; few pixels are ignored where that drops whole regions."""
    logits, target = mask_case((2, 11, 13), ignored=0.02 if "drop" in way else 0.1)
    truth = expected(way, logits, target)
    assert truth[1].abs().max() > 0
    with tritonloss.use_backend(backend):
        assert_agree(called(way, logits.to(device), target.to(device)), truth)


@BACKENDS
@pytest.mark.parametrize("ignore_index", [0, 1])
@FEW
def test_either_label_may_be_ignored(
    way: str, ignore_index: int, backend: str, device: torch.device
) -> None:
    logits, target = mask_case(ignored=0.0)
    truth = expected(way, logits, target, ignore_index)
    with tritonloss.use_backend(backend):
        found = called(way, logits.to(device), target.to(device), ignore_index=ignore_index)
    assert_agree(found, truth)
    assert (found[1][(target == ignore_index)[:, None]] == 0).all()


@FEW
def test_every_label_dtype(way: str, device: torch.device) -> None:
    logits, target = mask_case(ignored=0.02)
    logits, target = logits.float().to(device), target.to(device)
    wide = called(way, logits, target)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        ignore_index = -7 if dtype == torch.int8 else 255
        labels = torch.where(target == 255, ignore_index, target).to(dtype)
        narrow = called(way, logits, labels, ignore_index=ignore_index)
        assert torch.equal(narrow[0], wide[0]) and torch.equal(narrow[1], wide[1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", ["bce", "ssl-3", "ssim-5", "rmi-avg-zero", "rmi-None-zero"])
def test_every_layout(way: str, layout: str, device: torch.device) -> None:
    logits, target = mask_case((1, 8, 12), ignored=0.02)
    logits, target = as_layout(logits.float().to(device), layout), target.to(device)
    if layout == "expanded":
        # Far from SSL's threshold, and without a pair of pixels that rounding could tell apart.
        logits = as_layout(torch.where(target[:, None] == 1, 2.5, -1.5), layout)
    labels = as_layout(target, layout)
    truth = expected(way, logits, labels)
    assert_agree(called(way, logits, labels), truth, tolerance=2e-5)


@pytest.mark.parametrize("label", [0, 1])
@FEW
def test_masks_of_one_label_alone(way: str, label: int, device: torch.device) -> None:
    """The foreground is absent from every strip, or covers every strip."""
    logits, target = mask_case(ignored=0.02)
    target = torch.where(target == 255, 255, label)
    truth = expected(way, logits, target)
    assert_agree(called(way, logits.to(device), target.to(device)), truth, tolerance=1e-6)


@FEW
def test_ignored_pixels_do_no_harm(way: str, device: torch.device) -> None:
    logits, target = mask_case(ignored=0.05)
    logits, target = logits.float().to(device), target.to(device)
    ignored = (target == 255)[:, None]
    clean = called(way, logits.masked_fill(ignored, 0.0), target)
    for value in (math.inf, -math.inf, math.nan):
        found = called(way, logits.masked_fill(ignored, value), target)
        assert torch.equal(found[0], clean[0]) and torch.equal(found[1], clean[1])
        assert (found[1][ignored] == 0).all()


@FEW
def test_labels_that_are_neither(
    way: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, target = mask_case(ignored=0.05)
    logits, target = logits.float().to(device), target.to(device)
    outside = torch.tensor([2, 254, -1, 2**32 + 1], device=device).repeat(target.numel())
    wrong = torch.where(target == 255, outside[: target.numel()].view_as(target), target)
    if device.type == "cpu":
        with pytest.raises(ValueError, match="target must hold labels from 0 to 1 or ignore_index"):
            called(way, logits, wrong)
    monkeypatch.setattr(checks, "check_labels_in_range", lambda *_: None)
    ignoring, counting = called(way, logits, target), called(way, logits, wrong)
    assert torch.equal(ignoring[0], counting[0]) and torch.equal(ignoring[1], counting[1])


@BACKENDS
@FEW
def test_two_classes_are_two_masks(way: str, backend: str, device: torch.device) -> None:
    """Class 1 of two is the mask, class 0 its complement; SSIM and SSL average over the classes."""
    options: dict[str, Any] = {}
    if way.startswith("ssl"):
        options = {"hard_mining": False, "bce_weight": 0.0}  # then the divisor is V C
    logits, target = mask_case(ignored=0.02)
    other, _ = mask_case(seed=1)
    logits, other, target = (x.to(device) for x in (logits, other, target))
    flipped = torch.where(target == 255, 255, 1 - target)
    share = 0.5 if way.startswith("ss") else 1.0
    with tritonloss.use_backend(backend):
        both = called(way, torch.cat((other, logits), 1), target, **options)
        first, second = (
            called(way, other, flipped, **options),
            called(way, logits, target, **options),
        )
    torch.testing.assert_close(both[0], share * (first[0] + second[0]), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(both[1][:, :1], share * first[1], rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(both[1][:, 1:], share * second[1], rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("way", ["bce", "ssl-3", "ssim-5", "rmi-avg-zero", "rmi-None-drop"])
def test_compiled_and_not_looked_at(way: str, device: torch.device) -> None:
    """Under torch.compile no label is checked: foreground must not vanish there."""
    torch._dynamo.reset()
    logits, target = mask_case(ignored=0.02)
    logits, target = logits.float().to(device), target.to(device)
    found = called(way, logits, target)
    function, options, _, _ = WAYS[way]
    compiled = torch.compile(
        lambda z: function(z, target, **options), fullgraph=True, backend="aot_eager"
    )
    leaf = logits.clone().requires_grad_()
    value = compiled(leaf)
    torch.testing.assert_close(value.detach(), found[0])
    torch.testing.assert_close(torch.autograd.grad(value, leaf)[0], found[1])


COMPARING = {
    name: example
    for name, example in one_of_each().items()
    if example.function not in [function for function, *_ in WAYS.values()]
}


@BACKENDS
@pytest.mark.parametrize("name", COMPARING)
def test_losses_that_compare_classes_refuse_one(
    name: str, backend: str, device: torch.device
) -> None:
    """These are all losses that have no oracle here."""
    logits, target = mask_case()
    with tritonloss.use_backend(backend):
        with pytest.raises(ValueError, match=r"^logits must .* use binary_cross_entropy; got .*"):
            COMPARING[name](logits.to(device), target.to(device))

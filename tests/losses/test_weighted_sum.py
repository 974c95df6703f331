"""Weighted sums of losses: values and gradients of every mix, how many reads, weights, memory."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tritonloss
from tests.losses.pixelwise.upsampled import upsampled_case
from tests.oracle import LAYOUTS, as_layout, check_three_way, segmentation_case
from tests.ranks import of_ranks
from tritonloss import (
    BinaryCrossEntropyLoss,
    CrossEntropyLoss,
    DiceLoss,
    FocalLoss,
    GeneralizedDiceLoss,
    LovaszSoftmaxLoss,
    MarginCalibratedLoss,
    SoftIoULoss,
    StructuralSimilarityLoss,
    TverskyLoss,
    WeightedSum,
)
from tritonloss._core import configurations
from tritonloss._core.prepared_launch import PreparedLaunch

pytestmark = pytest.mark.parity

Members = list[tuple[float, Any]]


def ramp(classes: int, device: torch.device) -> Tensor:
    return torch.linspace(0.5, 1.5, classes, device=device)


def sigmoids(loss: type[Any], **options: Any) -> Any:
    return loss(activation="sigmoid", **options)


# Sums whose losses share one read, by (classes, device).
JOINT: dict[str, Callable[[int, torch.device], Members]] = {
    "cross entropy, dice": lambda c, d: [(1.0, CrossEntropyLoss()), (0.5, DiceLoss())],
    "dice, focal": lambda c, d: [(2.0, DiceLoss(per_image=True)), (1.0, FocalLoss(alpha=0.3))],
    "smoothed and weighted": lambda c, d: [
        (1.0, CrossEntropyLoss(weight=ramp(c, d), label_smoothing=0.1)),
        (-0.5, TverskyLoss(gamma=1.5)),
        (1.0, CrossEntropyLoss()),
        (0.3, GeneralizedDiceLoss(weight=ramp(c, d).double())),
    ],
    "two passes": lambda c, d: [
        (0.1, SoftIoULoss(classes=(0, 1))),
        (1.0, MarginCalibratedLoss((ramp(c, d), 2 * ramp(c, d)), variant="released")),
        (1.0, FocalLoss(gamma=1.3)),
    ],
    "sums": lambda c, d: [
        (0.01, CrossEntropyLoss(weight=ramp(c, d), reduction="sum")),
        (1.0, DiceLoss(log_loss=True)),
    ],
    "sigmoids": lambda c, d: [
        (1.0, BinaryCrossEntropyLoss(pos_weight=ramp(c, d))),
        (0.5, sigmoids(DiceLoss)),
        (0.5, sigmoids(SoftIoULoss, per_image=True)),
    ],
    "softmax, sigmoids": lambda c, d: [(1.0, CrossEntropyLoss()), (0.5, sigmoids(DiceLoss))],
    "pixelwise": lambda c, d: [
        (0.5, FocalLoss()),
        (1.0, CrossEntropyLoss(label_smoothing=0.1)),
        (2.0, BinaryCrossEntropyLoss()),
    ],
    "overlap": lambda c, d: [(1.0, DiceLoss()), (1.0, TverskyLoss(per_image=False))],
}
# Sums of which some losses have a read of their own, with the reads of pixelwise and joint kernels.
APART: dict[str, tuple[int, Callable[[int, torch.device], Members]]] = {
    "Lovasz": (
        1,
        lambda c, d: [(1.0, CrossEntropyLoss()), (0.5, LovaszSoftmaxLoss()), (0.5, DiceLoss())],
    ),
    "two others": (
        1,
        lambda c, d: [
            (0.5, StructuralSimilarityLoss(window_size=3)),
            (1.0, CrossEntropyLoss()),
            (0.5, LovaszSoftmaxLoss()),
            (1.0, FocalLoss()),
        ],
    ),
    "another label ignored": (
        1,
        lambda c, d: [(1.0, CrossEntropyLoss(ignore_index=1)), (0.5, DiceLoss())],
    ),
    "two reads": (
        2,
        lambda c, d: [
            (1.0, DiceLoss()),
            (0.5, sigmoids(TverskyLoss)),
            (1.0, CrossEntropyLoss(reduction="sum")),
            (2.0, sigmoids(DiceLoss)),
        ],
    ),
    "alone": (1, lambda c, d: [(-0.5, CrossEntropyLoss())]),
}
SUMS = JOINT | {name: make for name, (_, make) in APART.items()}


def check(members: Members, logits: Tensor, target: Tensor) -> None:
    """Sum, terms and gradient, three ways; the terms are those of the losses one by one."""
    criterion = WeightedSum(members)
    check_three_way(lambda leaf: criterion(leaf, target), logits)
    with tritonloss.use_backend("triton"):
        criterion(logits, target)
        alone = torch.stack([loss(logits, target) for _, loss in members])
    assert criterion.terms is not None and not criterion.terms.requires_grad
    torch.testing.assert_close(criterion.terms, alone)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", SUMS)
def test_every_mix(name: str, layout: str, device: torch.device) -> None:
    logits, target = segmentation_case((2, 5, 6, 12), device=device)
    target[target == 3] = 0
    if name == "another label ignored":
        target[target == 255] = 1
    check(SUMS[name](5, device), as_layout(logits, layout), target)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["cross entropy, dice", "sigmoids", "dice, focal", "Lovasz"])
def test_every_dtype(name: str, dtype: torch.dtype, device: torch.device) -> None:
    logits, target = segmentation_case((2, 4, 5, 8), dtype=dtype, device=device)
    check(SUMS[name](4, device), logits, target)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout: str, device: torch.device) -> None:
    logits, target = segmentation_case((2, 4, 7, 11), device=device)
    members = SUMS["two passes"](4, device)
    check(members, as_layout(logits, layout), as_layout(target, layout))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("classes", [2, 20, 33, 70, 300])
@pytest.mark.shipped_sizes
def test_configurations_that_ship(classes: int, layout: str, device: torch.device) -> None:
    """Classes in registers and in blocks, with losses of one pass and of two."""
    logits, target = segmentation_case(
        (1, classes, 4, 36), device=device, label_dtype=torch.int64, ignore_index=-1
    )
    members: Members = [
        (1.0, CrossEntropyLoss(ignore_index=-1)),
        (0.5, DiceLoss(ignore_index=-1)),
        (0.5, MarginCalibratedLoss((ramp(classes, device),) * 2, ignore_index=-1)),
    ]
    check(members, as_layout(logits, layout), target)


@pytest.mark.parametrize("unroll", [2, 8])
def test_classes_in_blocks_and_in_registers(unroll: int, device: torch.device) -> None:
    size = {"PIXELS": 64, "CLASS_LANES": 2, "UNROLL": unroll, "num_warps": 1}
    logits, target = segmentation_case((2, 7, 3, 40), device=device)
    with (
        configurations.forced("joint_forward", size),
        configurations.forced("joint_backward", size),
    ):
        for name in ("smoothed and weighted", "sigmoids"):
            check(SUMS[name](7, device), logits, target)


@pytest.mark.parametrize("shape", [(1, 2, 1, 1), (3, 3, 1, 5), (1, 4, 13, 1)], ids=str)
def test_small_and_odd_shapes(shape: tuple[int, ...], device: torch.device) -> None:
    logits, target = segmentation_case(shape, device=device, seed=1)
    check(SUMS["cross entropy, dice"](shape[1], device), logits / 2, target)


def test_one_channel(device: torch.device) -> None:
    logits, target = segmentation_case((2, 1, 6, 9), device=device)
    check([(1.0, BinaryCrossEntropyLoss()), (1.0, sigmoids(DiceLoss))], logits, target)


@pytest.mark.parametrize("shape", [(2, 3, 7), (2, 3, 2, 4, 5)], ids=str)
def test_lines_and_volumes(shape: tuple[int, ...], device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator).to(device)
    labels = (shape[0], *shape[2:])
    target = torch.randint(0, 3, labels, generator=generator).to(device)
    members: Members = [(1.0, DiceLoss()), (0.5, TverskyLoss()), (0.5, sigmoids(SoftIoULoss))]
    check(members, logits, target)


@pytest.mark.parametrize("name", [*JOINT, "Lovasz"])
def test_nothing_valid_and_no_image(name: str, device: torch.device) -> None:
    for images in (0, 2):
        logits, target = segmentation_case((images, 3, 4, 5), device=device)
        leaf = logits.requires_grad_()
        criterion = WeightedSum(SUMS[name](3, device))
        with tritonloss.use_backend("triton"):
            value = criterion(leaf, torch.full_like(target, 255))
        (gradient,) = torch.autograd.grad(value, leaf)
        assert value == 0 and (gradient == 0).all()
        assert criterion.terms is not None and (criterion.terms == 0).all()


def test_what_is_not_finite_under_ignored_pixels_changes_nothing(device: torch.device) -> None:
    logits, target = segmentation_case((2, 5, 6, 12), device=device)
    spoilt = torch.where(target[:, None] == 255, float("inf"), logits)
    spoilt[:, 0] = torch.where(target == 255, float("nan"), logits[:, 0])
    for name in JOINT:
        criterion = WeightedSum(SUMS[name](5, device))
        found = [value_and_gradient(criterion, given, target) for given in (logits, spoilt)]
        for left, right in zip(*found, strict=True):
            assert torch.equal(left, right), name


def value_and_gradient(
    criterion: nn.Module, logits: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    with tritonloss.use_backend("triton"):
        value = criterion(leaf, target)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


@pytest.mark.parametrize("name", ["sigmoids", "smoothed and weighted", "Lovasz"])
def test_gradcheck(name: str, device: torch.device) -> None:
    logits, target = segmentation_case((1, 3, 3, 4), dtype=torch.float64, device=device)
    criterion = WeightedSum(SUMS[name](3, device))
    with tritonloss.use_backend("triton"):
        call = partial(criterion, target=target)
        if name == "Lovasz":  # the sum of losses, whose histograms have no exact derivative
            call = WeightedSum([(1.0, FocalLoss()), (2.0, DiceLoss())]).forward
            call = partial(call, target=target)
        assert torch.autograd.gradcheck(call, logits.requires_grad_())


# --- reads, gradients, memory ---------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that are launched, but for those of small tables."""
    names: list[str] = []
    launch = PreparedLaunch.__call__

    def noted(self: Any, **tensors: Any) -> None:
        name = self._kernel.fn.__name__
        if "head" not in name:
            names.append(name)
        launch(self, **tensors)

    monkeypatch.setattr(PreparedLaunch, "__call__", noted)
    return names


@pytest.mark.parametrize("name", JOINT)
def test_losses_share_a_read(name: str, device: torch.device, launched: list[str]) -> None:
    logits, target = segmentation_case((1, 4, 4, 5), device=device)
    value_and_gradient(WeightedSum(SUMS[name](4, device)), logits, target)
    kind = "pixelwise" if name == "pixelwise" else "joint"
    assert launched == [f"_{kind}_forward_kernel", f"_{kind}_backward_kernel"]


@pytest.mark.parametrize("name", APART)
def test_losses_that_cannot_share_a_read_have_their_own(
    name: str, device: torch.device, launched: list[str]
) -> None:
    logits, target = segmentation_case((1, 4, 4, 5), device=device)
    target[target == 255] = 0
    joint, make = APART[name]
    value_and_gradient(WeightedSum(make(4, device)), logits, target)
    for direction in ("forward", "backward"):
        found = [
            n
            for n in launched
            if n in (f"_joint_{direction}_kernel", f"_pixelwise_{direction}_kernel")
        ]
        assert len(found) == joint, launched


@pytest.mark.parametrize(
    ("name", "gradients"),
    [("cross entropy, dice", 1), ("Lovasz", 1), ("two reads", 1), ("two others", 2)],
)
def test_gradients_are_added_in_place(
    name: str, gradients: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many gradients as losses with kernels that write only; those of joint reads add."""
    logits, target = segmentation_case((1, 4, 4, 5), device=device)
    criterion = WeightedSum(SUMS[name](4, device))
    leaf = logits.requires_grad_()
    with tritonloss.use_backend("triton"):
        value = criterion(leaf, target)
    made = []
    empty_like = torch.empty_like

    def noted(tensor: Tensor, **options: Any) -> Tensor:
        made.append(tensor.shape)
        return empty_like(tensor, **options)

    monkeypatch.setattr(torch, "empty_like", noted)
    torch.autograd.grad(value, leaf)
    assert made.count(logits.shape) == gradients


@pytest.mark.parametrize("name", ["cross entropy, dice", "Lovasz", "two reads"])
def test_backward_again(name: str, device: torch.device) -> None:
    """Once more over the same graph, and with the logits used elsewhere, too."""
    logits, target = segmentation_case((1, 4, 4, 5), device=device)
    criterion = WeightedSum(SUMS[name](4, device))
    leaf = logits.requires_grad_()
    with tritonloss.use_backend("triton"):
        value = criterion(leaf, target)
        (once,) = torch.autograd.grad(value, leaf, retain_graph=True)
        kept = once.clone()
        (again,) = torch.autograd.grad(value, leaf, retain_graph=True)
        (with_more,) = torch.autograd.grad(value + leaf.sum(), leaf)
    assert torch.equal(once, kept) and torch.equal(again, kept)
    torch.testing.assert_close(with_more, kept + 1)


def test_a_loss_of_ones_own_is_no_other(device: torch.device) -> None:
    """A subclass may compute something else: it shares no read, and nothing is added to it."""

    class Doubled(CrossEntropyLoss):
        def forward(self, logits: Tensor, target: Tensor) -> Tensor:
            return 2 * super().forward(logits, target) + logits.sum()

    logits, target = segmentation_case((2, 4, 5, 8), device=device)
    check([(1.0, Doubled()), (0.5, DiceLoss()), (0.5, FocalLoss())], logits, target)


# --- weights --------------------------------------------------------------------------------------


def test_weights_change_between_steps(device: torch.device) -> None:
    logits, target = segmentation_case((2, 4, 5, 8), device=device)
    criterion = WeightedSum([(1.0, CrossEntropyLoss()), (0.5, DiceLoss())])
    value_and_gradient(criterion, logits, target)
    place = criterion.weights.data_ptr()
    for weights in ((0.0, 1.0), [torch.tensor(0.25, device=device), 3], torch.tensor([2.0, -1.0])):
        criterion.weights = weights
        assert criterion.weights.tolist() == [float(weight) for weight in weights]
        assert criterion.weights.data_ptr() == place
        check_three_way(lambda leaf: criterion(leaf, target), logits)


def test_weights_are_numbers_of_a_graph(device: torch.device) -> None:
    """torch.compile compiles once, whatever the weights, and the values of all losses come out."""
    torch._dynamo.reset()
    logits, target = segmentation_case((1, 3, 4, 5), device=device)
    criterion = WeightedSum([(1.0, CrossEntropyLoss(weight=ramp(3, device))), (0.5, DiceLoss())])
    with tritonloss.use_backend("triton"):
        criterion(logits, target)  # on the first call weights go to the device of the logits
        compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
        compiled(logits, target)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for weights in ((1.0, 0.0), (0.25, 2.0)):
                criterion.weights = weights
                value = compiled(logits, target)
                terms = criterion.terms
                assert torch.equal(value, criterion(logits, target))
                assert torch.equal(terms, criterion.terms)


def test_a_module_like_others(device: torch.device) -> None:
    criterion = WeightedSum([(1.0, CrossEntropyLoss(weight=ramp(3, device))), (0.3, DiceLoss())])
    logits, target = segmentation_case((1, 3, 4, 5), device=device)
    expected = value_and_gradient(criterion, logits, target)
    for made in (pickle.loads(pickle.dumps(criterion)), copy.deepcopy(criterion)):
        assert all(map(torch.equal, value_and_gradient(made, logits, target), expected))
        assert repr(made) == repr(criterion)
    assert copy.deepcopy(criterion).half().weights.tolist() == [1.0, 0.3]
    assert "weights=[1.0, 0.3]" in repr(criterion) and "DiceLoss(" in repr(criterion)
    state = copy.deepcopy(criterion.state_dict())
    criterion.weights = (5.0, 5.0)
    criterion.load_state_dict(state)
    assert criterion.weights.tolist() == [1.0, 0.3]
    with torch.autocast(device.type, torch.bfloat16):
        assert all(map(torch.equal, value_and_gradient(criterion, logits, target), expected))


def test_wrong_members_are_named() -> None:
    dice = DiceLoss()
    with pytest.raises(ValueError, match="members must have at least one pair"):
        WeightedSum([])
    for wrong in (None, "dice", {1.0: dice}):
        with pytest.raises(TypeError, match="members must be a sequence of pairs"):
            WeightedSum(wrong)
    with pytest.raises(TypeError, match=r"members\[1\] must be a pair"):
        WeightedSum([(1.0, dice), dice])
    with pytest.raises(TypeError, match=r"members\[0\]\[0\] must be a number .*got '1'"):
        WeightedSum([("1", dice)])
    with pytest.raises(ValueError, match=r"members\[0\]\[0\] must be finite; got nan"):
        WeightedSum([(float("nan"), dice)])
    with pytest.raises(ValueError, match=r"members\[0\]\[0\] must be .* of shape \(2,\)"):
        WeightedSum([(torch.ones(2), dice)])
    with pytest.raises(TypeError, match=r"members\[0\]\[1\] must be a loss .*of type Conv2d"):
        WeightedSum([(1.0, nn.Conv2d(1, 1, 1))])
    with pytest.raises(ValueError, match=r"losses\[1\], CrossEntropyLoss, .*got \"none\""):
        WeightedSum([(1.0, dice), (1.0, CrossEntropyLoss(reduction="none"))])
    criterion = WeightedSum([(1.0, dice), (1.0, CrossEntropyLoss())])
    with pytest.raises(ValueError, match="weights must be as many as there are losses, 2; got 1"):
        criterion.weights = [1.0]
    for wrong in (None, 1.0):
        with pytest.raises(TypeError, match="weights must be a sequence of numbers"):
            criterion.weights = wrong
    with pytest.raises(ValueError, match=r"weights\[1\] must be finite"):
        criterion.weights = [1.0, float("inf")]


# --- ranks ----------------------------------------------------------------------------------------


def loss_on_one_rank(rank: int, device: str, upsample: str | None) -> dict[str, tuple[Tensor, ...]]:
    group = torch.distributed.group.WORLD
    size = (5, 6) if upsample is None else (2, 3)
    found = {}
    for backend in ("triton", "reference"):
        with tritonloss.use_backend(backend):
            for per_image in (False, True):
                logits, target = upsampled_case(
                    size, (5, 6), classes=4, seed=rank, device=torch.device(device)
                )
                leaf = logits.requires_grad_()
                everywhere: dict[str, Any] = {"process_group": group, "upsample": upsample}
                criterion = WeightedSum(
                    [
                        (1.0, CrossEntropyLoss(**everywhere)),
                        (0.5, DiceLoss(**everywhere)),
                        (2.0, TverskyLoss(per_image=per_image, **everywhere)),
                        (0.25, SoftIoULoss(upsample=upsample)),
                        (0.5, CrossEntropyLoss(upsample=upsample)),
                    ]
                )
                value = criterion(leaf, target)
                (gradient,) = torch.autograd.grad(value, leaf)
                assert criterion.terms is not None
                found[f"{backend}, {per_image}"] = (value.detach(), criterion.terms, gradient)
    return found


@pytest.mark.parametrize("upsample", [None, "bilinear"])
def test_process_groups(upsample: str | None, device: torch.device, tmp_path: Path) -> None:
    for rank in of_ranks(2, loss_on_one_rank, tmp_path, device.type, upsample):
        for per_image in (False, True):
            pairs = zip(rank[f"triton, {per_image}"], rank[f"reference, {per_image}"], strict=True)
            for kernel, reference in pairs:
                torch.testing.assert_close(kernel, reference)

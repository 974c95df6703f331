"""Losses over the ranks of a process group: those of one process with all images."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import tritonloss
from tests.losses.overlap.cases import LOSSES as OVERLAP
from tests.losses.overlap.cases import Loss, named, reference_gradient
from tests.oracle import segmentation_case
from tests.ranks import of_ranks
from tritonloss import functional
from tritonloss._tools.interpreter import hasten_interpreter

# Of each world the images of its ranks.
WORLDS: dict[int, tuple[int, ...]] = {2: (1, 2), 3: (2, 0, 1)}
WEIGHT = torch.tensor([0.5, 1.0, 2.0, 1.0], dtype=torch.float64)
OF_OVERLAP: tuple[dict[str, Any], ...] = (
    {"per_image": False},
    {"per_image": True, "classes": "all"},
    {"per_image": True, "classes": "present", "activation": "sigmoid"},
)
OF_LOVASZ: tuple[dict[str, Any], ...] = (
    {"classes": "all", "per_image": True},
    {"classes": (2, 1)},
    {"upsample": "bilinear"},
    {"upsample": "bilinear", "per_image": True},
)
# One way or more of every loss of labels that takes a process group.
WAYS: tuple[tuple[Loss, dict[str, Any]], ...] = (
    *((loss, {"weight": WEIGHT, **options}) for loss in OVERLAP for options in OF_OVERLAP),
    (functional.cross_entropy, {"weight": WEIGHT, "label_smoothing": 0.125}),
    (functional.cross_entropy, {"reduction": "sum"}),
    (functional.binary_cross_entropy, {"pos_weight": WEIGHT}),
    (functional.focal_loss, {"alpha": WEIGHT}),
    (functional.margin_calibrated_loss, {"offsets": (WEIGHT, 2 * WEIGHT)}),
    (functional.structural_similarity_loss, {"bce_weight": 0.3}),
    (functional.structural_similarity_loss, {"window_size": 7, "padding": "reflect"}),
    (functional.ssim_loss, {"window_size": 3}),
    *((functional.lovasz_softmax_loss, {"bins": 64, **options}) for options in OF_LOVASZ),
    (functional.lovasz_softmax_loss, {"exact": True, "per_image": True}),
    (functional.lovasz_hinge_loss, {"bins": 1024}),
    (functional.lovasz_hinge_loss, {"bins": 1024, "per_image": True, "upsample": "bilinear"}),
    (functional.affinity_field_loss, {"size": (1, 2), "edge_table": WEIGHT, "edge_weight": 0.5}),
    (functional.rmi_loss, {"region_size": 2, "pool_size": 2, "epsilon": 0.25}),
    (functional.rmi_loss, {"region_size": 2, "pooling": None, "bce_smooth": 1.0, "epsilon": 0.25}),
)


def cases() -> Iterator[tuple[str, Loss, dict[str, Any]]]:
    for backend in ("triton", "reference"):
        for loss, options in WAYS:
            yield backend, loss, options


def batch_of(
    ranks: int, loss: Loss | None = None, options: Mapping[str, Any] = MappingProxyType({})
) -> tuple[Tensor, Tensor]:
    """(logits, labels) for a loss; the last rank's images are void, and no image has class 3."""
    images = sum(WORLDS[ranks])
    logits, target = segmentation_case((images, 4, 7, 8), dtype=torch.float64)
    target[target == 3] = 0
    if loss is functional.lovasz_hinge_loss:
        logits, target = logits[:, :1], torch.where(target == 2, 0, target)
    if "upsample" in options:
        logits = logits[..., ::2, ::2]
    target[images - WORLDS[ranks][-1] :] = 255
    return logits, target


def part_of(ranks: int, rank: int) -> slice:
    before = sum(WORLDS[ranks][:rank])
    return slice(before, before + WORLDS[ranks][rank])


def run_on_one_rank(rank: int, ranks: int) -> list[tuple[Tensor, Tensor]]:
    hasten_interpreter()
    group = torch.distributed.group.WORLD
    own = part_of(ranks, rank)
    found = []
    for backend, loss, options in cases():
        logits, target = batch_of(ranks, loss, options)
        leaf = logits[own].clone().requires_grad_()
        with tritonloss.use_backend(backend):
            value = loss(leaf, target[own], process_group=group, **options)
        found.append((value.detach(), torch.autograd.grad(value, leaf)[0]))
    logits, target = batch_of(ranks)
    if ranks == 2:
        for sharded in (False, True):
            found.append(parallel_gradient(logits[own], target[own], group, sharded))
    return found


def layer() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Conv2d(4, 4, 1).double()


def criterion(group: Any = None) -> torch.nn.Module:
    entropy = tritonloss.CrossEntropyLoss(weight=WEIGHT, process_group=group)
    dice = tritonloss.DiceLoss(process_group=group)
    return tritonloss.WeightedSum([(1.0, entropy), (0.5, dice)])


def parallel_gradient(
    image: Tensor, target: Tensor, group: Any, sharded: bool
) -> tuple[Tensor, Tensor]:
    """Value, and gradient of a layer in DistributedDataParallel, or in fully_shard."""
    # Their imports take as long as that of PyTorch: only the ranks need them.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = layer()
    if sharded:
        parallel = fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    else:
        parallel = DistributedDataParallel(model)
    value = criterion(group)(parallel(image), target)
    value.backward()
    gradient: Any = model.weight.grad
    return value.detach(), gradient.full_tensor() if sharded else gradient


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are to take CPU tensors here")
@pytest.mark.parametrize("ranks", WORLDS)
def test_ranks_share_one_batch(ranks: int, tmp_path: Path) -> None:
    """Batches are uneven, one rank is void and one of three has no image."""
    found = of_ranks(ranks, run_on_one_rank, tmp_path, ranks)
    close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)
    for number, (_, loss, options) in enumerate(cases()):
        logits, target = batch_of(ranks, loss, options)
        expected, gradient = reference_gradient(loss, logits, target, **options)
        for rank in range(ranks):
            value, own_gradient = found[rank][number]
            close(value, expected)
            close(own_gradient, ranks * gradient[part_of(ranks, rank)])
    if ranks == 2:
        model = layer()
        logits, target = batch_of(ranks)
        with tritonloss.use_backend("reference"):
            expected = criterion()(model(logits), target)
        expected.backward()
        for rank, way in itertools.product(range(ranks), (-2, -1)):
            value, own_gradient = found[rank][way]
            close(value, expected.detach())
            close(own_gradient, model.weight.grad)


def test_what_is_no_process_group() -> None:
    for loss, options in WAYS:
        logits, target = batch_of(2, loss, options)
        with pytest.raises(TypeError, match="^process_group must be .*; got 'gloo' of type str"):
            loss(logits, target, process_group="gloo", **options)


def contrast(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    """Pixel contrast, each pixel an anchor."""
    anchors = logits.movedim(1, -1).flatten(0, -2)
    return functional.pixel_contrast_loss(anchors, target.flatten(), **options)


def fail_on_one_rank(rank: int) -> None:
    """Rank 1 gives an argument that is wrong; both raise, and go on."""
    group = torch.distributed.group.WORLD
    for loss, options in (*WAYS, (contrast, {})):
        logits, target = batch_of(2, loss, options)
        given = logits if rank == 0 else logits.long()
        error, words = ((RuntimeError, "rank"), (TypeError, "logits|anchors"))[rank]
        with pytest.raises(error, match=words):
            loss(given, target, process_group=group, **options)


def test_a_failure_reaches_the_other_ranks(tmp_path: Path) -> None:
    of_ranks(2, fail_on_one_rank, tmp_path)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Any]:
    """A group of this process alone."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("loss", [functional.cross_entropy, functional.dice_loss], ids=named)
def test_a_group_in_a_compiled_step(loss: Loss, alone: Any) -> None:
    """The graph has no breaks, and the collective is in it."""
    logits, target = segmentation_case((2, 4, 7, 8))
    expected, gradient = reference_gradient(loss, logits, target)

    def step(x: Tensor) -> Tensor:
        return loss(2 * x, target, process_group=alone)

    leaf = (logits / 2).requires_grad_()
    with tritonloss.use_backend("triton"):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        value = compiled(leaf)
        value.backward()
    torch.testing.assert_close(value.detach(), expected)
    torch.testing.assert_close(leaf.grad, 2 * gradient)


def test_ranks_have_no_sort_in_common(alone: Any) -> None:
    logits, target = segmentation_case((2, 4, 7, 8))
    with pytest.raises(ValueError, match="^process_group must be None with exact=True, unless"):
        functional.lovasz_softmax_loss(logits, target, exact=True, process_group=alone)


def test_what_is_no_number_reaches_the_loss_through_counts(alone: Any) -> None:
    logits, target = segmentation_case((2, 4, 7, 8))
    logits[0, 0, 0, 0], target[0, 0, 0] = torch.nan, 1
    with tritonloss.use_backend("triton"):
        loss = functional.lovasz_softmax_loss(logits, target, bins=64, process_group=alone)
    assert loss.isnan()


def test_a_batch_in_parts() -> None:
    """Sums of its parts, over the weight of the whole, have the gradient of the batch's mean."""
    logits, target = segmentation_case((3, 4, 7, 8), dtype=torch.float64)
    counts = tritonloss.count_labels(target, num_classes=4)
    _, gradient = reference_gradient(functional.cross_entropy, logits, target, weight=WEIGHT)
    leaf = logits.clone().requires_grad_()
    for part in (slice(0, 2), slice(2, 3)):
        loss = functional.cross_entropy(leaf[part], target[part], weight=WEIGHT, reduction="sum")
        (loss / (WEIGHT * counts).sum()).backward()
    torch.testing.assert_close(leaf.grad, gradient)

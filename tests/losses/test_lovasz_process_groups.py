"""Lovász losses over the ranks of a process group: those of one process with all images."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import tritonloss
from tests.oracle import segmentation_case
from tritonloss._tools.interpreter import hasten_interpreter
from tritonloss.functional import lovasz_hinge_loss, lovasz_softmax_loss

# Of each world the images of its ranks.
WORLDS: dict[int, tuple[int, ...]] = {2: (1, 2), 3: (2, 0, 1)}
Loss = Callable[..., Tensor]
CALLS: tuple[tuple[Loss, dict[str, Any]], ...] = (
    (lovasz_softmax_loss, {"bins": 64}),
    (lovasz_softmax_loss, {"bins": 64, "classes": "all", "per_image": True}),
    (lovasz_softmax_loss, {"bins": 64, "classes": (3, 1)}),
    (lovasz_softmax_loss, {"exact": True, "per_image": True}),
    (lovasz_softmax_loss, {"bins": 64, "upsample": "bilinear"}),
    (lovasz_softmax_loss, {"bins": 64, "upsample": "bilinear", "per_image": True}),
    (lovasz_hinge_loss, {"bins": 1024}),
    (lovasz_hinge_loss, {"bins": 1024, "per_image": True, "upsample": "bilinear"}),
)


def cases() -> Iterator[tuple[str, Loss, dict[str, Any]]]:
    for backend in ("triton", "reference"):
        for loss, options in CALLS:
            yield backend, loss, options


def batch_of(ranks: int, loss: Loss, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(logits, labels); the last rank's images are void, and no image has class 3."""
    images = sum(WORLDS[ranks])
    logits, target = segmentation_case((images, 4, 4, 6), dtype=torch.float64)
    target[target == 3] = 0
    if loss is lovasz_hinge_loss:
        logits, target = logits[:, :1], torch.where(target == 2, 0, target)
    if "upsample" in options:
        logits = logits[..., ::2, ::2]
    target[images - WORLDS[ranks][-1] :] = 255
    return logits, target


def part_of(ranks: int, rank: int) -> slice:
    before = sum(WORLDS[ranks][:rank])
    return slice(before, before + WORLDS[ranks][rank])


def run_on_one_rank(rank: int, ranks: int, directory: str) -> None:
    torch.set_num_threads(1)
    hasten_interpreter()
    store = torch.distributed.FileStore(os.path.join(directory, "store"), ranks)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    group = torch.distributed.group.WORLD
    own = part_of(ranks, rank)
    found = []
    for backend, loss, options in cases():
        logits, target = batch_of(ranks, loss, options)
        leaf = logits[own].clone().requires_grad_()
        with tritonloss.use_backend(backend):
            value = loss(leaf, target[own], process_group=group, **options)
        found.append((value.detach(), torch.autograd.grad(value, leaf)[0]))
    if ranks == 2:
        logits, target = batch_of(ranks, *CALLS[0])
        found.append(parallel_gradient(logits[own], target[own], group))
    spoilt, target = batch_of(ranks, *CALLS[0])
    spoilt[0, 0, 0, 0] = float("nan")
    target[0, 0, 0] = 1
    with tritonloss.use_backend("triton"):
        value = lovasz_softmax_loss(spoilt[own], target[own], bins=64, process_group=group)
    found.append((value, value))
    torch.save(found, os.path.join(directory, f"{rank}.pt"))
    torch.distributed.destroy_process_group()


def layer() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Conv2d(4, 4, 1).double()


def parallel_gradient(image: Tensor, target: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """Value, and gradient of a layer in DistributedDataParallel."""
    model = layer()
    criterion = tritonloss.LovaszSoftmaxLoss(bins=64, process_group=group)
    parallel = DistributedDataParallel(model)
    value = criterion(parallel(image), target)
    value.backward()
    assert isinstance(model.weight.grad, Tensor)
    return value.detach(), model.weight.grad


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are to take CPU tensors here")
@pytest.mark.parametrize("ranks", WORLDS)
def test_ranks_share_one_batch(ranks: int, tmp_path: Path) -> None:
    """Batches are uneven, one rank is void, one of three has no image; one pixel is no number."""
    torch.multiprocessing.spawn(run_on_one_rank, (ranks, str(tmp_path)), nprocs=ranks)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks)]
    close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)
    for number, (_, loss, options) in enumerate(cases()):
        logits, target = batch_of(ranks, loss, options)
        leaf = logits.clone().requires_grad_()
        with tritonloss.use_backend("reference"):
            expected = loss(leaf, target, **options)
        (gradient,) = torch.autograd.grad(expected, leaf)
        for rank in range(ranks):
            value, own_gradient = found[rank][number]
            close(value, expected.detach())
            close(own_gradient, ranks * gradient[part_of(ranks, rank)])
    assert all(value.isnan() for (*_, (value, _)) in found)
    if ranks == 2:
        model = layer()
        logits, target = batch_of(ranks, *CALLS[0])
        with tritonloss.use_backend("reference"):
            expected = tritonloss.LovaszSoftmaxLoss(bins=64)(model(logits), target)
        expected.backward()
        for rank in range(ranks):
            value, own_gradient = found[rank][-2]
            close(value, expected.detach())
            close(own_gradient, model.weight.grad)


@pytest.mark.parametrize("loss", [lovasz_softmax_loss, lovasz_hinge_loss])
def test_what_is_no_process_group(loss: Loss) -> None:
    logits, target = batch_of(2, loss, {})
    with pytest.raises(TypeError, match="^process_group must be .*; got 'gloo' of type str"):
        loss(logits, target, process_group="gloo")


def run_alone(rank: int, directory: str) -> None:
    store = torch.distributed.FileStore(os.path.join(directory, "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=1)
    logits, target = batch_of(2, *CALLS[0])
    with pytest.raises(ValueError, match="^process_group must be None with exact=True, unless"):
        lovasz_softmax_loss(logits, target, exact=True, process_group=torch.distributed.group.WORLD)
    torch.distributed.destroy_process_group()


def test_ranks_have_no_sort_in_common(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(run_alone, (str(tmp_path),), nprocs=1)

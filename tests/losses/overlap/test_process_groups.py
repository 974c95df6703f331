"""Losses of overlap over the ranks of a process group: those of one process with all images."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import tritonloss
from tests.losses.overlap.cases import LOSSES, Loss, reference_gradient
from tests.oracle import segmentation_case
from tritonloss._tools.interpreter import hasten_interpreter

# Of each world the images of its ranks.
WORLDS: dict[int, tuple[int, ...]] = {2: (1, 2), 3: (2, 0, 1)}
OPTIONS: tuple[dict[str, Any], ...] = (
    {"per_image": False},
    {"per_image": True, "classes": "all"},
    {"per_image": True, "classes": "present", "activation": "sigmoid"},
)


def cases() -> Iterator[tuple[str, Loss, dict[str, Any]]]:
    for backend in ("triton", "reference"):
        for loss in LOSSES:
            for options in OPTIONS:
                yield backend, loss, options


def batch_of(ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, labels, weights); the last rank's images are void, and no image has class 3."""
    images = sum(WORLDS[ranks])
    logits, target = segmentation_case((images, 4, 4, 5), dtype=torch.float64)
    target[target == 3] = 0
    target[images - WORLDS[ranks][-1] :] = 255
    return logits, target, torch.tensor([0.5, 1.0, 2.0, 1.0], dtype=torch.float64)


def part_of(ranks: int, rank: int) -> slice:
    before = sum(WORLDS[ranks][:rank])
    return slice(before, before + WORLDS[ranks][rank])


def run_on_one_rank(rank: int, ranks: int, directory: str) -> None:
    torch.set_num_threads(1)
    hasten_interpreter()
    store = torch.distributed.FileStore(os.path.join(directory, "store"), ranks)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    group = torch.distributed.group.WORLD
    logits, target, weight = batch_of(ranks)
    own = part_of(ranks, rank)
    found = []
    for backend, loss, options in cases():
        leaf = logits[own].clone().requires_grad_()
        with tritonloss.use_backend(backend):
            value = loss(leaf, target[own], weight=weight, process_group=group, **options)
        found.append((value.detach(), torch.autograd.grad(value, leaf)[0]))
    if ranks == 2:
        found.append(parallel_gradient(logits[own], target[own], group))
    torch.save(found, os.path.join(directory, f"{rank}.pt"))
    torch.distributed.destroy_process_group()


def layer() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Conv2d(4, 4, 1).double()


def parallel_gradient(image: Tensor, target: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """Value, and gradient of a layer in DistributedDataParallel."""
    model = layer()
    criterion = tritonloss.DiceLoss(process_group=group)
    parallel = DistributedDataParallel(model)
    value = criterion(parallel(image), target)
    value.backward()
    assert isinstance(model.weight.grad, Tensor)
    return value.detach(), model.weight.grad


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are to take CPU tensors here")
@pytest.mark.parametrize("ranks", WORLDS)
def test_ranks_share_one_batch(ranks: int, tmp_path: Path) -> None:
    """Batches are uneven, one rank is void and one of three has no image."""
    torch.multiprocessing.spawn(run_on_one_rank, (ranks, str(tmp_path)), nprocs=ranks)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks)]
    logits, target, weight = batch_of(ranks)
    close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)
    for number, (_, loss, options) in enumerate(cases()):
        expected, gradient = reference_gradient(loss, logits, target, weight=weight, **options)
        for rank in range(ranks):
            value, own_gradient = found[rank][number]
            close(value, expected)
            close(own_gradient, ranks * gradient[part_of(ranks, rank)])
    if ranks == 2:
        model = layer()
        with tritonloss.use_backend("reference"):
            expected = tritonloss.DiceLoss()(model(logits), target)
        expected.backward()
        for rank in range(ranks):
            value, own_gradient = found[rank][-1]
            close(value, expected.detach())
            close(own_gradient, model.weight.grad)


def test_what_is_no_process_group(loss: Loss) -> None:
    logits, target = segmentation_case((1, 3, 2, 2))
    with pytest.raises(TypeError, match="^process_group must be .*; got 'gloo' of type str"):
        loss(logits, target, process_group="gloo")

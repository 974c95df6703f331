"""Pixel contrast and its bank over the ranks of a process group: those of one process with all."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import tritonloss
from tests.losses.contrast.conftest import SMALL
from tests.ranks import of_ranks
from tritonloss import MemoryBank, PixelContrastLoss
from tritonloss._core.configurations import forced
from tritonloss._tools.interpreter import hasten_interpreter
from tritonloss.contrast.tile_launch import PASSES
from tritonloss.functional import pixel_contrast_loss

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are to take CPU tensors"),
    pytest.mark.parametrize("small_tiles", ["slices"], indirect=True),
]
# Of each world the anchors of its ranks that are contrasted with keys. Anchors that are keys are as
# many on every rank: 8.
WORLDS: dict[int, tuple[int, ...]] = {2: (5, 9), 3: (7, 0, 4)}
BACKENDS = ("triton", "reference")
STEPS = 5
BANK: dict[str, Any] = {"classes": 3, "size": 5, "dim": 4, "pixel_size": 4, "pixels": 2}


def rows(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = F.normalize(torch.randn(count, 4, generator=generator, dtype=torch.float64))
    return values, torch.randint(-1, 3, (count,), generator=generator)


def own_anchors(ranks: int) -> tuple[Tensor, Tensor]:
    """8 anchors of each rank, of which the last one's have no class."""
    anchors, labels = rows(8 * ranks, 1)
    labels[-8:] = -1
    return anchors, labels


def maps(ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two images of each rank, of which those of the last one are void, and logits."""
    generator = torch.Generator().manual_seed(3)
    target = torch.randint(0, 3, (2 * ranks, 4, 5), generator=generator)
    target[-2:] = 255
    embeddings = torch.randn(2 * ranks, 4, 4, 5, generator=generator, dtype=torch.float64)
    return embeddings, target, torch.randn(2 * ranks, 3, 4, 5, generator=generator)


def part_of(ranks: int, rank: int) -> slice:
    before = sum(WORLDS[ranks][:rank])
    return slice(before, before + WORLDS[ranks][rank])


def run_on_one_rank(rank: int, ranks: int) -> dict[str, Any]:
    hasten_interpreter()
    group: Any = torch.distributed.group.WORLD
    found: dict[str, Any] = {}
    for which in PASSES:
        forced(f"pixel_contrast_{which}", SMALL).__enter__()
    for backend in BACKENDS:
        with tritonloss.use_backend(backend):
            anchors, labels = own_anchors(ranks)
            mine = slice(8 * rank, 8 * rank + 8)
            leaf = anchors[mine].clone().requires_grad_()
            value = pixel_contrast_loss(leaf, labels[mine], process_group=group)
            found[f"own {backend}"] = value.detach(), torch.autograd.grad(value, leaf)[0]
            for hardest in (None, 0.4):
                anchors, labels = rows(sum(WORLDS[ranks]), 4)
                leaf = anchors[part_of(ranks, rank)].clone().requires_grad_()
                value = pixel_contrast_loss(
                    leaf, labels[part_of(ranks, rank)], *rows(30, 5),
                    hardest=hardest, process_group=group,
                )  # fmt: skip
                gradient = torch.autograd.grad(value, leaf)[0]
                found[f"keys {hardest} {backend}"] = value.detach(), gradient
    found["bank"] = bank_of_ranks(rank, ranks, group)
    found["parallel"] = parallel_step(rank, ranks, group)
    return found


def images_of(step: int, rank: int) -> slice:
    """The images that a rank puts into its bank: the first one has fewer for a while."""
    fewer = (0, 1, 2, 0, 0)[step] if rank == 0 else 0
    return slice(2 * rank, 2 * rank + 2 - fewer)


def bank_of_ranks(rank: int, ranks: int, group: Any) -> tuple[Tensor, Tensor]:
    bank = MemoryBank(**BANK, process_group=group)
    for step in range(STEPS):
        embeddings, target, _ = maps(ranks)
        own = images_of(step, rank)
        generator = torch.Generator().manual_seed(10 * step + rank)
        images = None if step == 0 else 2
        bank.update(embeddings[own] + step, target[own], images=images, generator=generator)
    with pytest.raises(ValueError if rank == 0 else RuntimeError, match="images|wrong"):
        bank.update(embeddings, target, images=1 if rank == 0 else 2 * ranks)
    return bank.keys, bank.labels


class Network(nn.Module):
    """A projection, and beside it a bank: what DistributedDataParallel finds in a model."""

    def __init__(self, group: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.projection = nn.Conv2d(4, 4, 1).double()
        self.bank = MemoryBank(**BANK, dtype=torch.float64)
        self.criterion = PixelContrastLoss(
            max_samples=12, max_views=2, groups="class", process_group=group
        )

    def forward(self, images: Tensor, target: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        embeddings = self.projection(images)
        loss: Tensor = self.criterion(
            embeddings, target, logits, generator=torch.Generator().manual_seed(1)
        )
        return loss, embeddings


def parallel_step(rank: int, ranks: int, group: Any) -> tuple[Tensor, ...]:
    """Value, gradient of the projection, and what is in banks that know of no other rank."""
    network = Network(group)
    parallel = DistributedDataParallel(network)
    embeddings, target, logits = maps(ranks)
    own = slice(2 * rank, 2 * rank + 2)
    for _ in range(2):
        with tritonloss.use_backend("triton"):
            value, projected = parallel(embeddings[own], target[own], logits[own])
        value.backward()
        before = network.bank.keys.clone()
        network.bank.update(projected, target[own])
        network.zero_grad()
        with tritonloss.use_backend("triton"):
            value, _ = parallel(embeddings[own], target[own], logits[own])
        value.backward()
    assert isinstance(network.projection.weight.grad, Tensor)
    labels = network.bank.labels
    assert rank == ranks - 1 or not torch.equal(before, network.bank.keys)
    return value.detach(), network.projection.weight.grad, labels


def alone(anchors: Tensor, labels: Tensor, *keys: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = anchors.clone().requires_grad_()
    with tritonloss.use_backend("reference"):
        value = pixel_contrast_loss(leaf, labels, *keys, **options)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.thorough)])
def test_ranks_share_one_batch(ranks: int, tmp_path: Path) -> None:
    """Batches are uneven where there are keys, one rank is void and one of three is empty."""
    found = of_ranks(ranks, run_on_one_rank, tmp_path, ranks)
    close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)
    expected, gradient = alone(*own_anchors(ranks))
    with_keys = {h: alone(*rows(sum(WORLDS[ranks]), 4), *rows(30, 5), hardest=h)
                 for h in (None, 0.4)}  # fmt: skip
    assert expected > 0 and all(value > 0 for value, _ in with_keys.values())
    for rank in range(ranks):
        for backend in BACKENDS:
            value, own = found[rank][f"own {backend}"]
            close(value, expected)
            close(own, ranks * gradient[8 * rank : 8 * rank + 8])
            for hardest, (right, slope) in with_keys.items():
                value, own = found[rank][f"keys {hardest} {backend}"]
                close(value, right)
                close(own, ranks * slope[part_of(ranks, rank)])
    check_banks(ranks, found)
    check_parallel(ranks, found)


def check_banks(ranks: int, found: list[Any]) -> None:
    """All ranks hold the same; of regions what one process with all images holds, in order."""
    bank = MemoryBank(**BANK)
    for step in range(STEPS):
        embeddings, target, _ = maps(ranks)
        shares = [images_of(step, rank) for rank in range(ranks)]
        embeddings, target = (torch.cat([x[own] for own in shares]) for x in (embeddings, target))
        bank.update(embeddings + step, target)
    keys, labels = found[0]["bank"]
    for rank in range(1, ranks):
        assert torch.equal(found[rank]["bank"][0], keys)
        assert torch.equal(found[rank]["bank"][1], labels)
    assert torch.equal(labels, bank.labels) and (labels >= 0).all()
    own = (x.view(3, 9, 4)[:, :5] for x in (keys, bank.keys))
    torch.testing.assert_close(*own)


def check_parallel(ranks: int, found: list[Any]) -> None:
    """DistributedDataParallel's gradient is that of one process; banks stay those of the ranks."""
    network = Network()
    embeddings, target, logits = maps(ranks)
    projected = network.projection(embeddings)
    anchors, labels = [], []
    for rank in range(ranks):
        own = slice(2 * rank, 2 * rank + 2)
        sampled = tritonloss.sample_anchors(
            projected[own], target[own], logits[own], max_samples=12, max_views=2,
            groups="class", generator=torch.Generator().manual_seed(1),
        )  # fmt: skip
        anchors.append(sampled.embeddings)
        labels.append(sampled.labels)
    with tritonloss.use_backend("reference"):
        expected = pixel_contrast_loss(torch.cat(anchors), torch.cat(labels))
    expected.backward()
    assert isinstance(network.projection.weight.grad, Tensor)
    for rank in range(ranks):
        value, gradient, bank_labels = found[rank]["parallel"]
        torch.testing.assert_close(value, expected.detach())
        torch.testing.assert_close(gradient, network.projection.weight.grad)
        assert bool((bank_labels >= 0).any()) == (rank < ranks - 1)  # the last one's are void

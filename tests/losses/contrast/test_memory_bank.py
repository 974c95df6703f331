"""The memory: rings against lists, nothing read before it is there, class 0, state, devices."""

from __future__ import annotations

import copy
from collections import deque
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tritonloss
from tritonloss import MemoryBank
from tritonloss.functional import pixel_contrast_loss

pytestmark = pytest.mark.parametrize("small_tiles", ["slices"], indirect=True)

CLASSES, DIMS = 4, 5


def batch(seed: int, images: int = 2, scale: int = 1) -> tuple[Tensor, Tensor]:
    """Embeddings, and labels of which class 3 is seldom there and 7 is none."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(images, DIMS, 6, 7, generator=generator)
    target = torch.randint(0, 3, (images, 6 * scale, 7 * scale), generator=generator)
    target[0, 0, : 7 * scale] = torch.tensor([255, -1, 7, 3, 2, 1, 0]).repeat_interleave(scale)
    target[:, 2] = 0
    target[1:, 3] = 255
    return embeddings, target


def kept(bank: MemoryBank, label: int) -> tuple[Tensor, Tensor]:
    """The regions and pixels of a class that are there, in the order of their places."""
    size = bank.size + bank.pixel_size
    own = slice(label * size, (label + 1) * size)
    rows, there = bank.keys[own].cpu(), bank.labels[own].cpu() == label
    assert set(bank.labels[own].tolist()) <= {-1, label}
    return rows[: bank.size][there[: bank.size]], rows[bank.size :][there[bank.size :]]


def same_rows(found: Tensor, expected: list[Tensor]) -> None:
    """The same rows in whatever order."""
    assert len(found) == len(expected)
    if expected:
        distance = torch.cdist(found.double(), torch.stack(expected).double())
        assert (distance.min(0).values < 1e-6).all() and (distance.min(1).values < 1e-6).all()


@pytest.mark.parametrize("scale", [1, 3])
def test_queues_hold_the_newest_regions_and_pixels(scale: int, device: torch.device) -> None:
    bank = MemoryBank(CLASSES, 3, DIMS, pixel_size=8, pixels=3, device=device)
    regions: list[deque[Tensor]] = [deque(maxlen=3) for _ in range(CLASSES)]
    newest: list[list[Tensor]] = [[] for _ in range(CLASSES)]
    for step in range(6):
        embeddings, target = batch(step, images=1 + step % 3, scale=scale)
        bank.update(embeddings.to(device), target.to(device))
        near = F.interpolate(target[:, None].double(), size=(6, 7))[:, 0]
        for image in range(len(embeddings)):
            for c in range(CLASSES):
                own = embeddings[image][:, near[image] == c]
                if own.size(1):
                    regions[c].append(F.normalize(own.mean(1), dim=0))
                    newest[c] += [own.T] * min(3, own.size(1))
        for c in range(CLASSES):
            found, pixels = kept(bank, c)
            same_rows(found, list(regions[c]))
            # Each is one of the pixels that can have taken its place.
            assert len(pixels) == min(8, len(newest[c]))
            candidates = torch.cat(newest[c][-8:] or [torch.zeros(0, DIMS)])
            if len(pixels):
                distance = torch.cdist(pixels.double(), F.normalize(candidates).double())
                assert (distance.min(1).values < 1e-6).all()
    assert len(kept(bank, 0)[0]) == 3  # class 0 is one


def test_more_than_there_is_room_for(device: torch.device) -> None:
    """Of a batch of 5 images the last 2 regions are kept, the pointer goes on where it must."""
    bank = MemoryBank(CLASSES, 2, DIMS, pixel_size=3, pixels=4, device=device)
    for step in range(3):
        embeddings, target = batch(step, images=5)
        bank.update(embeddings.to(device), target.to(device))
        expected = []
        for image in (3, 4):
            own = embeddings[image][:, target[image] == 0]
            expected.append(F.normalize(own.mean(1), dim=0))
        same_rows(kept(bank, 0)[0], expected)
        assert len(kept(bank, 0)[1]) == 3


def test_pixels_are_drawn_at_random_and_repeatably(device: torch.device) -> None:
    embeddings, target = (x.to(device) for x in batch(0))
    draws = []
    for seed in (1, 1, 2):
        bank = MemoryBank(CLASSES, 4, DIMS, device=device)
        bank.update(embeddings, target, generator=torch.Generator(device).manual_seed(seed))
        draws.append(bank.keys.clone())
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_an_empty_bank_has_no_keys_and_a_part_is_a_part(backend: str, device: torch.device) -> None:
    bank = MemoryBank(CLASSES, 6, DIMS, device=device)
    anchors = torch.randn(20, DIMS, device=device, requires_grad=True)
    labels = torch.arange(20, device=device) % CLASSES
    with tritonloss.use_backend(backend):
        value = pixel_contrast_loss(anchors, labels, bank.keys, bank.labels)
        (gradient,) = torch.autograd.grad(value, anchors)
        assert value == 0 and not gradient.any()
        bank.update(*(x.to(device) for x in batch(0)))
        there = bank.labels >= 0
        assert 0 < int(there.sum()) < len(there)
        value = pixel_contrast_loss(anchors, labels, bank.keys, bank.labels, temperature=0.5)
        expected = pixel_contrast_loss(
            anchors, labels, bank.keys[there], bank.labels[there], temperature=0.5
        )
    torch.testing.assert_close(value, expected)


def regular(embedding: Tensor, label: Tensor) -> Tensor:
    """The mean over the pixels of class 0 that are numbers."""
    return embedding[:, (label == 0) & embedding.isfinite().all(0)].mean(1).cpu()


def test_what_is_not_finite_is_not_kept(device: torch.device) -> None:
    bank = MemoryBank(CLASSES, 4, DIMS, device=device)
    embeddings, target = (x.to(device) for x in batch(0))
    embeddings[0, :, target[0] == 1] = float("nan")
    embeddings[0, 2, 2, 3] = float("inf")
    embeddings = embeddings.masked_fill(((target < 0) | (target > 3))[:, None], float("nan"))
    bank.update(embeddings, target)
    assert bank.keys.isfinite().all()
    assert [len(kept(bank, c)[0]) for c in range(3)] == [2, 1, 2]
    assert F.cosine_similarity(kept(bank, 0)[0][:1], regular(embeddings[0], target[0])) > 1 - 1e-6


def test_void_and_empty_batches_change_nothing(device: torch.device) -> None:
    bank = MemoryBank(CLASSES, 4, DIMS, device=device)
    bank.update(*(x.to(device) for x in batch(0)))
    before = copy.deepcopy(bank.state_dict())
    embeddings, target = (x.to(device) for x in batch(1))
    bank.update(embeddings, torch.full_like(target, 255))
    bank.update(embeddings[:0], target[:0])
    for name, tensor in bank.state_dict()["_extra_state"].items():
        assert torch.equal(tensor, before["_extra_state"][name])


def test_state_copies_and_dtypes(device: torch.device) -> None:
    bank = MemoryBank(CLASSES, 4, DIMS, device=device)
    for step in range(3):
        bank.update(*(x.to(device) for x in batch(step)))
    network = nn.ModuleDict({"bank": bank})
    assert not list(network.buffers()) and not list(network.parameters())
    other = nn.ModuleDict({"bank": MemoryBank(CLASSES, 4, DIMS, device=device)})
    other.load_state_dict(network.state_dict())
    embeddings, target = (x.to(device) for x in batch(7))
    for twin in (other["bank"], copy.deepcopy(bank)):
        assert isinstance(twin, MemoryBank)
        assert torch.equal(twin.keys, bank.keys) and torch.equal(twin.labels, bank.labels)
        twin.update(embeddings, target)
        assert not torch.equal(twin.keys, bank.keys)  # it has tensors of its own
    for dtype in (torch.bfloat16, torch.float64):
        moved = copy.deepcopy(network).to(dtype)["bank"]
        assert isinstance(moved, MemoryBank)
        assert moved.keys.dtype == dtype and moved.labels.dtype == torch.int32
        assert torch.equal(moved.keys, bank.keys.to(dtype))
        moved.update(embeddings, target)
    with pytest.raises(ValueError, match="a bank's rows must have the shape"):
        MemoryBank(CLASSES, 5, DIMS).load_state_dict(bank.state_dict())
    assert repr(bank) == "MemoryBank(classes=4, size=4, dim=5, pixel_size=4, pixels=10)"


def test_an_update_before_the_backward_pass_is_refused(device: torch.device) -> None:
    bank = MemoryBank(CLASSES, 4, DIMS, device=device)
    bank.update(*(x.to(device) for x in batch(0)))
    anchors = torch.randn(20, DIMS, device=device, requires_grad=True)
    labels = torch.arange(20, device=device) % CLASSES
    with tritonloss.use_backend("triton"):
        value = pixel_contrast_loss(anchors, labels, bank.keys, bank.labels)
    bank.update(*(x.to(device) for x in batch(1)))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_autocast_changes_nothing(device: torch.device) -> None:
    embeddings, target = (x.to(device) for x in batch(0))
    banks = []
    for enabled in (False, True):
        bank = MemoryBank(CLASSES, 4, DIMS, device=device)
        generator = torch.Generator(device).manual_seed(0)
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            bank.update(embeddings, target, generator=generator)
        banks.append(bank)
    assert torch.equal(banks[0].keys, banks[1].keys)


def test_wrong_arguments() -> None:
    embeddings, target = batch(0)
    right: dict[str, Any] = {"classes": 4, "size": 5, "dim": 6}
    for wrong in (
        {"classes": 0}, {"size": 0}, {"dim": 513}, {"pixel_size": 0}, {"pixels": 1.5},
        {"ignore_index": "255"}, {"classes": 300, "size": 1}, {"dtype": torch.int32},
        {"process_group": 1},
    ):  # fmt: skip
        name = "ignore_index" if wrong.get("classes") == 300 else next(iter(wrong))
        with pytest.raises((TypeError, ValueError), match=f"^{name} must be"):
            MemoryBank(**{**right, **wrong})
    bank = MemoryBank(4, 5, 6)
    with pytest.raises(ValueError, match="embeddings must have D of 6, as the bank; got float32"):
        bank.update(embeddings, target)
    with pytest.raises(ValueError, match="embeddings must be on the device of the bank"):
        MemoryBank(4, 5, DIMS).update(embeddings.to("meta"), target.to("meta"))

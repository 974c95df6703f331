"""The module: maps in, the loss of sampled anchors out, with a bank and without one."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

import tritonloss
from tests.oracle import LAYOUTS, as_layout
from tritonloss import MemoryBank, PixelContrastLoss, sample_anchors
from tritonloss.functional import pixel_contrast_loss

pytestmark = pytest.mark.parametrize("small_tiles", ["slices"], indirect=True)


def maps(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    embeddings = F.normalize(torch.randn(2, 6, 8, 9, generator=generator)).to(device)
    target = torch.randint(0, 4, (2, 16, 18), generator=generator)
    target[0, :3] = 255
    return embeddings, target.to(device), torch.randn(2, 4, 8, 9, generator=generator).to(device)


def bank_for(device: torch.device) -> MemoryBank:
    bank = MemoryBank(4, 5, 6, pixels=4, device=device)
    embeddings, target, _ = maps(device)
    bank.update(embeddings.flip(2), target.flip(1))
    return bank


def step(criterion: PixelContrastLoss, bank: MemoryBank | None, *given: Tensor) -> Any:
    leaf = given[0].detach().requires_grad_()
    generator = torch.Generator(leaf.device).manual_seed(1)
    with tritonloss.use_backend("triton"):
        value = criterion(leaf, *given[1:], bank, generator=generator)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


class Waiting(TorchDispatchMode):
    """Refuses what on a GPU would wait for it: looking at a value, shapes that depend on values."""

    refused = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(name in func.name() for name in self.refused), func.name()
        if func.name() in ("aten::index.Tensor", "aten::index_put_"):
            assert not any(x is not None and x.dtype == torch.bool for x in args[1])
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device(device: torch.device) -> None:
    """Sampling, the loss (as one operator) and the update."""
    embeddings, target, logits = maps(device)
    bank, leaf = bank_for(device), embeddings.requires_grad_()
    for keys, hardest in ((None, None), (bank, None), (bank, 0.3)):
        criterion = PixelContrastLoss(max_samples=30, max_views=4, hardest=hardest)
        with tritonloss.use_backend("triton"), launches_left_out(), Waiting():
            criterion(leaf, target, logits, keys).backward()
            bank.update(leaf, target)


@contextmanager
def launches_left_out() -> Iterator[None]:
    """In the interpreter, which looks at values, no kernel runs."""
    if torch.cuda.is_available():
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", lambda *_, **__: None)
        yield


@pytest.mark.gpu
def test_nothing_waits_for_a_gpu(device: torch.device) -> None:
    embeddings, target, logits = maps(device)
    bank, leaf = bank_for(device), embeddings.requires_grad_()
    criterion = PixelContrastLoss(max_samples=30, max_views=4)
    for checked in (False, True):
        torch.cuda.set_sync_debug_mode("error" if checked else "default")
        try:
            criterion(leaf, target, logits, bank).backward()
            criterion(leaf, target, logits).backward()
            bank.update(leaf, target)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("with_bank", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS[:4])
def test_it_is_the_function_of_sampled_anchors(
    layout: str, with_bank: bool, device: torch.device
) -> None:
    embeddings, target, logits = (as_layout(x, layout) for x in maps(device))
    bank = bank_for(device) if with_bank else None
    options: dict[str, Any] = {"hardest": 0.5} if with_bank else {}
    criterion = PixelContrastLoss(max_samples=40, max_views=5, temperature=0.3, **options)
    value, gradient = step(criterion, bank, embeddings, target, logits)

    leaf = embeddings.detach().double().requires_grad_()
    anchors, labels = sample_anchors(
        leaf, target, logits, max_samples=40, max_views=5,
        generator=torch.Generator(device).manual_seed(1),
    )  # fmt: skip
    keys = () if bank is None else (bank.keys, bank.labels)
    with tritonloss.use_backend("reference"):
        expected = pixel_contrast_loss(anchors, labels, *keys, temperature=0.3, **options)
    (right,) = torch.autograd.grad(expected, leaf)
    torch.testing.assert_close(value.double(), expected.detach(), rtol=2e-6, atol=2e-6)
    assert (gradient.double() - right).abs().max() <= 4e-6 * right.abs().max()
    assert 0 < int((gradient != 0).any(1).sum()) <= 40


def test_copies_and_options(device: torch.device) -> None:
    given = maps(device)
    criterion = PixelContrastLoss(max_samples=30, max_views=4, strategy="hard", ignore_index=None)
    expected = step(criterion, None, *given)
    for made in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        found = step(made, None, *given)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
        assert repr(made) == repr(criterion)
    assert "strategy='hard'" in repr(criterion) and "ignore_index=None" in repr(criterion)
    own = inspect.signature(PixelContrastLoss).parameters
    for function in (sample_anchors, pixel_contrast_loss):
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.kind is parameter.KEYWORD_ONLY and name != "generator":
                assert own[name].default == parameter.default
    for wrong in (
        {"max_samples": 0}, {"strategy": "soft"}, {"temperature": 0.0}, {"precision": "half"},
        {"process_group": 1},
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=f"^{next(iter(wrong))} must be"):
            PixelContrastLoss(**wrong)


def test_a_few_steps_of_training_bring_classes_apart(device: torch.device) -> None:
    """A projection learns to tell classes by their features, with keys from the bank."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 8, generator=generator)
    target = torch.randint(0, 4, (2, 9, 10), generator=generator)
    features = centres[target].movedim(-1, 1) + torch.randn(2, 8, 9, 10, generator=generator)
    features, target = features.to(device), target.to(device)
    torch.manual_seed(0)
    network = nn.Conv2d(8, 6, 1).to(device)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.1)
    criterion = PixelContrastLoss(max_samples=64, max_views=16, groups="class")
    bank = MemoryBank(4, 4, 6, pixels=4, device=device)
    losses = []
    for _ in range(12):
        embeddings = F.normalize(network(features))
        with tritonloss.use_backend("triton"):
            loss = criterion(embeddings, target, target, bank)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        bank.update(embeddings, target)
        losses.append(float(loss.detach()))
    assert losses[0] == 0 and losses[-1] < 0.7 * losses[1]

"""Adaptive affinity fields: weights of the sizes that are trained against the network."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tritonloss
from tests.losses.affinity.oracle import loss_by_definition
from tests.oracle import segmentation_case
from tritonloss import AdaptiveAffinityFieldLoss, AffinityFieldLoss
from tritonloss.functional import affinity_field_loss


def scored(classes: int, **options: Any) -> AdaptiveAffinityFieldLoss:
    """A criterion whose weights are no longer all the same."""
    criterion = AdaptiveAffinityFieldLoss(classes, **options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in criterion.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return criterion


def test_equal_weights_at_first(device: torch.device) -> None:
    """A third of each size, before anything is learnt."""
    logits, target = segmentation_case((1, 3, 8, 9), device=device)
    criterion = AdaptiveAffinityFieldLoss(3).to(device)
    with tritonloss.use_backend("triton"):
        found = criterion(logits, target)
        expected = sum(affinity_field_loss(logits, target, size=s) for s in (1, 2, 3)) / 3
    torch.testing.assert_close(found, expected)


@pytest.mark.parity
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_the_weights_oppose_the_network(backend: str, device: torch.device) -> None:
    """The logits' gradient is the definition's; that of the weights' scores has the other sign."""
    logits, target = segmentation_case((1, 3, 6, 7), dtype=torch.float64, device=device)
    criterion = scored(3, sizes=(1, 2), margin=2.0, edge_weight=0.5, decay=0.25).double().to(device)
    leaf = logits.clone().requires_grad_()
    with tritonloss.use_backend(backend):
        value = criterion(leaf, target)
        value.backward()
    twin = logits.clone().requires_grad_()
    scores = [p.detach().clone().requires_grad_() for p in criterion.parameters()]
    expected = 0.25 * loss_by_definition(
        twin, target, sizes=(1, 2), margin=2.0, weights=(0.5, 1.0),
        tables=(scores[0].softmax(1), scores[1].softmax(1)),
    )  # fmt: skip
    expected.backward()
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(leaf.grad, twin.grad, rtol=1e-8, atol=1e-12)
    for parameter, score in zip(criterion.parameters(), scores, strict=True):
        assert (score.grad != 0).any()
        torch.testing.assert_close(parameter.grad, -score.grad, rtol=1e-8, atol=1e-12)


def test_one_optimizer_for_both(device: torch.device) -> None:
    """A step makes the loss smaller by the logits, and larger by the weights."""
    logits, target = segmentation_case((1, 3, 8, 9), device=device)
    criterion = scored(3).to(device)
    network = nn.Conv2d(3, 3, 1).to(device)
    together = nn.ModuleList([network, criterion])
    optimizer = torch.optim.SGD(together.parameters(), lr=0.05)

    def loss(one: nn.Module, other: nn.Module) -> Tensor:
        with tritonloss.use_backend("triton"), torch.no_grad():
            return other(one(logits), target)

    before = copy.deepcopy(network), copy.deepcopy(criterion)
    with tritonloss.use_backend("triton"):
        criterion(network(logits), target).backward()
    optimizer.step()
    assert loss(network, before[1]) < loss(*before)
    assert loss(before[0], criterion) > loss(*before)


def test_it_is_kept_and_copied(device: torch.device) -> None:
    logits, target = segmentation_case((1, 3, 6, 7), device=device)
    criterion = scored(3, sizes=(1, 2), void="pair").to(device)
    twin = AdaptiveAffinityFieldLoss(3, sizes=(1, 2), void="pair").to(device)
    twin.load_state_dict(criterion.state_dict())
    assert sorted(criterion.state_dict()) == ["edge_scores", "non_edge_scores"]
    with tritonloss.use_backend("triton"):
        expected = criterion(logits, target)
        for other in (twin, copy.deepcopy(criterion)):
            assert torch.equal(other(logits, target), expected)
    assert repr(criterion).startswith("AdaptiveAffinityFieldLoss(3, sizes=(1, 2), margin=3.0")


def test_compile_without_a_graph_break(device: torch.device) -> None:
    torch._dynamo.reset()
    logits, target = segmentation_case((1, 2, 4, 5), device=device)
    criterion = scored(2, sizes=(1, 2)).to(device)
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    compiled = torch.compile(criterion, fullgraph=True, backend=backend)
    with tritonloss.use_backend("triton"):
        expected = torch.autograd.grad(criterion(logits, target), tuple(criterion.parameters()))
        found = torch.autograd.grad(compiled(logits, target), tuple(criterion.parameters()))
    torch.testing.assert_close(found, expected)


def test_a_schedule_of_the_decay(device: torch.device) -> None:
    """A module's decay may be set at every step."""
    logits, target = segmentation_case((1, 3, 6, 7), device=device)
    for criterion in (AffinityFieldLoss(), AdaptiveAffinityFieldLoss(3, sizes=(1,)).to(device)):
        with tritonloss.use_backend("triton"):
            first = criterion(logits, target)
            criterion.decay = 10 ** (-1 / 2)
            torch.testing.assert_close(criterion(logits, target), first * 10**-0.5)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((1,), {}, "classes must be an integer from 2"),
        ((3,), {"sizes": (1, 1)}, "sizes must be an integer or a tuple of different ones"),
        ((3,), {"sizes": (0,)}, "sizes must be an integer from 1 to 64"),
        ((3,), {"margin": -1.0}, "margin must be a number in"),
        ((3,), {"void": "both"}, "void must be one of"),
        ((300,), {}, "ignore_index must be given for 300 classes"),
    ],
)
def test_wrong_options_are_named(
    arguments: tuple[int, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        AdaptiveAffinityFieldLoss(*arguments, **options)


def test_logits_of_other_classes_are_named() -> None:
    logits, target = segmentation_case((1, 4, 6, 7))
    with pytest.raises(ValueError, match=r"^logits must have 3 classes.* \(1, 4, 6, 7\)"):
        AdaptiveAffinityFieldLoss(3)(logits, target)

"""The reference, which computes on the CPU, under torch.compile with symbolic sizes and numbers."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

import tritonloss
from tests.oracle import segmentation_case
from tests.slices import OF_MAPS, as_a_number, with_more
from tritonloss._core.example import Example

WAYS = with_more(OF_MAPS, {"focal_loss": {"one alpha": {"options": {"alpha": 0.3}}}})
# Ways that differ only in their kernels are one way to the reference.
DISTINCT = {(way.function, str(way.options)): way for way in reversed(WAYS.values())}
# One of each room, but for those whose graphs take longest.
SLOW = ("structural_similarity", "weighted_sum", "affinity_field", "ssim", "ssim_loss")
FIRST = {
    way.function.__module__.rpartition(".")[0]: way
    for way in DISTINCT.values()
    if way.operator.name not in SLOW
}


def numbers_of(example: Example) -> dict[str, Any]:
    """The example's options, and all of its function's fractions, none of them at its default."""
    parameters = inspect.signature(example.function).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    return {
        name: 1.1 * value if isinstance(value, float) else value
        for name, value in {**defaults, **example.options}.items()
        if isinstance(value, float) or name in example.options
    }


@pytest.mark.parametrize(
    "way",
    [
        pytest.param(way, id=way.name, marks=() if way in FIRST.values() else pytest.mark.thorough)
        for way in reversed(DISTINCT.values())
    ],
)
def test_the_reference_compiles_with_symbolic_sizes(way: Example) -> None:
    """Several sizes go through one graph, with options that come in as arguments."""
    torch._dynamo.reset()
    options = numbers_of(way)

    def loss(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
        return as_a_number(way(logits, target, **options))

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    with tritonloss.use_backend("reference"):
        for height, width in ((9, 12), (11, 10), (14, 9)):
            logits, target = segmentation_case((2, 3, height, width))
            results = []
            for function in (loss, compiled):
                leaf = logits.clone().requires_grad_()
                value = function(leaf, target, **options)
                results.append((value.detach(), *torch.autograd.grad(value, leaf)))
            torch.testing.assert_close(results[1], results[0])

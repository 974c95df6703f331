"""The reference, which serves the CPU, under torch.compile with symbolic sizes and numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import tritonloss
from tests.oracle import segmentation_case
from tritonloss.functional import (
    binary_cross_entropy,
    cross_entropy,
    focal_loss,
    margin_calibrated_loss,
    rmi_loss,
    ssim,
    ssim_loss,
    structural_similarity_loss,
)

OFFSETS = (torch.tensor([0.1, 0.5, 0.3]), torch.tensor([0.2, 0.4, 0.6]))

LOSSES: dict[str, Callable[..., Tensor]] = {
    "statistics": lambda x, t, **o: tritonloss.gaussian_statistics(x, **o)[1].sum(),
    "structural_similarity": structural_similarity_loss,
    "ssim_loss": ssim_loss,
    "ssim": lambda x, t, **o: ssim(x, x.detach().flip(-1), **o),
    "rmi": rmi_loss,
    "cross_entropy": cross_entropy,
    "binary_cross_entropy": binary_cross_entropy,
    "focal": focal_loss,
    "margin": lambda x, t, **o: margin_calibrated_loss(x, t, OFFSETS, **o),
}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("statistics", {"window_size": 5, "sigma": 0.9, "padding": "reflect"}),
    ("structural_similarity", {"sigma": 1.1, "beta": 0.2, "stability": 0.02, "bce_weight": 0.3}),
    ("ssim_loss", {"window_size": 3, "sigma": 1.1, "c1": 2e-4, "form": "contrast_structure"}),
    ("ssim", {"window_size": 3, "sigma": 1.1, "data_range": 2.5}),
    ("rmi", {"region_size": 2, "pool_size": 2, "epsilon": 2e-6, "bce_weight": 0.3}),
    ("cross_entropy", {"label_smoothing": 0.15}),
    ("binary_cross_entropy", {}),
    ("focal", {"gamma": 1.7, "alpha": 0.3}),
    ("margin", {"variant": "released"}),
]


@pytest.mark.parametrize(("name", "options"), CASES, ids=[name for name, _ in CASES])
def test_the_reference_compiles_with_symbolic_sizes(name: str, options: dict[str, Any]) -> None:
    """Several sizes in a row, in one graph, with options that come in as arguments."""
    torch._dynamo.reset()
    loss = LOSSES[name]
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

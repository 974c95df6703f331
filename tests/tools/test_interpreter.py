"""Triton's interpreter as it is hastened computes what it computes anyway."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from tests.oracle import segmentation_case, value_and_gradients
from tritonloss.functional import (
    confusion_matrix,
    cross_entropy,
    margin_calibrated_loss,
    structural_similarity_loss,
)

pytestmark = pytest.mark.parity

ROOT = Path(__file__).parents[2]


@triton.jit
def _numbers_kernel(values_ptr, integers_ptr, results_ptr, wholes_ptr):
    """Operations of numbers that are equal but not the same, and of integers that overflow."""
    place = tl.arange(0, 4)
    values = tl.load(values_ptr + place)
    integers = tl.load(integers_ptr + place)
    first = tl.load(values_ptr)

    tl.store(results_ptr + place, tl.where(place < 2, 0.0, values))
    tl.store(results_ptr + 4 + place, tl.where(place < 2, -0.0, values))
    tl.store(results_ptr + 8 + place, values * 0.0 + -0.0 * values)
    tl.store(results_ptr + 12 + place, integers * 1.0 + integers * 1)
    tl.store(results_ptr + 16 + place, tl.maximum(values, 0) - tl.minimum(0.0, first))
    tl.store(results_ptr + 20 + place, (2 - values) / (values - 2) + 1 / first)
    tl.store(wholes_ptr + place, integers + 2147483647)
    tl.store(wholes_ptr + 4 + place, integers * integers - 1)
    tl.store(wholes_ptr + 8 + place, integers // 3 + integers % 3 + (integers >> 1))
    tl.store(wholes_ptr + 12 + place, (integers > 0).to(tl.int32) + (values < 0.5) + (place == 1))


def digits() -> str:
    """What kernels compute: strips, pixels and cells, broadcasts, casts, integers, numbers."""
    results, wholes = torch.empty(24), torch.empty(16, dtype=torch.int32)
    values, integers = torch.tensor([-1.5, 0.0, 0.25, 3.0]), torch.tensor([-7, 65537, 5, 100])
    _numbers_kernel[(1,)](values, integers.int(), results, wholes)

    logits, target = segmentation_case((1, 3, 5, 6), dtype=torch.float16)
    offsets = (torch.ones(3), torch.ones(3))
    lines = [str(results.tolist()), str(wholes.tolist())]
    lines.append(str(confusion_matrix(logits, target).tolist()))
    for loss in (
        lambda x: cross_entropy(x[..., ::2, ::2], target, upsample="bilinear"),
        lambda x: structural_similarity_loss(x, target),
        lambda x: margin_calibrated_loss(x, target, offsets, reduction="none"),
    ):
        outputs, gradients = value_and_gradients(loss, [logits], "triton")
        lines += [str(tensor.double().tolist()) for tensor in (*outputs, *gradients)]
    return "\n".join(lines)


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are compiled for the GPU, not interpreted"
)
def test_the_hastened_interpreter_gives_the_same_bits() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-m", "tests.tools.test_interpreter"]
    plain = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert plain.stdout.strip() == digits()


if __name__ == "__main__":
    print(digits())
    # Who does not compile does not wait for torch.compile, whose import takes a second.
    assert "torch._dynamo" not in sys.modules

"""Triton's interpreter as it is hastened computes what it computes anyway."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.oracle import segmentation_case, value_and_gradients
from tritonloss.functional import margin_calibrated_loss, structural_similarity_loss

pytestmark = pytest.mark.parity

ROOT = Path(__file__).parents[2]


def digits() -> str:
    """Values and gradients of two losses: strips and pixels, broadcasts, casts, integers."""
    logits, target = segmentation_case((1, 3, 5, 6), dtype=torch.float16)
    offsets = (torch.ones(3), torch.ones(3))
    lines = []
    for loss in (
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

"""Extra memory of a training step, counted at full size through autograd."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from perf.measuring.counted import of_kernels
from perf.measuring.memory import allocated_peak
from perf.operations.contract import SHAPES, Case, Shape, operations
from perf.operations.upsampling import low_resolution
from tests.perf.made import ROOT

CITYSCAPES = (4, 19, 1024, 2048)
ROOMS = (16, 150, 512, 512)
VOC = (16, 21, 513, 513)
BOTH = ("float32", "bfloat16")

# operation, options, shape, dtype, at most so many times the logits
Limit = tuple[str, dict[str, Any], tuple[int, ...], str, float]
LIMITS: list[Limit] = [
    *(("cross_entropy", {}, CITYSCAPES, *most) for most in zip(BOTH, (1.06, 1.11), strict=True)),
    *(("focal_loss", {}, CITYSCAPES, *most) for most in zip(BOTH, (1.06, 1.11), strict=True)),
    # Two numbers of four bytes beside 19 logits: 1.1053 and 1.2105.
    *(
        ("margin_calibrated_loss", {}, CITYSCAPES, *most)
        for most in zip(BOTH, (1.106, 1.211), strict=True)
    ),
    *(("binary_cross_entropy", {}, CITYSCAPES, dtype, 1.001) for dtype in BOTH),
    *(
        ("affinity_field_loss", {"size": size}, CITYSCAPES, dtype, 1.001)
        for size in (1, (1, 2, 3))
        for dtype in BOTH
    ),
    *(
        ("structural_similarity_loss", {"window_size": window}, CITYSCAPES, dtype, 1.001)
        for window in (1, 3, 5, 7, 9, 11, 15, 31)
        for dtype in BOTH
    ),
    # Logits of a quarter of the resolution take 4.75 bytes per pixel of the labels, half in
    # bfloat16: 1.8421, 2.6842. Of 150 classes they take 37.5: 1.1067.
    *(
        (f"{loss}_upsampled", {}, CITYSCAPES, *most)
        for loss in ("cross_entropy", "focal_loss")
        for most in zip(BOTH, (1.844, 2.687), strict=True)
    ),
    ("margin_calibrated_loss_upsampled", {}, CITYSCAPES, "float32", 2.687),
    ("cross_entropy_upsampled", {}, ROOMS, "float32", 1.108),
    *(("binary_cross_entropy_upsampled", {}, CITYSCAPES, dtype, 1.002) for dtype in BOTH),
    # A scratch of 256 MiB at the most: 0.422 and 0.843.
    ("ssim_loss", {"window_size": 11}, CITYSCAPES, "float32", 1.422),
    ("ssim_loss", {"window_size": 3}, CITYSCAPES, "bfloat16", 1.843),
    # Of 34 planes, 513 pixels wide and high: 0.3036.
    ("ssim_loss", {"window_size": 11}, VOC, "float32", 1.304),
    # Two pooled maps in float32, and a little on top: 1.1108 and 1.2216.
    *(("rmi_loss", {}, CITYSCAPES, *most) for most in zip(BOTH, (1.112, 1.223), strict=True)),
    ("rmi_loss", {}, (1, *CITYSCAPES[1:]), "float32", 1 + 2 / 16 + 0.01),
    ("rmi_loss", {}, VOC, "float32", 1 + 2 / 16 + 0.01),
    ("rmi_loss", {"pool_size": 2}, CITYSCAPES, "float32", 1 + 2 / 4 + 0.01),
    ("rmi_loss", {"pooling": None}, VOC, "float32", 1.05),
    ("rmi_loss", {"region_size": 5, "pooling": None}, (1, 2, 513, 513), "float32", 1.25),
    # Of 1024 anchors beside 190 000 keys: 16 sums of the anchors' size in float32, 17.2 MiB.
    ("pixel_contrast_loss", {}, (1024, 256, 1, 1), "bfloat16", 34.6),
    ("pixel_contrast_loss", {"own": True}, (1024, 256, 1, 1), "float32", 9.1),
]


def case_of(limit: Limit) -> Case:
    name, options, (batch, classes, height, width), dtype, _ = limit
    first = operations([name])[0].cases[0]
    shape = Shape("counted", batch, classes, height, width)
    return replace(first, shape=shape, dtype=dtype, options={**first.options, **options})


def measured() -> list[int]:
    """Bytes of every limit's case; for a process that runs no interpreter."""
    return [of_kernels(operations([limit[0]])[0], case_of(limit)) for limit in LIMITS]


@pytest.fixture(scope="module")
def counted() -> list[int]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = "import json; from tests.perf import test_memory as t; print(json.dumps(t.measured()))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, check=True, capture_output=True
    )
    found: list[int] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.compile_only
@pytest.mark.parametrize("index", range(len(LIMITS)), ids=lambda i: "-".join(map(str, LIMITS[i])))
def test_extra_memory(index: int, counted: list[int]) -> None:
    """It is the gradient, what is saved, scratch, and nothing that no result needs."""
    limit = LIMITS[index]
    case = case_of(limit)
    shape = case.shape if case.ratio is None else low_resolution(case).shape
    logits = shape.elements * case.torch_dtype.itemsize
    assert logits <= counted[index] <= limit[-1] * logits


def test_the_allocator_is_asked_for_all_that_is_alive() -> None:
    x = torch.ones(1000, requires_grad=True)

    def three_of_which_two_at_once() -> None:
        first = torch.empty(1000)
        del first
        second, third = torch.empty(1000), torch.empty(1000)
        del second, third

    assert allocated_peak(three_of_which_two_at_once) == 2 * 4000
    assert allocated_peak(lambda: None) == 0
    # Autograd's own: what exp saves, its gradient and that of the sum.
    assert allocated_peak(lambda: torch.autograd.grad(x.exp().sum(), x)) >= 2 * 4000


def test_sizes_are_those_of_the_goals() -> None:
    assert SHAPES["cityscapes"].size == CITYSCAPES and SHAPES["voc"].size == VOC

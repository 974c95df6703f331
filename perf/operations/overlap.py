"""Cases, bytes and goals of the losses of overlap, which all have the same two passes."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

import kernels_reference
from perf.operations.contract import (
    SHAPES,
    Case,
    Given,
    KernelNotes,
    LoopNotes,
    Operation,
    variations,
)
from perf.operations.pixel_cases import class_loop, floor, inputs, outputs
from tritonloss.overlap.dice import dice_loss
from tritonloss.overlap.scores import OVERLAP, Options


def _launched(case: Case, tensors: tuple[Tensor, ...]) -> None:
    """Both passes of the mean dice score: other scores differ in the head alone."""
    logits, target = tensors
    options = Options(smooth=5e-6, ignore_index=255)._replace(**case.options)
    OVERLAP.both_passes(logits, target, None, options=options)


def _rounds(given: Given) -> float:
    return float(given["rounds"])


def _forward_outputs(given: Given) -> float:
    return outputs(given) * _rounds(given)


CASES = variations(
    Case(SHAPES["cityscapes"], labels="uint8", against_compile=True),
    {"dtype": "bfloat16"},
    {"layout": "channels_last"},
    {"shape": SHAPES["ade20k"]},
    {"shape": SHAPES["voc"]},
)
SHIPPED = variations(
    replace(CASES[0], everywhere=True, against_compile=False),
    {"dtype": "bfloat16"},
    {"dtype": "float16"},
    {"shape": SHAPES["ade20k"]},
    {"layout": "channels_last"},
    {"shape": SHAPES["voc"]},
    {"shape": SHAPES["cityscapes"], "options": {"activation": "sigmoid"}},
)
KERNELS = {
    "_class_sums_forward_kernel": KernelNotes(
        _forward_outputs,
        (
            LoopNotes("tiles", "_class_sums_forward_kernel.i", _rounds),
            class_loop("statistics", "_fold_blocks"),
            class_loop("classes", "_sum_blocks"),
        ),
    ),
    "_class_head_kernel": KernelNotes(
        lambda given: 1.0,
        (
            LoopNotes("parts", "add_parts", lambda given: 1.0),
            LoopNotes("groups", "finish_loss", lambda given: 1.0),
            LoopNotes("images", "_classes_of", lambda given: 1.0),
        ),
    ),
    "_class_sums_backward_kernel": KernelNotes(
        outputs,
        (class_loop("projection", "_project_blocks"), class_loop("classes", "write_gradients")),
    ),
}
OPERATIONS = (
    Operation(
        name="dice_loss",
        function=dice_loss,
        reference=kernels_reference.dice_loss,
        inputs=inputs,
        launch=_launched,
        floor=floor,
        cases=CASES,
        shipped=SHIPPED,
        kernels=KERNELS,
        operators=("class_sums_forward", "class_sums_backward"),
    ),
)

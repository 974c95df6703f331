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
    Shape,
    rarely,
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
# As many as stay in registers; a kernel that has more is another one.
_HELD = Shape("held", 4, 32, 512, 1024)
_ONCE = {"everywhere": False}
SHIPPED = variations(
    replace(CASES[0], everywhere=True, against_compile=False),
    {"shape": SHAPES["ade20k"]},
    {"dtype": "bfloat16", **_ONCE},
    {"shape": _HELD, **_ONCE},
    {"layout": "channels_last", **_ONCE},
    {"shape": SHAPES["voc"], **_ONCE},
    {"options": {"activation": "sigmoid"}, **_ONCE},
    {"shape": SHAPES["binary"], "options": {"activation": "sigmoid"}, **_ONCE},
)
RARE = rarely(
    SHIPPED[0],
    {"dtype": "float16"},
    {"dtype": "float64"},
    {"layout": "strided"},
    *({"labels": labels} for labels in ("int16", "int32", "int64")),
    *({"shape": shape, "dtype": "bfloat16"} for shape in (_HELD, SHAPES["ade20k"])),
    {"shape": _HELD, "dtype": "float16"},
    {"shape": _HELD, "labels": "int64"},
    *({"layout": "channels_last", "dtype": dtype} for dtype in ("bfloat16", "float16")),
    {"shape": SHAPES["ade20k"], "layout": "channels_last"},
    {"shape": replace(SHAPES["ade20k"], name="thousand", classes=1000)},
    {"options": {"activation": "sigmoid"}, "shape": _HELD},
    {"options": {"activation": "sigmoid"}, "shape": SHAPES["ade20k"]},
    {"options": {"activation": "sigmoid"}, "dtype": "bfloat16"},
    {"options": {"per_image": True, "form": "log"}},
    {"options": {"form": "generalized"}},
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
        shipped=(*SHIPPED, *RARE),
        kernels=KERNELS,
        operators=("class_sums_forward", "class_sums_backward"),
    ),
)

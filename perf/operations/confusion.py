"""Cases, bytes and goals of the confusion matrix, and of the prediction, which walks as it does."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kernels_reference import confusion_matrix as reference
from perf.operations import cell_loops, peers, upsampling
from perf.operations.contract import (
    SHAPES,
    Case,
    CodeGoal,
    Floor,
    Given,
    Goal,
    KernelNotes,
    LoopNotes,
    Operation,
    rarely,
    share_of_the_map,
    variations,
)
from perf.operations.pixel_cases import BASE, class_loop, inputs, outputs
from tritonloss import functional
from tritonloss.metrics import confusion, confusion_kernels


def launch(case: Case, tensors: tuple[Tensor, ...]) -> None:
    """The launchers of the matrix, of the prediction, and of the matrix of label maps."""
    prediction = launch_of_logits(case, tensors)
    options = confusion.Options(max(case.shape.classes, 2), ignore_index=255)
    confusion.MATRIX.run_forward((prediction, tensors[1]), options, False)


def launch_of_logits(case: Case, tensors: tuple[Tensor, ...]) -> Tensor:
    """The launchers of the matrix and of the prediction, which is returned."""
    logits, target = tensors
    options = confusion.Options(ignore_index=255)._replace(**case.options)
    confusion.MATRIX.run_forward(tensors, options, False)
    predicting = confusion.PredictOptions(target.shape[1:], align_corners=options.align_corners)
    (prediction,), _ = confusion.PREDICTION.run_forward((logits,), predicting, False)
    return prediction


def floor(case: Case) -> Floor:
    """Logits and labels are read: L + T."""
    logits = case.shape.elements * case.torch_dtype.itemsize
    labels = case.shape.pixels * getattr(torch, str(case.labels)).itemsize
    return Floor(forward=logits + labels, backward=0)


def floor_of_upsampled(case: Case) -> Floor:
    """Logits of the low resolution and labels are read: L + T."""
    return replace(upsampling.floor(case), backward=0)


def _pixels(given: Given) -> float:
    return float(given["TILE.pixels"] / given["THREADS"])


def _draws(given: Given) -> float:
    return float(confusion_kernels._DRAWS.value)


CASES = tuple(
    replace(case, against_compile=False)
    for case in variations(
        replace(BASE, shape=SHAPES["cityscapes"]),
        {"shape": SHAPES["ade20k"]},
        {"dtype": "bfloat16"},
        {"layout": "channels_last"},
        {"shape": SHAPES["ade20k"], "layout": "channels_last", "dtype": "bfloat16"},
        {"shape": SHAPES["voc"]},
        {"labels": "int64"},
        {"shape": SHAPES["binary"]},
    )
)
_THOUSAND = replace(SHAPES["ade20k"], name="thousand", classes=1000)
_SHIPPED = variations(
    replace(CASES[0], everywhere=True),
    {"shape": SHAPES["ade20k"]},
    *(
        {"everywhere": False, **change}
        for change in (
            {"layout": "channels_last"},
            {"shape": SHAPES["ade20k"], "layout": "channels_last"},
            {"dtype": "bfloat16"},
            {"dtype": "float16"},
            {"shape": SHAPES["voc"]},
            {"shape": SHAPES["binary"]},
            {"layout": "strided"},
            {"shape": _THOUSAND},
            {"labels": "int64"},
            {"dtype": "float64"},
        )
    ),
)
_RARE = rarely(
    _SHIPPED[0],
    *({"labels": labels} for labels in ("int16", "int32")),
    {"shape": SHAPES["ade20k"], "labels": "int64"},
    {"shape": SHAPES["ade20k"], "dtype": "float64"},
    {"shape": SHAPES["ade20k"], "dtype": "bfloat16"},
)
# --- interpolated logits --------------------------------------------------------------------------

_UPSAMPLED = tuple(
    replace(case, against_compile=False)
    for case in variations(
        upsampling.BASE,
        {"ratio": 8},
        {"dtype": "bfloat16"},
        {"shape": SHAPES["ade20k"]},
        {"ratio": 3.3},
        {"shape": SHAPES["binary"]},
        {"options": {"align_corners": True}},
    )
)
_UPSAMPLED_SHIPPED = (
    *variations(
        replace(_UPSAMPLED[0], everywhere=True),
        {"ratio": 8, "everywhere": False},
        {"shape": SHAPES["ade20k"], "everywhere": False},
        {"shape": SHAPES["binary"], "everywhere": False},
    ),
    *rarely(
        _UPSAMPLED[0],
        *({"ratio": ratio} for ratio in (2, 3.3, 16)),
        *({"labels": labels} for labels in ("int16", "int32", "int64")),
        *({"dtype": dtype} for dtype in ("bfloat16", "float16", "float64")),
        {"layout": "channels_last"},
    ),
)

# --- machine code and goals -----------------------------------------------------------------------

_FOLD = class_loop("classes", "_fold_blocks")
_FOLD_CELLS = cell_loops.class_loop("classes")
_COUNT = LoopNotes("draws", "_count_drawn", _draws)
# Of the instructions: the first that shipped, and a twentieth.
GOALS = (
    *(
        Goal(f"Confusion matrix, {case.text}: share of the copy bandwidth", case, "share_of_copy",
             at_least=0.75)
        for case in CASES[:4]
    ),
    Goal("Confusion matrix: extra MiB, the matrix alone", CASES[0], "peak_delta_MiB",
         at_most=8 * 19 * 19 / 2**20 + 0.001),
    CodeGoal("Confusion matrix, 150 classes: instructions per pixel and class", _SHIPPED[1],
             "_confusion_matrix_kernel", "classes", at_most=5.9),
)  # fmt: skip
UPSAMPLED_GOALS = (
    *(
        Goal(f"Confusion matrix of upsampled logits, {case.text}: speed against eager", case,
             "speedup_vs_eager", at_least=6.0)
        for case in _UPSAMPLED[:2]
    ),
    CodeGoal("Confusion matrix of upsampled logits, ratio 4: instructions per pixel and class",
             _UPSAMPLED_SHIPPED[0], "_upsampled_confusion_kernel", "total", at_most=10.3),
)  # fmt: skip

OPERATIONS = (
    Operation(
        name="confusion_matrix",
        function=functional.confusion_matrix,
        reference=reference,
        inputs=inputs,
        launch=launch,
        floor=floor,
        cases=CASES,
        shipped=(*_SHIPPED, *_RARE),
        kernels={
            "_confusion_matrix_kernel": KernelNotes(outputs, (_FOLD, _COUNT)),
            "_predict_kernel": KernelNotes(outputs, (_FOLD,)),
            "_label_confusion_kernel": KernelNotes(_pixels, (_COUNT,)),
        },
        operators=("confusion_matrix_forward",),
        goals=GOALS,
        libraries=peers.CONFUSION_MATRIX,
        differentiable=False,
    ),
    Operation(
        name="confusion_matrix_upsampled",
        function=functional.confusion_matrix,
        reference=reference,
        inputs=upsampling.inputs,
        launch=launch_of_logits,
        floor=floor_of_upsampled,
        cases=_UPSAMPLED,
        shipped=_UPSAMPLED_SHIPPED,
        kernels={
            "_upsampled_confusion_kernel": KernelNotes(share_of_the_map, (_FOLD_CELLS, _COUNT)),
            "_upsampled_predict_kernel": KernelNotes(share_of_the_map, (_FOLD_CELLS,)),
        },
        operators=(),
        goals=UPSAMPLED_GOALS,
        differentiable=False,
    ),
)

"""Cases, bytes and goals of the confusion matrix, and of the prediction, which walks as it does."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kernels_reference import confusion_matrix as reference
from perf.operations import peers
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
    variations,
)
from perf.operations.pixel_cases import BASE, class_loop, inputs, outputs
from tritonloss import functional
from tritonloss.metrics import confusion, confusion_kernels


def launch(case: Case, tensors: tuple[Tensor, ...]) -> None:
    """The launchers of the matrix, of the prediction, and of the matrix of label maps."""
    logits, target = tensors
    options = confusion.Options(ignore_index=255)._replace(**case.options)
    confusion.MATRIX.run_forward(tensors, options, False)
    predicting = confusion.PredictOptions(target.shape[1:])
    (prediction,) = confusion.PREDICTION.run_forward((logits,), predicting, False)
    labels = options._replace(num_classes=max(logits.size(1), 2))
    confusion.MATRIX.run_forward((prediction, target), labels, False)


def floor(case: Case) -> Floor:
    """Logits and labels are read: L + T."""
    logits = case.shape.elements * case.torch_dtype.itemsize
    labels = case.shape.pixels * getattr(torch, str(case.labels)).itemsize
    return Floor(forward=logits + labels, backward=0)


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
_FOLD = class_loop("classes", "_fold_blocks")
_COUNT = LoopNotes("draws", "_count_drawn", _draws)
GOALS = (
    *(
        Goal(f"Confusion matrix, {case.text}: share of the copy bandwidth", case, "share_of_copy",
             at_least=0.75)
        for case in CASES[:4]
    ),
    Goal("Confusion matrix: extra MiB, the matrix alone", CASES[0], "peak_delta_MiB",
         at_most=8 * 19 * 19 / 2**20 + 0.001),
    CodeGoal("Confusion matrix, 150 classes: instructions per pixel and class", _SHIPPED[1],
             "_confusion_matrix_kernel", "classes", at_most=5.5),
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
)

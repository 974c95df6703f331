"""Cases, bytes and goals of the Lovász losses."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver

from kernels_reference import lovasz_hinge_loss as hinge_reference
from kernels_reference import lovasz_softmax_loss as softmax_reference
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
from tritonloss._core.backend import INTERPRETED
from tritonloss._core.operator import Operator
from tritonloss.overlap import lovasz, lovasz_hinge
from tritonloss.overlap.lovasz_operator import number_of_bins
from tritonloss.overlap.lovasz_terms import IS_QUICK, Options


def launch(
    operator: Operator, bins: tuple[int, int], classes: str
) -> Callable[[Case, tuple[Tensor, ...]], None]:
    """A function that runs both launchers."""

    def launched(case: Case, tensors: tuple[Tensor, ...]) -> None:
        given = {"bins": bins_on_target(bins), "classes": classes, "ignore_index": 255}
        operator.both_passes(*tensors, options=Options(**{**given, **case.options}))

    return launched


def bins_on_target(bins: tuple[int, int]) -> int:
    """The default bins on the GPU that is launched on, which need not be there."""
    is_amd = not INTERPRETED and driver.active.get_current_target().backend == "hip"
    return bins[1] if is_amd else number_of_bins(None, bins)


def eager_softmax(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    """The reference, with as many bins as the kernels have."""
    given = {"bins": number_of_bins(None, lovasz.BINS), **options}
    return softmax_reference(logits, target, **given)


def eager_hinge(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    """The reference, with as many bins as the kernels have."""
    given = {"bins": number_of_bins(None, lovasz_hinge.BINS), **options}
    return hinge_reference(logits, target, **given)


def mask_inputs(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    """Logits [N, 1, H, W] and labels 0 and 1, for any number of classes."""
    return inputs(replace(case, shape=replace(case.shape, classes=1)), device)


def floor_of_softmax(case: Case) -> Floor:
    """Forward reads logits twice and labels; backward reads both and writes the gradient."""
    logits, labels = _bytes(case)
    return Floor(forward=2 * logits + labels, backward=2 * logits + labels)


def floor_of_hinge(case: Case) -> Floor:
    """Forward reads logits and labels; backward reads both and writes the gradient."""
    logits, labels = _bytes(replace(case, shape=replace(case.shape, classes=1)))
    return Floor(forward=logits + labels, backward=2 * logits + labels)


def _bytes(case: Case) -> tuple[int, int]:
    """The bytes of logits and of labels."""
    labels = case.shape.pixels * getattr(torch, str(case.labels)).itemsize
    return case.shape.elements * case.torch_dtype.itemsize, labels


def _rounds(given: Given) -> float:
    return float(given["rounds"])


def _of_classes(given: Given) -> float:
    """The pixels and classes that a thread of a histogram counts."""
    return float(given["TILE.pixels"] * given["TILE.unroll"] * given["rounds"] / given["THREADS"])


CASES = tuple(
    replace(case, against_compile=False)
    for case in variations(
        replace(BASE, shape=SHAPES["cityscapes"]),
        {"dtype": "bfloat16"},
        {"shape": SHAPES["ade20k"]},
        {"layout": "channels_last"},
        {"shape": SHAPES["voc"]},
        {"options": {"per_image": True}},
        {"shape": SHAPES["ade20k"], "dtype": "bfloat16", "layout": "channels_last"},
    )
)
BINARY = tuple(
    replace(case, against_compile=False)
    for case in variations(
        replace(BASE, shape=SHAPES["binary"]),
        {"dtype": "bfloat16"},
        {"options": {"per_image": True}},
        {"shape": replace(SHAPES["cityscapes"], classes=1)},
    )
)
_ONCE = {"everywhere": False}
SHIPPED = variations(
    replace(CASES[0], everywhere=True),
    {"shape": SHAPES["ade20k"]},
    {"layout": "channels_last", **_ONCE},
    {"shape": SHAPES["ade20k"], "layout": "channels_last", **_ONCE},
    {"dtype": "bfloat16", **_ONCE},
    {"dtype": "float16", **_ONCE},
    {"shape": SHAPES["voc"], **_ONCE},
    {"layout": "strided", **_ONCE},
    {"options": {"per_image": True}, **_ONCE},
    {"options": {"classes": "1,2,3"}, **_ONCE},
    {"options": {"exact": True}, **_ONCE},
    {"labels": "int64", **_ONCE},
    {"dtype": "float64", **_ONCE},
)
RARE = rarely(
    SHIPPED[0],
    {"dtype": "bfloat16", "layout": "channels_last"},
    {"dtype": "float16", "shape": SHAPES["ade20k"]},
    *({"labels": labels} for labels in ("int16", "int32")),
    {"options": {"bins": 2048}},
    {"options": {"bins": 64}},
)
BINARY_SHIPPED = variations(
    replace(BINARY[0], everywhere=True),
    {"dtype": "bfloat16", **_ONCE},
    {"layout": "strided", **_ONCE},
    {"options": {"exact": True}, **_ONCE},
    {"dtype": "float64", **_ONCE},
    {"dtype": "float16", **_ONCE},
    *({"labels": labels, **_ONCE} for labels in ("int16", "int32", "int64")),
    {"shape": replace(SHAPES["voc"], classes=1), **_ONCE},
)

# For AMD's GPUs an atomic sum is made of a loop over the lanes of a wave, which has no line.
ATOMICS = LoopNotes("atomics", "", lambda given: 64.0)
_TILES = LoopNotes("tiles", "_softmax_histogram_kernel.i", _rounds)
_HINGE_TILES = LoopNotes("tiles", "_hinge_histogram_kernel.i", _rounds)
KERNELS = {
    "_softmax_statistics_kernel": KernelNotes(
        outputs, (class_loop("classes", "_fold_blocks"), ATOMICS)
    ),
    "_softmax_histogram_kernel": KernelNotes(_of_classes, (_TILES,)),
    "_increments_kernel": KernelNotes(share_of_the_map),
    "_softmax_gradient_kernel": KernelNotes(
        outputs,
        (class_loop("sums", "_sum_over_classes"), class_loop("gradients", "_write_gradients")),
    ),
    "_errors_kernel": KernelNotes(share_of_the_map),
    "_rank_increments_kernel": KernelNotes(share_of_the_map),
}
HINGE_KERNELS = {
    "_hinge_histogram_kernel": KernelNotes(_of_classes, (_HINGE_TILES, ATOMICS)),
    "_increments_kernel": KERNELS["_increments_kernel"],
    "_hinge_gradient_kernel": KernelNotes(outputs),
    "_errors_kernel": KERNELS["_errors_kernel"],
    "_rank_increments_kernel": KERNELS["_rank_increments_kernel"],
}
_EXTRA = (CASES[0].shape.elements * 4 * 1.05 + 8 * CASES[0].shape.pixels) / 2**20
# Instructions per pixel and class. Before Triton 3.9 lanes vote on every bin.
COUNTED = 40.0 if IS_QUICK else 243.0
GOALS: tuple[Goal | CodeGoal, ...] = (
    Goal("Lovász softmax, H200: speed against eager", CASES[0], "speedup_vs_eager", at_least=10.0),
    Goal("Lovász softmax: extra MiB, 1.05 times the logits and 8 bytes per pixel", CASES[0],
         "peak_delta_MiB", at_most=_EXTRA),
    *(
        CodeGoal(f"Lovász softmax, histograms{words}: instructions per pixel and class", case,
                 "_softmax_histogram_kernel", "tiles", at_most=COUNTED)
        for words, case in {
            "": SHIPPED[0],
            ", 21 classes of an odd size": replace(SHIPPED[0], shape=SHAPES["voc"], **_ONCE),
            ", strided": replace(SHIPPED[0], layout="strided", **_ONCE),
        }.items()
    ),
)  # fmt: skip


def hinge_goals(words: str, kernel: str, cases: Iterable[Case]) -> tuple[CodeGoal, ...]:
    """The goal of the histogram in every case that has one, in float64 aside."""
    return tuple(
        CodeGoal(
            f"{words}, histogram, {case.text}: instructions per pixel", case, kernel, "tiles",
            at_most=COUNTED,
        )
        for case in cases
        if case.dtype != "float64" and not case.options.get("exact")
    )  # fmt: skip


_SMALL = {"PIXELS": 64, "CLASSES": 1, "num_warps": 1}


def _operation(**fields: Any) -> Operation:
    return Operation(small_launch=_SMALL, **fields)


OPERATIONS = (
    _operation(
        name="lovasz_softmax_loss",
        function=functional.lovasz_softmax_loss,
        inputs=inputs,
        reference=eager_softmax,
        launch=launch(lovasz.LOVASZ_SOFTMAX, lovasz.BINS, "present"),
        floor=floor_of_softmax,
        cases=CASES,
        shipped=(*SHIPPED, *RARE),
        kernels=KERNELS,
        operators=tuple(
            f"lovasz_softmax_{which}" for which in ("forward", "histogram", "backward")
        ),
        goals=GOALS,
    ),
    _operation(
        name="lovasz_hinge_loss",
        function=functional.lovasz_hinge_loss,
        inputs=mask_inputs,
        reference=eager_hinge,
        launch=launch(lovasz_hinge.LOVASZ_HINGE, lovasz_hinge.BINS, "all"),
        floor=floor_of_hinge,
        cases=BINARY,
        shipped=BINARY_SHIPPED,
        kernels=HINGE_KERNELS,
        operators=tuple(f"lovasz_hinge_{which}" for which in ("histogram", "backward")),
        goals=hinge_goals("Lovász hinge", "_hinge_histogram_kernel", BINARY_SHIPPED),
    ),
)

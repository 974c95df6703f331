"""What the pixelwise losses' operations have in common: cases, bytes, goals, kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from perf.operations.contract import (
    SHAPES,
    Case,
    CodeGoal,
    Floor,
    Given,
    Goal,
    KernelNotes,
    LoopNotes,
    random_labels,
    random_map,
    rarely,
    variations,
)
from tritonloss._core.operator import Operator


def inputs(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    """Logits [N, C, H, W] and labels [N, H, W]."""
    return random_map(case, device), random_labels(case, device)


def launch(operator: Operator, defaults: Any) -> Callable[[Case, tuple[Tensor, ...]], None]:
    """A function that runs a loss's forward and backward launchers, with a case's options.

    Args:
        operator: the loss.
        defaults: its options, for what a case does not say.
    """

    def launched(case: Case, tensors: tuple[Tensor, ...]) -> None:
        logits, target = tensors
        options = defaults._replace(ignore_index=255, **case.options)
        operator.both_passes(logits, target, None, None, options=options)

    return launched


def floor(case: Case) -> Floor:
    """Forward reads logits and labels: L + T. Backward also writes the gradient: 2 L + T."""
    logits = case.shape.elements * case.torch_dtype.itemsize
    labels = case.shape.pixels * getattr(torch, str(case.labels)).itemsize
    return Floor(forward=logits + labels, backward=2 * logits + labels)


def outputs(given: Given) -> float:
    """A thread's share of a tile's pixels and classes."""
    return float(given["TILE.pixels"] * given["TILE.classes"] / given["THREADS"])


def class_loop(name: str, within: str) -> LoopNotes:
    """Notes of a loop over blocks of classes, all but the last one."""
    return LoopNotes(
        name,
        within,
        rounds=_blocks,
        share=lambda given: _blocks(given) * _block(given) / given["TILE.classes"],
    )


def _block(given: Given) -> float:
    return float(given["TILE.unroll"] * given["TILE.lanes"])


def _blocks(given: Given) -> float:
    return (given["TILE.classes"] - 1) // _block(given)


_SHAPES = ("cityscapes", "ade20k", "coco-stuff")
BASE = Case(SHAPES["ade20k"], labels="uint8", against_compile=True)
CASES = variations(
    BASE,
    *({"shape": SHAPES[name]} for name in _SHAPES if name != "ade20k"),
    *({"shape": SHAPES[name], "dtype": "bfloat16"} for name in _SHAPES),
    *({"shape": SHAPES[name], "layout": "channels_last"} for name in _SHAPES),
    *({"shape": SHAPES[name], "layout": "channels_last", "dtype": "bfloat16"} for name in _SHAPES),
    {"shape": SHAPES["voc"], "against_compile": False},
    {"shape": SHAPES["cityscapes"], "labels": "int64", "against_compile": False},
)
BINARY = replace(BASE, shape=SHAPES["binary"], against_compile=False)

_ONCE = {"everywhere": False, "against_compile": False}
_WIDE: tuple[dict[str, Any], ...] = ({"labels": "int64"}, {"dtype": "float64"})
SHIPPED = variations(
    replace(BASE, everywhere=True, against_compile=False),
    {"layout": "channels_last"},
    {"shape": SHAPES["cityscapes"], **_ONCE},
    {"dtype": "bfloat16", **_ONCE},
    {"dtype": "bfloat16", "layout": "channels_last", **_ONCE},
    {"shape": SHAPES["cityscapes"], "layout": "channels_last", **_ONCE},
    {"shape": SHAPES["voc"], **_ONCE},
)
# Cases that change the code around a loss, whatever the loss.
AROUND = variations(
    replace(SHIPPED[0], everywhere=False),
    {"dtype": "float16"},
    {"layout": "strided"},
    {"options": {"reduction": "none"}},
    {"shape": replace(SHAPES["ade20k"], name="thousand", classes=1000)},  # more than a uint8 holds
    {"options": {"label_smoothing": 0.1}},
    {"options": {"label_smoothing": 0.1}, "layout": "channels_last"},
)[1:]
# Cases that take more registers, for every loss. In float64, for which nothing is tuned, kernels
# may spill.
WIDE = (
    *variations(replace(SHIPPED[0], everywhere=False), {"labels": "int64"}, {"dtype": "float64"})[
        1:
    ],
    *rarely(
        SHIPPED[0],
        *({"shape": SHAPES["cityscapes"], **wide} for wide in _WIDE),
        *({"layout": "channels_last", **wide} for wide in _WIDE),
        *({"shape": SHAPES["cityscapes"], "layout": "channels_last", **wide} for wide in _WIDE),
        {"dtype": "float64", "labels": "int64"},
        {"dtype": "bfloat16", "labels": "int64"},
        *({"labels": labels} for labels in ("int16", "int32")),
    ),
)


def bandwidth_goals(words: str, float32: float, bfloat16: float) -> tuple[Goal, ...]:
    """Goals for the share of the copy bandwidth, in both layouts."""
    return tuple(
        Goal(
            f"{words}, {case.shape.name}, {case.dtype}, {case.layout}: share of the copy bandwidth",
            case,
            "share_of_copy",
            at_least=float32 if case.dtype == "float32" else bfloat16,
        )
        for case in CASES
        if case.against_compile
    )


def code_goals(
    words: str, contiguous: tuple[float, float], channels_last: tuple[float, float]
) -> tuple[CodeGoal, ...]:
    """Goals for the instructions per pixel and class in the loop over blocks of classes.

    Each layout has a limit for the forward and one for the backward kernel.
    """
    return tuple(
        CodeGoal(
            text=f"{words}, {direction}, {case.layout}: instructions per pixel and class",
            case=case,
            kernel=f"_pixelwise_{direction}_kernel",
            loop="classes",
            at_most=instructions,
        )
        for case, limits in zip(SHIPPED[:2], (contiguous, channels_last), strict=True)
        for direction, instructions in zip(("forward", "backward"), limits, strict=True)
    )


# Limits of the loops, forward and backward: contiguous, then channels_last. The contiguous ones are
# the prototypes' instructions (softmax 6.2 and 10.0, sigmoid 10.4 and 12.8) with an addition going
# forward. The softmax has one more for the difference to the largest logit, without which large
# logits would lose their digits. The sigmoid has two more for leaving out the own class, without
# which confident pixels would lose theirs. channels_last had no prototype: its limits are what the
# first version that shipped took, and 5 %.
SOFTMAX_CODE = ((7.2, 10.0), (9.0, 12.4))
SIGMOID_CODE = ((12.4, 12.8), (13.7, 15.5))

_BACKWARD = KernelNotes(outputs, (class_loop("classes", "write_gradients"),))
KERNELS = {
    "_pixelwise_forward_kernel": KernelNotes(outputs, (class_loop("classes", "_fold_blocks"),)),
    "_pixelwise_backward_kernel": _BACKWARD,
}
TWO_PASSES = {
    "_pixelwise_forward_kernel": KernelNotes(
        outputs, (class_loop("top two", "_fold_blocks"), class_loop("penalties", "_fold_blocks"))
    ),
    "_pixelwise_backward_kernel": _BACKWARD,
}

"""Cases, bytes and goals of NeuroIoU."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kernels_reference import neuro_iou_loss as reference_of_sums
from perf.operations.contract import (
    SHAPES,
    Case,
    CodeGoal,
    Given,
    Goal,
    KernelNotes,
    LoopNotes,
    Operation,
    rarely,
    variations,
)
from perf.operations.pixel_cases import BASE, class_loop, floor, inputs, outputs
from tritonloss import IoUSurrogate, functional
from tritonloss.overlap.membership_launch import SumOptions
from tritonloss.overlap.neuro_iou import MEMBERSHIP_SUMS


@functools.cache
def _surrogate(device: torch.device) -> IoUSurrogate:
    """A network that nobody has fitted: it takes as long as any."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return IoUSurrogate().requires_grad_(False).to(device)


def loss(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    """The loss with that network."""
    return functional.neuro_iou_loss(logits, target, _surrogate(logits.device), **options)


def reference(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    """The reference with that network."""
    surrogate = _surrogate(logits.device).to(logits.dtype)
    return reference_of_sums(logits, target, surrogate, **options)


def launch(case: Case, tensors: tuple[Tensor, ...]) -> None:
    """The launchers of the sums and of their gradient."""
    options = SumOptions(ignore_index=255)._replace(**case.options)
    MEMBERSHIP_SUMS.both_passes(*tensors, options=options)


# Classes of a tile, for the count of instructions: an image has about three in 512 pixels of a row.
_CLASSES_OF_A_TILE = 3.0


def _tiles(given: Given) -> float:
    return float(given["rounds"])


def _outputs(given: Given) -> float:
    return outputs(given) * _tiles(given)


OF_TILES = (LoopNotes("members", "add_members", lambda given: _tiles(given) * _CLASSES_OF_A_TILE),)
_FOLD = class_loop("classes", "_fold_blocks")
LOOPS = (
    replace(_FOLD, rounds=lambda given: _tiles(given) * _FOLD.rounds(given)),
    *OF_TILES,
    LoopNotes("tiles", "_membership_sums_kernel", _tiles),
    # In float64 most of it is the exponential's, which has no line.
    LoopNotes("tiles", "", _tiles),
)

CASES = tuple(
    replace(case, against_compile=False)
    for case in variations(
        replace(BASE, shape=SHAPES["cityscapes"]),
        {"shape": SHAPES["ade20k"]},
        {"dtype": "bfloat16"},
        {"layout": "channels_last"},
        {"shape": SHAPES["voc"]},
        {"shape": SHAPES["binary"]},
    )
)
SHIPPED = (
    *variations(
        replace(CASES[0], everywhere=True),
        {"shape": SHAPES["ade20k"]},
        *(
            {"everywhere": False, **change}
            for change in (
                {"layout": "channels_last"},
                {"shape": SHAPES["ade20k"], "layout": "channels_last"},
                {"dtype": "bfloat16"},
                {"dtype": "float16"},
                {"shape": SHAPES["binary"]},
                {"options": {"score": "hinge"}},
                {"layout": "strided"},
                {"labels": "int64"},
                {"dtype": "float64"},
            )
        ),
    ),
    *rarely(
        CASES[0],
        {"shape": SHAPES["voc"]},
        {"shape": replace(SHAPES["ade20k"], name="thousand", classes=1000)},
        {"shape": SHAPES["binary"], "options": {"score": "hinge"}},
        *({"labels": labels} for labels in ("int16", "int32")),
    ),
)
# Of the instructions: the first that shipped, and a twentieth.
GOALS = (
    *(
        Goal(f"NeuroIoU, {case.text}: share of the copy bandwidth", case, "share_of_copy",
             at_least=0.6)
        for case in CASES[:4]
    ),
    *(
        CodeGoal(f"NeuroIoU, {kernel}: instructions per pixel and class", SHIPPED[0],
                 f"_membership_{kernel}_kernel", "total", at_most=most)
        for kernel, most in (("sums", 22.8), ("backward", 17.9))
    ),
)  # fmt: skip

OPERATIONS = (
    Operation(
        name="neuro_iou_loss",
        function=loss,
        reference=reference,
        inputs=inputs,
        launch=launch,
        floor=floor,
        cases=CASES,
        shipped=SHIPPED,
        kernels={
            "_membership_sums_kernel": KernelNotes(_outputs, LOOPS),
            "_membership_backward_kernel": KernelNotes(
                outputs, (class_loop("classes", "write_gradients"),)
            ),
        },
        operators=("membership_sums_forward", "membership_sums_backward"),
        goals=GOALS,
    ),
)

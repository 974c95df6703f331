"""Cases, bytes and goals of the margin-calibrated loss."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kernels_reference import margin_calibrated_loss as reference
from perf.operations.contract import (
    SHAPES,
    Case,
    CodeGoal,
    Floor,
    Goal,
    Operation,
    random_labels,
    random_map,
    variations,
)
from perf.operations.pixel_cases import TWO_PASSES, WIDE
from tritonloss import MarginOffsets, functional
from tritonloss.pixelwise.margin_calibration import MARGIN_CALIBRATED, Options


@functools.cache
def offsets(classes: int, device: torch.device) -> MarginOffsets:
    """Offsets as large as calibration on a small data set makes them, equal for all providers."""
    own = torch.linspace(0.0, 0.01, classes, device=device)
    return MarginOffsets(own, torch.linspace(0.05, 1.0, classes, device=device))


def function(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    """The loss, with offsets for as many classes as there are."""
    pair = offsets(logits.size(1), logits.device)
    return functional.margin_calibrated_loss(logits, target, pair, **options)


def eager(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    """The reference, with the same offsets."""
    return reference(logits, target, offsets(logits.size(1), logits.device), **options)


def inputs(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    """Logits [N, C, H, W] and labels [N, H, W]."""
    return random_map(case, device), random_labels(case, device)


def launch(case: Case, tensors: tuple[Tensor, ...]) -> None:
    """Run the forward and backward launchers."""
    logits, target = tensors
    options = Options(case.options.get("variant", "paper"), ignore_index=255)
    pair = offsets(logits.size(1), logits.device)
    MARGIN_CALIBRATED.both_passes(logits, target, *pair, options=options)


def floor(case: Case) -> Floor:
    """Forward reads logits and labels: L + T. Backward also writes the gradient: 2 L + T."""
    logits = case.shape.elements * case.torch_dtype.itemsize
    labels = case.shape.pixels * getattr(torch, str(case.labels)).itemsize
    return Floor(forward=logits + labels, backward=2 * logits + labels)


BASE = Case(SHAPES["cityscapes"], labels="uint8", against_compile=True)
CASES = variations(
    BASE,
    {"dtype": "bfloat16"},
    {"layout": "channels_last"},
    {"dtype": "bfloat16", "layout": "channels_last"},
    *({"shape": SHAPES[name]} for name in ("ade20k", "coco-stuff")),
    *(
        {"shape": SHAPES[name], "dtype": dtype, "layout": layout, "against_compile": False}
        for name in ("ade20k", "coco-stuff")
        for dtype, layout in (
            ("bfloat16", "contiguous"),
            ("float32", "channels_last"),
            ("bfloat16", "channels_last"),
        )
    ),
    {"options": {"variant": "margin"}, "against_compile": False},
    {"shape": SHAPES["voc"], "against_compile": False},
)

_ONCE = {"everywhere": False}
SHIPPED = variations(
    replace(BASE, everywhere=True, against_compile=False),
    {"shape": SHAPES["ade20k"]},
    {"layout": "channels_last"},
    {"shape": SHAPES["ade20k"], "layout": "channels_last", **_ONCE},
    {"dtype": "bfloat16", **_ONCE},
    {"shape": SHAPES["ade20k"], "dtype": "bfloat16", "layout": "channels_last", **_ONCE},
    {"shape": SHAPES["voc"], **_ONCE},
    {"layout": "strided", **_ONCE},
    *({"options": {"variant": variant}, **_ONCE} for variant in ("released", "margin")),
    {"shape": SHAPES["ade20k"], "options": {"variant": "margin"}, **_ONCE},
)

GOALS: tuple[Goal | CodeGoal, ...] = (
    *(
        Goal(f"Margin calibration, {case.text}: {words}", case, column, at_least=wanted)
        for case in CASES[:4]
        for words, column, wanted in (
            ("share of the copy bandwidth", "share_of_copy", 0.60),
            ("speed against eager", "speedup_vs_eager", 8),
            ("speed against torch.compile", "speedup_vs_compile", 2.5),
        )
    ),
    # torch.compile needs 5 times the logits.
    Goal(
        "Margin calibration: extra MiB, the gradient and 8 bytes per pixel",
        CASES[0],
        "peak_delta_MiB",
        at_most=(BASE.shape.elements * 4 + 8 * BASE.shape.pixels) * 1.001 / 2**20,
    ),
    # The limit of the penalties is what they took in the prototype. The other limits are what the
    # first version that shipped took, and 5 %. (channels_last has no loop going forward, since its
    # classes are held in registers.)
    *(
        CodeGoal(
            text=f"Margin calibration, {text}: instructions per pixel and class",
            case=case,
            kernel=kernel,
            loop=loop,
            at_most=instructions,
        )
        for text, case, kernel, loop, instructions in (
            ("top two", SHIPPED[1], "_pixelwise_forward_kernel", "top two", 11.0),
            ("penalties", SHIPPED[1], "_pixelwise_forward_kernel", "penalties", 25.1),
            ("backward", SHIPPED[1], "_pixelwise_backward_kernel", "classes", 18.7),
            (
                "backward, channels_last",
                SHIPPED[3],
                "_pixelwise_backward_kernel",
                "classes",
                21.6,
            ),
        )
    ),
)

OPERATIONS = (
    Operation(
        name="margin_calibrated_loss",
        function=function,
        reference=eager,
        inputs=inputs,
        launch=launch,
        floor=floor,
        cases=CASES,
        shipped=(*SHIPPED, *WIDE),
        kernels=TWO_PASSES,
        operators=("margin_calibrated_forward", "margin_calibrated_backward"),
        goals=GOALS,
    ),
)

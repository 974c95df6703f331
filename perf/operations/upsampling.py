"""Cases, bytes and goals of the pixelwise losses over logits of a lower resolution."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import kernels_reference
from kernels_reference.base import at_labels
from perf.operations import cell_loops, lovasz, margin_calibration, neuro_iou, overlap
from perf.operations.contract import (
    SHAPES,
    Case,
    CodeGoal,
    Floor,
    Goal,
    Operation,
    Shape,
    random_labels,
    random_map,
    rarely,
    variations,
)
from perf.operations.cross_entropy import torch_cross_entropy as cross_entropy_at_labels
from tritonloss import functional
from tritonloss._core.operator import Operator
from tritonloss.overlap import scores
from tritonloss.pixelwise import binary_cross_entropy, cross_entropy, focal_loss
from tritonloss.pixelwise import margin_calibration as margin


def low_resolution(case: Case) -> Case:
    """The case of the logits: as many pixels as the ratio leaves."""
    assert case.ratio is not None
    sizes = [math.ceil(size / case.ratio) for size in (case.shape.height, case.shape.width)]
    return replace(case, shape=replace(case.shape, height=sizes[0], width=sizes[1]))


def inputs(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    """Logits [N, C, h, w] and labels [N, H, W]."""
    return random_map(low_resolution(case), device), random_labels(case, device)


def mask_inputs(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    """Logits [N, 1, h, w] and labels 0 and 1 [N, H, W], for any number of classes."""
    return inputs(replace(case, shape=replace(case.shape, classes=1)), device)


def torch_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    upsample: str | None = None,
    align_corners: bool = False,
    **options: Any,
) -> Tensor:
    """PyTorch's own: interpolated logits, and its cross entropy of them."""
    interpolated = at_labels(logits, target, upsample, align_corners)
    return cross_entropy_at_labels(interpolated, target, **options)


def no_tables(classes: int, device: torch.device) -> tuple[None, None]:
    """What most losses know of the classes."""
    return None, None


def launch(
    operator: Operator, defaults: Any, tables: Callable[[int, torch.device], Any] = no_tables
) -> Callable[[Case, tuple[Tensor, ...]], None]:
    """Forward and backward launchers of a loss with such options."""

    def launched(case: Case, tensors: tuple[Tensor, ...]) -> None:
        logits, target = tensors
        own, other = tables(logits.size(1), logits.device)
        options = defaults._replace(ignore_index=255, **case.options)
        operator.both_passes(logits, target, own, other, options=options)

    return launched


def floor(case: Case) -> Floor:
    """Forward reads logits and labels: L + T, L of the low resolution. Backward: 2 L + T."""
    logits = low_resolution(case).shape.elements * case.torch_dtype.itemsize
    labels = case.shape.pixels * getattr(torch, str(case.labels)).itemsize
    return Floor(forward=logits + labels, backward=2 * logits + labels)


# --- cases ----------------------------------------------------------------------------------------

_STREETS = Shape("cityscapes", 4, 19, 1024, 2048)
# With four images of these the strips of ratio 8 are of 19 rows, of which each repeats one, so that
# a large GPU has a warp for every scheduler. With eight they are of 32.
MANY_STREETS = Shape("cityscapes-8", 8, 19, 1024, 2048)
_ROOMS = Shape("ade20k-16", 16, 150, 512, 512)
_THINGS = Shape("coco-stuff", 4, 171, 640, 640)
_OPTIONS = {"upsample": "bilinear"}
BASE = Case(_STREETS, labels="uint8", options=_OPTIONS, ratio=4)
CASES = variations(
    replace(BASE, against_compile=True),
    {"shape": _ROOMS},
    {"ratio": 8},
    {"shape": _ROOMS, "ratio": 8},
    {"dtype": "bfloat16"},
    {"layout": "channels_last", "against_compile": False},
    {"ratio": 3.3, "against_compile": False},
    {"options": {"align_corners": True}, "against_compile": False},
)
_ONCE = {"everywhere": False}
# Those that goals are about; the first is compiled for all targets.
SHIPPED = variations(
    replace(BASE, everywhere=True),
    {"shape": MANY_STREETS, "ratio": 8, **_ONCE},
    {"ratio": 3.3, **_ONCE},
    {"shape": _THINGS, **_ONCE},
    {"shape": _THINGS, "ratio": 8, **_ONCE},
)
# Too many classes for a lane to hold: two lanes share them, or four, or none holds them.
MANY_CLASSES = variations(
    SHIPPED[0],
    {"shape": Shape("voc-16", 16, 21, 512, 512), **_ONCE},
    {"shape": Shape("context", 8, 60, 512, 512)},
    {"shape": _ROOMS, **_ONCE},
)[1:]
# What changes the code around the loss, whatever the loss.
AROUND = variations(
    replace(BASE, everywhere=False),
    {"dtype": "bfloat16"},
    {"layout": "channels_last"},
    {"options": {"reduction": "none"}},
)[1:]
RARE = rarely(
    BASE,
    {"ratio": 2},
    {"ratio": 16},
    {"dtype": "float16"},
    {"labels": "int16"},
    {"labels": "int32"},
    {"labels": "int64"},
    {"dtype": "float64"},
    {"options": {"align_corners": True}},
)

# Of the Lovász losses.
_LOVASZ: tuple[dict[str, Any], ...] = ({"options": {"per_image": True}},)
_BY_A_SORT = variations(SHIPPED[0], {"options": {"exact": True}, **_ONCE})[1:]
_OTHERS: tuple[dict[str, Any], ...] = (
    *({"dtype": dtype} for dtype in ("bfloat16", "float16", "float64")),
    *({"labels": labels} for labels in ("int16", "int32", "int64")),
)
_BINARY = variations(
    replace(BASE, shape=SHAPES["binary"]), {"shape": replace(_STREETS, classes=1)}, {"ratio": 8}
)
_BINARY_SHIPPED = variations(
    replace(_BINARY[0], everywhere=True),
    {"options": {"exact": True}, **_ONCE},
    *({**change, **_ONCE} for change in ({"ratio": 8}, *_LOVASZ, *_OTHERS)),
)

# --- goals ----------------------------------------------------------------------------------------


def code_goals(words: str, limits: dict[float, tuple[float, float]]) -> tuple[CodeGoal, ...]:
    """Instructions per pixel and class of the whole kernels: of every ratio forward, backward."""
    return tuple(
        CodeGoal(
            text=f"{words}, {direction}, {case.shape.classes} classes, ratio {case.ratio:g}: "
            "instructions per pixel and class",
            case=case,
            kernel=f"_upsampled_{direction}_kernel",
            loop="total",
            at_most=most,
        )
        for case in SHIPPED
        if case.dtype == "float32" and case.layout == "contiguous" and case.ratio in limits
        for direction, most in zip(("forward", "backward"), limits[case.ratio], strict=True)
    )


def _extra(case: Case, per_pixel: float, per_class: float = 0) -> float:
    """MiB of the gradient and of so many bytes per pixel of the labels, and per class."""
    gradient = low_resolution(case).shape.elements * case.torch_dtype.itemsize
    more = per_pixel * case.shape.pixels + per_class * case.shape.classes
    return (gradient + more) * 1.005 / 2**20


def memory_goals(
    words: str, per_pixel: float, cases: tuple[Case, ...] = CASES, per_class: float = 0
) -> tuple[Goal, ...]:
    """Extra memory: the gradient, so many bytes per pixel of the labels, and per class."""
    return tuple(
        Goal(
            f"{words}, {case.text}: extra MiB, the gradient and {per_pixel:g} bytes per pixel",
            case,
            "peak_delta_MiB",
            at_most=_extra(case, per_pixel, per_class),
        )
        for case in cases[:2]
    )


def _speed_goals(words: str) -> tuple[Goal, ...]:
    return tuple(
        Goal(f"{words}, {case.text}: speed against {rival}", case, column, at_least=times)
        for case in CASES[:2]
        for rival, column, times in (
            ("eager", "speedup_vs_eager", 6.0),
            ("torch.compile", "speedup_vs_compile", 4.0),
        )
    )


# Any ratio may take one and a half times as many as the whole ones beside it.
_SOFTMAX = {4: (12.5, 14.0), 8: (12.5, 10.0), 3.3: (18.75, 21.0)}
_SIGMOID = {4: (13.5, 17.5), 8: (13.5, 14.0), 3.3: (20.25, 26.25)}


def _operation(
    name: str,
    function: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    operator: Operator,
    defaults: Any,
    **more: Any,
) -> Operation:
    fields: dict[str, Any] = {
        "inputs": inputs,
        "launch": launch(operator, defaults),
        "floor": floor,
        "cases": CASES,
        "shipped": (*SHIPPED, *RARE),
        "kernels": cell_loops.KERNELS,
        # Going forward, a row of each cell at once; going back, of nodes.
        "small_launch": {"ROWS": 1, "num_warps": 1},
    }
    return Operation(
        name=f"{name}_upsampled",
        function=function,
        reference=reference,
        operators=(f"{operator.name}_upsampled_forward", f"{operator.name}_upsampled_backward"),
        **{**fields, **more},
    )


OPERATIONS = (
    _operation(
        "cross_entropy",
        functional.cross_entropy,
        torch_cross_entropy,
        cross_entropy.CROSS_ENTROPY,
        cross_entropy.Options(),
        shipped=(*SHIPPED, *AROUND, *RARE),
        goals=(
            *code_goals("Cross entropy of upsampled logits", _SOFTMAX),
            *memory_goals("Cross entropy of upsampled logits", 4),
            *_speed_goals("Cross entropy of upsampled logits"),
        ),
    ),
    _operation(
        "binary_cross_entropy",
        functional.binary_cross_entropy,
        kernels_reference.binary_cross_entropy,
        binary_cross_entropy.BINARY_CROSS_ENTROPY,
        binary_cross_entropy.Options(),
        goals=(
            *code_goals("Binary cross entropy of upsampled logits", _SIGMOID),
            *memory_goals("Binary cross entropy of upsampled logits", 0),
        ),
    ),
    _operation(
        "focal_loss",
        functional.focal_loss,
        kernels_reference.focal_loss,
        focal_loss.FOCAL,
        focal_loss.Options(),
        cases=CASES[:3],
        shipped=(SHIPPED[0], *rarely(BASE, {"ratio": 8}), *RARE),
        goals=memory_goals("Focal loss of upsampled logits", 4),
    ),
    _operation(
        "margin_calibrated_loss",
        margin_calibration.function,
        margin_calibration.eager,
        margin.MARGIN_CALIBRATED,
        margin.Options(),
        launch=launch(margin.MARGIN_CALIBRATED, margin.Options(), margin_calibration.offsets),
        kernels=cell_loops.TWO_PASSES,
        cases=CASES[:3],
        shipped=(SHIPPED[0], *rarely(BASE, {"ratio": 8}), *RARE),
        goals=memory_goals("Margin-calibrated loss of upsampled logits", 8),
    ),
    replace(
        _operation(
            "dice_loss",
            functional.dice_loss,
            kernels_reference.dice_loss,
            scores.OVERLAP,
            scores.DICE,
            launch=overlap.launch("dice_loss"),
            kernels=cell_loops.OVERLAP_KERNELS,
            cases=CASES[:3],
            shipped=(
                SHIPPED[0],
                *MANY_CLASSES,
                *rarely(BASE, {"ratio": 8}, {"options": overlap.SIGMOID}),
                *RARE,
            ),
            goals=(
                *memory_goals("Dice of upsampled logits", 4, CASES[:1]),
                *memory_goals("Dice of upsampled logits", 8, CASES[1:2]),
            ),
        ),
        operators=(),  # its configurations are heuristics
    ),
    replace(
        _operation(
            "neuro_iou_loss",
            neuro_iou.loss,
            neuro_iou.reference,
            neuro_iou.MEMBERSHIP_SUMS,
            None,
            launch=neuro_iou.launch,
            kernels=cell_loops.NEURO_KERNELS,
            cases=CASES[:3],
            shipped=(
                SHIPPED[0],
                *rarely(
                    BASE,
                    {"ratio": 8},
                    {"shape": _ROOMS},
                    {"shape": SHAPES["binary"]},
                    {"options": {"score": "hinge"}},
                ),
                *RARE,
            ),
            goals=memory_goals("NeuroIoU of upsampled logits", 9),  # 4 of them for a while
        ),
        operators=(),
    ),
    replace(
        _operation(
            "lovasz_softmax_loss",
            functional.lovasz_softmax_loss,
            lovasz.eager_softmax,
            lovasz.lovasz.LOVASZ_SOFTMAX,
            None,
            launch=lovasz.launch(lovasz.lovasz.LOVASZ_SOFTMAX, lovasz.lovasz.BINS, "present"),
            kernels=cell_loops.LOVASZ_KERNELS,
            cases=CASES[:3],
            shipped=(
                SHIPPED[0],
                *_BY_A_SORT,
                *rarely(BASE, {"ratio": 8}, {"shape": _ROOMS}, *_LOVASZ),
                *RARE,
            ),
            goals=(
                *memory_goals("Lovász softmax of upsampled logits", 8, per_class=48 * 1024),
                CodeGoal(
                    "Lovász softmax of upsampled logits, histograms: instructions per pixel and "
                    "class",
                    SHIPPED[0],
                    "_cell_histogram_kernel",
                    "tiles",
                    at_most=lovasz.COUNTED,
                ),
            ),
        ),
        operators=(),
    ),
    replace(
        _operation(
            "lovasz_hinge_loss",
            functional.lovasz_hinge_loss,
            lovasz.eager_hinge,
            lovasz.lovasz_hinge.LOVASZ_HINGE,
            None,
            inputs=mask_inputs,
            floor=lambda case: floor(replace(case, shape=replace(case.shape, classes=1))),
            launch=lovasz.launch(lovasz.lovasz_hinge.LOVASZ_HINGE, lovasz.lovasz_hinge.BINS, "all"),
            kernels=cell_loops.LOVASZ_HINGE_KERNELS,
            cases=_BINARY,
            shipped=_BINARY_SHIPPED,
            goals=(
                *memory_goals("Lovász hinge of upsampled logits", 0, _BINARY, 24 * 4096),
                *lovasz.hinge_goals(
                    "Lovász hinge of upsampled logits",
                    "_cell_hinge_histogram_kernel",
                    _BINARY_SHIPPED,
                ),
            ),
        ),
        operators=(),
    ),
)

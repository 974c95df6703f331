"""Cases, bytes and goals of the losses of overlap, which all have the same two passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

import kernels_reference
from perf.operations import peers, pixel_cases
from perf.operations.contract import (
    SHAPES,
    Case,
    CodeGoal,
    Given,
    Goal,
    KernelNotes,
    LoopNotes,
    Operation,
    Shape,
    rarely,
    share_of_the_map,
    variations,
)
from perf.operations.pixel_cases import class_loop, outputs
from tritonloss import functional
from tritonloss.overlap.scores import DICE, OVERLAP

# Of each loss the options of its operator, for its function's defaults.
_DEFAULTS = {
    "dice_loss": DICE,
    "generalized_dice_loss": DICE._replace(form="generalized", smooth=1e-5),
    "soft_iou_loss": DICE._replace(alpha=1.0, beta=1.0, smooth=0.0, per_image=True),
    "tversky_loss": DICE._replace(alpha=0.3, beta=0.7, smooth=1.0, per_image=True, classes="all"),
}


def launch(name: str) -> Callable[[Case, tuple[Tensor, ...]], None]:
    """A function that runs the launchers of both passes; a case's options are the operator's."""

    def launched(case: Case, tensors: tuple[Tensor, ...]) -> None:
        logits, target = tensors
        options = _DEFAULTS[name]._replace(ignore_index=255, **case.options)
        OVERLAP.both_passes(logits, target, None, options=options)

    return launched


CASES = variations(
    Case(SHAPES["cityscapes"], labels="uint8", against_compile=True),
    {"dtype": "bfloat16"},
    {"layout": "channels_last"},
    {"shape": SHAPES["ade20k"]},
    {"shape": SHAPES["ade20k"], "dtype": "bfloat16"},
    {"shape": SHAPES["voc"], "against_compile": False},
    {"labels": "int64", "against_compile": False},
    {"options": {"activation": "sigmoid"}, "against_compile": False},
    {"shape": SHAPES["binary"], "options": {"activation": "sigmoid"}, "against_compile": False},
)
# As many classes as stay in registers; with more, it is another kernel.
HELD = Shape("held", 4, 32, 1024, 2048)
SIGMOID = {"activation": "sigmoid"}
_ONCE = {"everywhere": False}
SHIPPED = variations(
    replace(CASES[0], everywhere=True, against_compile=False),
    {"layout": "channels_last", **_ONCE},
    {"shape": SHAPES["ade20k"]},
    {"dtype": "bfloat16", **_ONCE},
    {"shape": HELD, **_ONCE},
    {"shape": SHAPES["voc"], **_ONCE},
    {"options": SIGMOID, **_ONCE},
    {"shape": SHAPES["binary"], "options": SIGMOID, **_ONCE},
)
WIDE = rarely(
    SHIPPED[0],
    {"dtype": "float64"},
    *({"labels": labels} for labels in ("int16", "int32", "int64")),
)
RARE = rarely(
    SHIPPED[0],
    {"dtype": "float16"},
    {"layout": "strided"},
    *({"shape": HELD, "dtype": dtype} for dtype in ("bfloat16", "float16")),
    {"shape": HELD, "labels": "int64"},
    {"shape": SHAPES["ade20k"], "dtype": "bfloat16"},
    *({"layout": "channels_last", "dtype": dtype} for dtype in ("bfloat16", "float16")),
    {"shape": SHAPES["ade20k"], "layout": "channels_last"},
    {"shape": replace(SHAPES["ade20k"], name="thousand", classes=1000)},
    *({"options": SIGMOID, "shape": shape} for shape in (HELD, SHAPES["ade20k"])),
    {"options": SIGMOID, "dtype": "bfloat16"},
    {"options": {"form": "log"}},
    {"options": {"form": "power", "gamma": 0.5}},
)

# --- how to read the machine code -----------------------------------------------------------------


def _rounds(given: Given) -> float:
    return float(given["rounds"])


def parts(given: Given) -> float:
    return float(-(-given["programs"] // 256))


def _groups(given: Given) -> float:
    """Of the program that comes last."""
    return (given["images"] if given["COUNTING.per_image"] else 1) / given["PROGRAMS"]


def images(given: Given) -> float:
    return float(given["images"] / given["PROGRAMS"])


HEAD = KernelNotes(
    share_of_the_map,
    (
        LoopNotes("parts", "add_parts", parts),
        LoopNotes("groups", "sum_losses", _groups),
        LoopNotes("images", "_classes_of", images),
    ),
)
KERNELS = {
    "_class_sums_forward_kernel": KernelNotes(
        lambda given: outputs(given) * _rounds(given),
        (
            LoopNotes("tiles", "_class_sums_forward_kernel.i", _rounds),
            class_loop("statistics", "_fold_blocks"),
            class_loop("classes", "_sum_blocks"),
        ),
    ),
    "_class_head_kernel": HEAD,
    "_class_sums_backward_kernel": KernelNotes(
        outputs,
        (class_loop("projection", "_project_blocks"), class_loop("classes", "write_gradients")),
    ),
}

# --- goals ----------------------------------------------------------------------------------------

# 1.3 times those of cross entropy at sm_90, forward and backward: 13.1 and 12.8, and in
# channels_last 34.1 and 28.5. Of 32 classes, together: 10.1 and 10.8.
_LIMITS = {
    "contiguous": (17.0, 16.6),
    "channels_last": (44.3, 37.1),
    "contiguous, 32 classes": (12.7, 14.5),
}


def _goals(words: str) -> tuple[Goal | CodeGoal, ...]:
    extra = (CASES[0].shape.elements * 4 + 8 * CASES[0].shape.pixels) / 2**20
    return (
        Goal(f"{words}: extra MiB, the gradient and 8 bytes per pixel", CASES[0],
             "peak_delta_MiB", at_most=extra),
        *(
            Goal(f"{words}, {case.text}: speed against eager", case, "speedup_vs_eager",
                 at_least=5.0)
            for case in CASES[:3]
        ),
        *(
            CodeGoal(
                f"{words}, {direction}, {which}: instructions per pixel and class",
                case,
                f"_class_sums_{direction}_kernel",
                "total",
                at_most=limit,
            )
            for case, which in zip((*SHIPPED[:2], SHIPPED[4]), _LIMITS, strict=True)
            for direction, limit in zip(("forward", "backward"), _LIMITS[which], strict=True)
        ),
    )  # fmt: skip


def _operation(name: str, **more: Any) -> Operation:
    fields: dict[str, Any] = {
        "inputs": pixel_cases.inputs,
        "launch": launch(name),
        "floor": pixel_cases.floor,
        "cases": CASES[:3],
        "shipped": (SHIPPED[0], *WIDE),
        "kernels": KERNELS,
        "operators": ("class_sums_forward", "class_sums_backward"),
        **more,
    }
    return Operation(
        name=name,
        function=getattr(functional, name),
        reference=getattr(kernels_reference, name),
        **fields,
    )


OPERATIONS = (
    _operation(
        "dice_loss",
        cases=CASES,
        shipped=(*SHIPPED, *WIDE, *RARE),
        goals=_goals("Dice"),
        libraries=peers.DICE_LOSS,
    ),
    _operation("generalized_dice_loss"),
    _operation("soft_iou_loss"),
    _operation("tversky_loss"),
)

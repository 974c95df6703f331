"""Cases, bytes and goals of losses that share a read: cross entropy and dice, whose sum is common.

With sigmoids it is the sum of binary cross entropy and dice.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import kernels_reference
from perf.operations import cell_loops, overlap, pixel_cases, upsampling
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
    share_of_the_map,
    variations,
)
from perf.operations.pixel_cases import class_loop, outputs
from tritonloss import functional
from tritonloss._engine.joint_operator import WEIGHTED_SUM, Options
from tritonloss._engine.joint_terms import described
from tritonloss.overlap.scores import DICE
from tritonloss.pixelwise import binary_cross_entropy, cross_entropy
from tritonloss.pixelwise.weighted_sum import cross_entropy_and_dice

_ENTROPIES = {
    "softmax": ("pixelwise.cross_entropy", cross_entropy.Options()),
    "sigmoid": ("pixelwise.binary_cross_entropy", binary_cross_entropy.Options()),
}


def launch(case: Case, tensors: tuple[Tensor, ...]) -> None:
    """Run the launchers of both passes."""
    logits, target = tensors
    between = {key: value for key, value in case.options.items() if key != "activation"}
    activation = case.options.get("activation", "softmax")
    entropy, options_of_entropy = _ENTROPIES[activation]
    losses = (
        described(entropy, options_of_entropy._replace(**between)),
        described("overlap.scores", DICE._replace(activation=activation, **between)),
    )
    options = Options("\n".join(losses), [0, 1], [-1] * 4)
    weights = torch.ones(2, dtype=torch.float64, device=logits.device)
    WEIGHTED_SUM.both_passes(logits, target, weights, None, options=options)


def eager(logits: Tensor, target: Tensor, activation: str = "softmax", **between: Any) -> Tensor:
    """The sum of the references of both; ``between`` says how logits are interpolated."""
    is_softmax = activation == "softmax"
    entropy = (
        kernels_reference.cross_entropy if is_softmax else kernels_reference.binary_cross_entropy
    )
    dice = kernels_reference.dice_loss(logits, target, activation=activation, **between)
    return entropy(logits, target, **between) + dice


def apart(logits: Tensor, target: Tensor, activation: str = "softmax", **between: Any) -> Tensor:
    """Both as two losses, each with a read and a gradient of its own, which PyTorch adds up."""
    is_softmax = activation == "softmax"
    entropy = functional.cross_entropy if is_softmax else functional.binary_cross_entropy
    dice = functional.dice_loss(logits, target, activation=activation, **between)
    return entropy(logits, target, **between) + dice


_SIGMOID: dict[str, Any] = {"options": {"activation": "sigmoid"}}
CASES = variations(
    Case(SHAPES["cityscapes"], labels="uint8", against_compile=True),
    {"dtype": "bfloat16"},
    {"layout": "channels_last"},
    {"shape": SHAPES["ade20k"]},
    {"shape": SHAPES["voc"], "against_compile": False},
    {**_SIGMOID, "against_compile": False},
)
_ONCE = {"everywhere": False}
SHIPPED = variations(
    replace(CASES[0], everywhere=True, against_compile=False),
    {"shape": SHAPES["voc"], **_ONCE},
    {"shape": overlap.HELD, **_ONCE},
    {"layout": "channels_last", **_ONCE},
    {"shape": SHAPES["ade20k"], **_ONCE},
    {"dtype": "bfloat16", **_ONCE},
    {**_SIGMOID, **_ONCE},
)
RARE = rarely(
    SHIPPED[0],
    {"dtype": "float16"},
    {"dtype": "float64"},
    {"layout": "strided"},
    {"labels": "int64"},
    {"labels": "int32"},
    {"labels": "int16"},
    {"shape": overlap.HELD, "labels": "int64"},
    {"shape": overlap.HELD, "dtype": "bfloat16"},
    {"shape": SHAPES["ade20k"], "layout": "channels_last"},
    {"shape": SHAPES["ade20k"], **_SIGMOID},
    {"layout": "channels_last", "dtype": "bfloat16"},
)


def _values(given: Given) -> float:
    return float(-(-given["programs"] * given["images"] // 256))


def _groups(given: Given) -> float:
    """Of the program that comes last."""
    return float(given["groups"] / given["PROGRAMS"])


KERNELS = {
    "_joint_forward_kernel": KernelNotes(
        lambda given: outputs(given) * given["rounds"],
        (
            LoopNotes("tiles", "_joint_forward_kernel.i", lambda given: float(given["rounds"])),
            class_loop("statistics", "_fold_blocks"),
            class_loop("classes", "_sum_blocks"),
        ),
    ),
    "_joint_head_kernel": KernelNotes(
        share_of_the_map,
        (
            LoopNotes("parts", "add_parts", overlap.parts),
            LoopNotes("groups", "sum_losses", _groups),
            LoopNotes("images", "_classes_of", overlap.images),
            LoopNotes("values", "_add_values", _values),
            LoopNotes("valid", "_valid_pixels", overlap.images),
            LoopNotes("tables", "_joint_head_kernel.group", _groups),
        ),
    ),
    "_joint_backward_kernel": KernelNotes(
        outputs,
        (class_loop("projection", "_project_blocks"), class_loop("classes", "write_gradients")),
    ),
}

# 1.35 times the instructions of cross entropy alone at sm_90, forward and backward.
_LIMITS = {"cityscapes": (16.8, 17.24), "voc": (26.2, 28.2), "held": (12.8, 15.45)}
_CODE = tuple(
    CodeGoal(
        f"Cross entropy and dice in one read, {direction}, {case.shape.name}: "
        "instructions per pixel and class",
        case,
        f"_joint_{direction}_kernel",
        "total",
        at_most=limit,
    )
    for case in SHIPPED[:3]
    for direction, limit in zip(("forward", "backward"), _LIMITS[case.shape.name], strict=True)
)
_EXTRA = (CASES[0].shape.elements * 4 + 4 * CASES[0].shape.pixels + 2**16) / 2**20

# --- interpolated logits --------------------------------------------------------------------------

_UPSAMPLED = upsampling.BASE.options
UPSAMPLED_SHIPPED = (
    variations(
        replace(upsampling.BASE, everywhere=True),
        {"shape": upsampling.MANY_STREETS, "ratio": 8, **_ONCE},
        {"shape": SHAPES["coco-stuff"], **_ONCE},
    )
    + upsampling.MANY_CLASSES[:2]
)
UPSAMPLED_RARE = rarely(
    upsampling.BASE,
    {"dtype": "bfloat16"},
    {"ratio": 3.3},
    {"options": {**_UPSAMPLED, "activation": "sigmoid"}},
    {"shape": SHAPES["coco-stuff"], "options": {**_UPSAMPLED, "activation": "sigmoid"}},
)
_WORDS = "Cross entropy and dice of upsampled logits"
# Together 1.35 times the 12.4 and 13.3 instructions of cross entropy alone at sm_90.
_UPSAMPLED_CODE = tuple(
    CodeGoal(
        f"{_WORDS} in one read, {kernel}: instructions per pixel and class",
        UPSAMPLED_SHIPPED[0],
        kernel,
        "total",
        at_most=limit,
    )
    for kernel, limit in (("_class_cells_held_kernel", 15.2), ("_upsampled_backward_kernel", 18.7))
)
UPSAMPLED_KERNELS = {
    **{k: notes for k, notes in cell_loops.OVERLAP_KERNELS.items() if k != "_class_head_kernel"},
    "_joint_head_kernel": KERNELS["_joint_head_kernel"],
}

OPERATIONS = (
    Operation(
        name="cross_entropy_and_dice",
        function=cross_entropy_and_dice,
        reference=eager,
        inputs=pixel_cases.inputs,
        launch=launch,
        floor=pixel_cases.floor,
        cases=CASES,
        shipped=(*SHIPPED, *RARE),
        kernels=KERNELS,
        operators=("joint_forward", "joint_backward"),
        goals=(
            Goal(
                "Cross entropy and dice in one read: extra MiB, that of cross entropy and 64 KiB",
                CASES[0],
                "peak_delta_MiB",
                at_most=_EXTRA,
            ),
            *(
                Goal(
                    f"Cross entropy and dice in one read, {case.text}: speed against eager",
                    case,
                    "speedup_vs_eager",
                    at_least=5.0,
                )
                for case in CASES[:3]
            ),
            *_CODE,
        ),
        libraries={"two losses": lambda: apart},
    ),
    Operation(
        name="cross_entropy_and_dice_upsampled",
        function=cross_entropy_and_dice,
        reference=eager,
        inputs=upsampling.inputs,
        launch=launch,
        floor=upsampling.floor,
        cases=upsampling.CASES[:3],
        shipped=(*UPSAMPLED_SHIPPED, *UPSAMPLED_RARE, *upsampling.RARE),
        kernels=UPSAMPLED_KERNELS,
        operators=(),  # its configurations are heuristics
        goals=(
            *upsampling.memory_goals(_WORDS, 4, upsampling.CASES[:1]),
            *upsampling.memory_goals(_WORDS, 8, upsampling.CASES[1:2]),
            *_UPSAMPLED_CODE,
        ),
        small_launch={"ROWS": 1, "num_warps": 1},
        libraries={"two losses": lambda: apart},
    ),
)

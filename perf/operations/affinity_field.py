"""Cases, bytes and goals of affinity fields."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kernels_reference import affinity_field_loss as reference
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
from perf.operations.pixel_cases import BASE, floor, inputs
from tritonloss import functional
from tritonloss.affinity.affinity_field import AFFINITY_FIELD
from tritonloss.affinity.affinity_field_launch import Options


def launch(case: Case, tensors: tuple[Tensor, ...]) -> None:
    """Both launchers, with a case's options."""
    given = dict(case.options)
    sizes = given.pop("size", 1)
    options = Options(
        sizes=",".join(map(str, sizes if isinstance(sizes, tuple) else (sizes,))),
        triple=given.pop("void", "triple") == "triple",
        ignore_index=255,
    )
    AFFINITY_FIELD.both_passes(*tensors, None, None, options=options._replace(**given))


def _outputs(given: Given) -> float:
    """A thread's share of a program's pixels and classes."""
    pixels = given["STENCIL.lanes"] * given["STENCIL.rows"]
    return float(pixels * given["STENCIL.classes"] / given["THREADS"])


def _classes(given: Given) -> float:
    return float(given["STENCIL.classes"])


CASES = tuple(
    replace(case, against_compile=False)
    for case in variations(
        replace(BASE, shape=SHAPES["voc"]),
        {"shape": SHAPES["cityscapes"]},
        {"dtype": "bfloat16"},
        {"options": {"size": (1, 2, 3)}},
        {"layout": "channels_last"},
        {"shape": SHAPES["ade20k"]},
    )
)
_ONCE = {"everywhere": False}
SHIPPED = variations(
    replace(CASES[0], everywhere=True),
    {"dtype": "bfloat16"},
    {"dtype": "float16"},
    {"options": {"size": (1, 2)}, "dtype": "bfloat16", **_ONCE},
    {"options": {"size": (1, 2)}, **_ONCE},
    {"options": {"void": "pair"}, **_ONCE},
    {"layout": "channels_last", **_ONCE},
    {"labels": "int64", **_ONCE},
    {"dtype": "float64", **_ONCE},
)
RARE = rarely(
    SHIPPED[0],
    {"shape": SHAPES["ade20k"]},
    {"layout": "channels_last", "dtype": "bfloat16"},
    *({"labels": labels} for labels in ("int16", "int32")),
)

_STATISTICS = LoopNotes("statistics", "statistics_of", _classes)
KERNELS = {
    "_affinity_forward_kernel": KernelNotes(
        _outputs,
        (_STATISTICS, LoopNotes("entries", "_affinity_forward_kernel.channel", _classes)),
    ),
    "_affinity_backward_kernel": KernelNotes(
        _outputs,
        (
            _STATISTICS,
            LoopNotes("gather", "_gather.channel", _classes),
            LoopNotes("write", "_write.channel", _classes),
        ),
    ),
}
_EXTRA = 1.02 * CASES[0].shape.elements * torch.float32.itemsize / 2**20
GOALS = (
    Goal("Affinity field: extra MiB, 1.02 times the logits", CASES[0], "peak_delta_MiB",
         at_most=_EXTRA),
    Goal("Affinity field, H200: speed against eager", CASES[0], "speedup_vs_eager", at_least=10.0),
    *(
        CodeGoal(f"Affinity field, {direction}, {case.dtype}: instructions per pixel and class",
                 case, f"_affinity_{direction}_kernel", "total", at_most=most)
        for case in SHIPPED[:2]
        for direction, most in (("forward", 390.0), ("backward", 790.0))
    ),
)  # fmt: skip

OPERATIONS = (
    Operation(
        name="affinity_field_loss",
        function=functional.affinity_field_loss,
        reference=reference,
        inputs=inputs,
        launch=launch,
        floor=floor,
        cases=CASES,
        shipped=(*SHIPPED, *RARE),
        kernels=KERNELS,
        operators=("affinity_field_forward", "affinity_field_backward"),
        goals=GOALS,
        small_launch={"LANES": 32, "ROWS": 2, "num_warps": 1},
    ),
)

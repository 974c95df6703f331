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

_SIZES = (1, 2, 3)


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


def _scores(classes: int, device: torch.device) -> Tensor:
    """Weights of three sizes that nobody has trained: they take as long as any."""
    return torch.full((classes, len(_SIZES)), 1 / len(_SIZES), device=device)


def adaptive(logits: Tensor, target: Tensor) -> Tensor:
    """The loss of three sizes with weights of the classes."""
    edge, other = (_scores(logits.size(1), logits.device) for _ in range(2))
    return functional.affinity_field_loss(
        logits, target, size=_SIZES, edge_table=edge, non_edge_table=other
    )


def adaptive_reference(logits: Tensor, target: Tensor) -> Tensor:
    """The reference with those weights."""
    edge, other = (_scores(logits.size(1), logits.device) for _ in range(2))
    return reference(logits, target, size=_SIZES, edge_table=edge, non_edge_table=other)


def launch_adaptive(case: Case, tensors: tuple[Tensor, ...]) -> None:
    """Both launchers; going back, the weights get a gradient, too."""
    logits, target = tensors
    edge, other = (_scores(logits.size(1), logits.device) for _ in range(2))
    options = Options(sizes=",".join(map(str, _SIZES)), ignore_index=255)
    AFFINITY_FIELD.both_passes(logits, target, edge, other, options=options)


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

ADAPTIVE = tuple(case for case in CASES[:3] if not case.options)
ADAPTIVE_SHIPPED = (
    *SHIPPED[:3],
    *rarely(
        SHIPPED[0],
        {"labels": "int64"},
        {"labels": "int32"},
        {"labels": "int16"},
        {"dtype": "float64"},
    ),
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
            LoopNotes("tables", "_store_entries.channel", _classes),
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

_SMALL = {"LANES": 32, "ROWS": 2, "num_warps": 1}
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
        small_launch=_SMALL,
    ),
    Operation(
        name="adaptive_affinity_field_loss",
        function=adaptive,
        reference=adaptive_reference,
        inputs=inputs,
        launch=launch_adaptive,
        floor=floor,
        cases=ADAPTIVE,
        shipped=ADAPTIVE_SHIPPED,
        kernels=KERNELS,
        operators=("affinity_field_forward", "affinity_field_backward"),
        small_launch=_SMALL,
    ),
)

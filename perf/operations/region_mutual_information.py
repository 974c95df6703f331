"""Cases, bytes and goals of the region mutual information loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels_reference import rmi_loss as reference
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
from perf.operations.region_loops import KERNELS
from tritonloss import functional
from tritonloss.regions.backward import backward_pass
from tritonloss.regions.forward import forward_pass
from tritonloss.regions.plan import Options, is_small

_DEFAULTS = Options(
    region_size=3,
    pooling="avg",
    pool_size=4,
    moments="mean",
    epsilon=1e-6,
    bce_weight=0.5,
    ignore="zero",
    ignore_index=255,
    precision=None,
)


def inputs(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    """Logits [N, C, H, W] and labels [N, H, W]."""
    return random_map(case, device), random_labels(case, device)


def launch(case: Case, tensors: tuple[Tensor, ...]) -> Tensor:
    """Run the forward and backward launchers."""
    logits, target = tensors
    options = _DEFAULTS._replace(**case.options)
    options = options._replace(small=is_small(options, logits.size(2), logits.size(3)))
    loss, _, saved = forward_pass(options, logits, target)
    return backward_pass(options, loss, logits, target, saved)


def floor(case: Case) -> Floor:
    """Forward reads logits and labels: L + T. Backward also writes the gradient: 2 L + T."""
    logits = case.shape.elements * case.torch_dtype.itemsize
    labels = case.shape.pixels * getattr(torch, str(case.labels)).itemsize
    return Floor(forward=logits + labels, backward=2 * logits + labels)


BASE = Case(
    SHAPES["voc"],
    labels="uint8",
    options={"region_size": 3, "pool_size": 4},
    against_compile=True,
)
CASES = variations(
    BASE,
    {"shape": SHAPES["cityscapes"]},
    {"options": {"pooling": None}},
    {"options": {"pool_size": 2}},
    {"options": {"region_size": 5}},
    {"options": {"region_size": 5, "pool_size": 2}},
    {"options": {"region_size": 5, "pooling": None}},
    {"options": {"pooling": "max"}, "against_compile": False},
    {"options": {"pooling": "nearest"}, "against_compile": False},
    {"dtype": "bfloat16", "against_compile": False},
    {"labels": "int64", "against_compile": False},
    {"layout": "channels_last", "against_compile": False},
)

# A map with so few regions that everything is computed in float64.
_SMALL = Shape("small", 16, 21, 32, 32)

# One case for each way a kernel is built: regions, poolings, what else changes the code.
SHIPPED = variations(
    Case(
        SHAPES["voc"],
        labels="uint8",
        options={"region_size": 3, "pool_size": 4},
        everywhere=True,
    ),
    {"options": {"region_size": 5}},
    {"options": {"pooling": None}},
    {"options": {"region_size": 5, "pooling": None}},
    {"options": {"ignore": "drop"}},
    *({"options": {"region_size": region}, "everywhere": False} for region in (1, 2, 4)),
    *(
        {"options": {"region_size": region, "pooling": None}, "everywhere": False}
        for region in (1, 2, 4)
    ),
    *({"options": {"pool_size": size}, "everywhere": False} for size in (2, 3, 5, 8)),
    *(
        {"options": {"pooling": "max", "pool_size": size}, "everywhere": False}
        for size in (3, 4, 8)
    ),
    {"options": {"pooling": "nearest"}, "everywhere": False},
    {"options": {"pooling": "nearest", "ignore": "drop"}, "everywhere": False},
    {"options": {"region_size": 5, "pooling": None, "ignore": "drop"}, "everywhere": False},
    {"options": {"moments": "sum", "epsilon": 5e-4}, "everywhere": False},
    *(
        {"options": {"region_size": region, "precision": "float32"}, "everywhere": False}
        for region in (3, 5)
    ),
    {"options": {"pooling": None, "precision": "float32"}, "everywhere": False},
    # The cases with the most to keep in registers: wide labels, and sums of every region size.
    *(
        {
            "labels": "int64",
            "options": {"region_size": region, "pooling": None},
            "everywhere": False,
        }
        for region in (1, 2, 4, 5)
    ),
    {
        "labels": "int64",
        "options": {"region_size": 4, "precision": "float32"},
        "everywhere": False,
    },
    *({"dtype": dtype, "everywhere": False} for dtype in ("bfloat16", "float16")),
    {"labels": "int64", "everywhere": False},
    *({"layout": layout, "everywhere": False} for layout in ("channels_last", "strided")),
    {"layout": "channels_last", "options": {"pooling": None}, "everywhere": False},
    # Rows of whole chunks, which are loaded at once.
    {"shape": SHAPES["cityscapes"], "options": {"pooling": None}, "everywhere": False},
    *(
        {"dtype": dtype, "options": {"pooling": None}, "everywhere": False}
        for dtype in ("bfloat16", "float16")
    ),
    {"shape": _SMALL},
    *(
        {"shape": _SMALL, "options": options, "everywhere": False}
        for options in (
            {"pooling": None},
            {"pooling": None, "region_size": 5, "ignore": "drop"},
            *({"pool_size": size} for size in (2, 3, 8)),
            {"pooling": "max", "pool_size": 8},
            {"pooling": "nearest"},
        )
    ),
    {"shape": _SMALL, "dtype": "bfloat16", "everywhere": False},
    {"dtype": "float64", "everywhere": False},
    # The cases that take the most registers without pooling.
    {"labels": "int64", "options": {"pooling": None}},
    {
        "labels": "int64",
        "options": {"pooling": None, "region_size": 4, "precision": "float32"},
        "everywhere": False,
    },
)
_REGIONS = (1, 2, 3, 4, 5)
_UNPOOLED: dict[str, Any] = {"pooling": None}
RARE = rarely(
    SHIPPED[0],
    *(
        {"labels": labels, "options": {**_UNPOOLED, "region_size": region}}
        for labels in ("int16", "int32")
        for region in (3, 5)
    ),
    *(
        {
            "labels": "int64",
            "options": {**_UNPOOLED, "region_size": region, "precision": "float32"},
        }
        for region in (1, 2, 3, 5)
    ),
    *({"options": {"region_size": region, "precision": "float32"}} for region in (1, 2, 4)),
    *({"labels": "int64", "options": {"region_size": region}} for region in (1, 2, 4, 5)),
    *({"dtype": "float64", "options": {"region_size": region}} for region in (1, 2, 4, 5)),
    *({"dtype": "float64", "options": {**_UNPOOLED, "region_size": region}} for region in _REGIONS),
    *({"labels": "int64", "options": {"pool_size": size}} for size in (2, 3, 8)),
    {"labels": "int64", "options": {"pooling": "max"}},
    {"labels": "int64", "options": {"pooling": "nearest"}},
    {"labels": "int64", "options": {**_UNPOOLED, "region_size": 5, "ignore": "drop"}},
    {"labels": "int64", "layout": "channels_last", "options": _UNPOOLED},
    # Rows of whole chunks, with the most to keep in registers.
    *(
        {"shape": SHAPES["cityscapes"], "dtype": dtype, "labels": labels, "options": options}
        for dtype, labels, options in (
            ("bfloat16", "uint8", _UNPOOLED),
            ("float32", "int64", _UNPOOLED),
            ("float32", "int64", {**_UNPOOLED, "region_size": 4}),
            ("float32", "int64", {**_UNPOOLED, "region_size": 4, "precision": "float32"}),
        )
    ),
    {"labels": "int64", "dtype": "bfloat16", "options": _UNPOOLED},
)


def _shipped(region: int) -> Case:
    options = {"region_size": region, "pool_size": 4}
    return next(case for case in SHIPPED if case.options == options)


def _unpooled() -> Case:
    options = {"region_size": 3, "pool_size": 4, "pooling": None}
    return next(case for case in SHIPPED if case.options == options and case.labels == "uint8")


def _mib(case: Case) -> float:
    return case.shape.elements * case.torch_dtype.itemsize / 2**20


GOALS: tuple[Goal | CodeGoal, ...] = (
    *(
        goal
        for case in CASES[:2]
        for goal in (
            Goal(
                f"RMI, pool 4, {case.shape.name}: share of the copy bandwidth",
                case,
                "share_of_copy",
                at_least=0.55,
            ),
            Goal(
                f"RMI, pool 4, {case.shape.name}: speed against eager",
                case,
                "speedup_vs_eager",
                at_least=10,
            ),
            # The gradient, two maps of L / 16, and 1 % for the rest.
            Goal(
                f"RMI, pool 4, {case.shape.name}: extra MiB, 1.135 times the logits",
                case,
                "peak_delta_MiB",
                at_most=1.135 * _mib(case),
            ),
        )
    ),
    Goal("RMI, no pooling: speed against eager", CASES[2], "speedup_vs_eager", at_least=5),
    Goal(
        "RMI, no pooling: extra MiB, 1.05 times the logits",
        CASES[2],
        "peak_delta_MiB",
        at_most=1.05 * _mib(CASES[2]),
    ),
    # The limits are the prototypes' instructions per pooled pixel and class. Lag sums of regions of
    # 4 and 5 are made in two loops, each by programs of its own; their limits are for both loops.
    *(
        CodeGoal(
            text=f"RMI, region {region}, {name}: at most the prototype's instructions",
            case=_shipped(region),
            kernel=f"_rmi_{name}_kernel",
            loop="rows",
            at_most=instructions,
        )
        for name, counts in (
            ("lags", {2: 59, 3: 112, 4: 264, 5: 383}),
            ("interior", {2: 71, 3: 125, 4: 194, 5: 275}),
        )
        for region, instructions in counts.items()
    ),
    # Per pixel and class: lag sums with the cross entropy, and the gradient to the logits.
    *(
        CodeGoal(
            text=f"RMI, no pooling, {name}: at most {instructions} instructions",
            case=_unpooled(),
            kernel=f"_rmi_{name}_kernel",
            loop="rows",
            at_most=instructions,
        )
        for name, instructions in (("lags", 105), ("interior", 125))
    ),
)

OPERATIONS = (
    Operation(
        name="rmi_loss",
        function=functional.rmi_loss,
        reference=reference,
        inputs=inputs,
        launch=launch,
        floor=floor,
        cases=CASES,
        shipped=(*SHIPPED, *RARE),
        kernels=KERNELS,
        operators=(),
        goals=GOALS,
    ),
)

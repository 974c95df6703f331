"""What the tuner measures for a pixelwise loss."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch

from .._core.configurations import Configuration, Launch, Shape, TuningCase
from .._core.operator import Operator
from .._core.tuning_inputs import random_labels, random_map
from .cell_grid import cell_heuristic
from .pixel_grid import pixel_heuristic
from .pixel_terms import Loss


def pixel_candidates(
    loss: Loss, direction: str, dtype: torch.dtype, classes: int, layout: str, *others: Loss
) -> list[Configuration]:
    """The heuristic and its neighbours, one setting changed at a time: what the tuner tries.

    The ``others`` share the loss's read.
    """
    like = random_map((1, classes, 2, 32), layout, dtype, torch.device("meta"))
    heuristic = pixel_heuristic([loss, *others], direction, like)
    pixels, lanes = int(heuristic["PIXELS"]), int(heuristic["CLASS_LANES"])
    unroll, warps = int(heuristic["UNROLL"]), int(heuristic["num_warps"])
    changes: list[Configuration] = [{"PIXELS": pixels // 2}, {"PIXELS": pixels * 2}]
    changes += [{"UNROLL": max(unroll // 2, 1)}, {"UNROLL": unroll * 2}]
    changes += [{"PIXELS": pixels // 2, "num_warps": warps // 2}]
    changes += [{"PIXELS": pixels * 2, "num_warps": warps * 2}]
    if lanes > 1:
        changes += [{"CLASS_LANES": lanes // 2, "PIXELS": pixels * 2}]
        changes += [{"CLASS_LANES": lanes * 2, "PIXELS": pixels // 2}]
    candidates = [heuristic, *({**heuristic, **change} for change in changes)]
    return [c for i, c in enumerate(candidates) if c not in candidates[:i]]


def cell_candidates(loss: Loss, direction: str, ratio: int) -> list[Configuration]:
    """The heuristic for a whole ratio, and its neighbours."""
    heuristic = cell_heuristic([loss], direction, ratio)
    columns, unroll = int(heuristic["PIXEL_COLUMNS"]), int(heuristic["UNROLL"])
    warps = int(heuristic["num_warps"])
    changes: list[Configuration] = [{"PIXEL_COLUMNS": columns // 2 or 2}]
    changes += [{"UNROLL": unroll - unroll // 2}, {"UNROLL": unroll * 2}]
    changes += [{"num_warps": warps * 2}]
    if direction == "forward":
        rows = int(heuristic["PIXEL_ROWS"])
        changes += [{"PIXEL_ROWS": max(rows // 2, 1)}, {"num_warps": warps // 2}]
    else:
        nodes = int(heuristic["NODE_ROWS"])
        changes += [{"NODE_ROWS": nodes // 2}, {"NODE_ROWS": nodes * 2}]
    candidates = [heuristic, *({**heuristic, **change} for change in changes)]
    return [c for i, c in enumerate(candidates) if c not in candidates[:i]]


def pixel_cases(loss: Loss, operator: Operator, options: Any, tables: int = 0) -> list[TuningCase]:
    """The tuning cases of a loss with these options and this number of tables."""
    whole = _whole_cases(loss, operator, options, tables)
    headlines = 4  # both directions and dtypes of one size
    upsampled = _upsampled_cases(loss, operator, options, tables)
    return [*whole[:headlines], *upsampled, *whole[headlines:]]


def first_cases(loss: Loss, operator: Operator, options: Any) -> list[TuningCase]:
    """The tuning cases of a loss with these options in its most common size, and no more."""
    return [
        TuningCase(
            f"{loss.name}_{direction}",
            19,
            1,
            dtype,
            layout,
            functools.partial(_tuning_pass, operator, options, 0, dtype, (2, 19, 512, 512), layout),
            pixel_candidates(loss, direction, dtype, 19, layout),
        )
        for layout in ("contiguous", "channels_last", "strided")
        for dtype in (torch.float32, torch.bfloat16)
        for direction in ("forward", "backward")
    ]


def _upsampled_cases(loss: Loss, operator: Operator, options: Any, tables: int) -> list[TuningCase]:
    """The cases of interpolated logits: few, as tuned ones are checked for other classes too."""
    classes, options = 19, options._replace(upsample="bilinear")
    cases = []
    for ratio, dtype in ((4, torch.float32), (4, torch.bfloat16), (8, torch.float32)):
        run = functools.partial(
            _tuning_pass, operator, options, tables, dtype, (2, classes, 512, 512), "contiguous",
            ratio=ratio,
        )  # fmt: skip
        cases += [
            TuningCase(
                f"{loss.name}_upsampled_{direction}",
                classes,
                ratio,
                dtype,
                "contiguous",
                run,
                cell_candidates(loss, direction, ratio),
            )
            for direction in ("forward", "backward")
        ]
    return cases


def _whole_cases(loss: Loss, operator: Operator, options: Any, tables: int) -> list[TuningCase]:
    cases = []
    layouts = ("contiguous", "channels_last")
    for classes, layout in (*itertools.product((19, 150), layouts), (1, "contiguous")):
        for dtype in (torch.float32, torch.bfloat16):
            if classes == 1 and not loss.binary:
                continue
            sized = functools.partial(_tuning_pass, operator, options, tables, dtype)
            stated = functools.partial(sized, (2, classes, 512, 512), layout)
            for direction in ("forward", "backward"):
                candidates = functools.partial(pixel_candidates, loss, direction, dtype)
                cases.append(
                    TuningCase(
                        f"{loss.name}_{direction}",
                        classes,
                        1,
                        dtype,
                        layout,
                        stated,
                        candidates(classes, layout),
                        sized=sized,
                        sized_candidates=candidates,
                    )  # fmt: skip
                )
    return cases


def _tuning_pass(
    operator: Operator,
    options: Any,
    tables: int,
    dtype: torch.dtype,
    shape: Shape,
    layout: str,
    device: torch.device,
    ratio: int = 1,
) -> Launch:
    """A launch of both passes, for labels of a shape and logits smaller by the ratio."""
    batch, classes, height, width = shape
    smaller = (batch, classes, height // ratio, width // ratio)
    logits = random_map(smaller, layout, dtype, device).sub_(0.5).mul_(8)
    target = random_labels(shape, device)
    table = torch.full((classes,), 0.1, device=device)
    others = len(operator.inputs) - 2 - tables
    given = (logits, target, *(table,) * tables, *(None,) * others)

    def both_passes() -> tuple[torch.Tensor, ...]:
        return operator.both_passes(*given, options=options)

    return both_passes

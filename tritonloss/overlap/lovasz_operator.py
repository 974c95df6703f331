"""What both Lovász losses have in common above their launchers: operator, bins, tuning."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch

from .._core import checks
from .._core.configurations import Launch, Shape, TuningCase
from .._core.operator import Operator
from .._core.tuning_inputs import random_labels, random_map
from .._engine.pixel_terms import Loss
from .lovasz_launch import launch_backward, launch_forward, neighbours
from .lovasz_terms import IS_QUICK, Options, Results, allocated


def lovasz_operator(loss: Loss) -> Operator:
    """The operator of one of the losses."""

    def forward(
        logits: torch.Tensor, target: torch.Tensor, options: Options, save: bool
    ) -> Results:
        return launch_forward(loss, logits, target, options, save)

    def backward(
        grad_loss: torch.Tensor,
        scale: torch.Tensor,
        table: Any,
        largest: Any,
        log_sum: Any,
        logits: torch.Tensor,
        target: torch.Tensor,
        options: Options,
    ) -> torch.Tensor:
        saved = Results(grad_loss, scale, table, largest, log_sum)
        return launch_backward(loss, grad_loss, saved, logits, target, options)

    def allocate(
        logits: torch.Tensor, target: torch.Tensor, options: Options, save: bool
    ) -> Results:
        return allocated(loss, logits, target, options, save)

    return Operator(
        loss.name,
        forward=forward,
        backward=backward,
        allocate=allocate,
        results=Results,
        options=Options,
    )


# --- options and shapes ---------------------------------------------------------------------------


def of_images(logits: torch.Tensor, target: torch.Tensor) -> tuple[Any, Any]:
    """Logits and labels of volumes as those of images with more rows; anything else as it is."""
    given = isinstance(logits, torch.Tensor), isinstance(target, torch.Tensor)
    if not all(given) or logits.is_nested or target.is_nested or logits.dim() < 5:
        return logits, target
    if target.shape != (logits.shape[0], *logits.shape[2:]):
        return logits, target
    return logits.flatten(2, -2), target.flatten(1, -2)


def number_of_bins(bins: int | None, defaults: tuple[int, int]) -> int:
    """How many bins there are."""
    if bins is not None:
        return int(bins)
    return defaults[0 if IS_QUICK and torch.version.hip is None else 1]


def check_bins(bins: int | None, low: int, high: int) -> None:
    """``bins`` must be a power of two in a range, or None."""
    if bins is None:
        return
    checks.check_integer("bins", bins, low, high)
    if bins & (bins - 1):
        raise ValueError(f"bins must be a power of two from {low} to {high}; got {bins}")


# --- tuning ---------------------------------------------------------------------------------------


def lovasz_tuning_cases(
    loss: Loss, operator: Operator, classes: int, bins: tuple[int, int]
) -> list[TuningCase]:
    """What the tuner measures for a loss of so many classes."""
    # The hinge has no pass for statistics, and no other numbers of classes.
    directions = ("forward", "histogram", "backward")[loss.binary :]
    cases = []
    for layout in ("contiguous", "strided") if loss.binary else ("contiguous",):
        for dtype in (torch.float32, torch.bfloat16):
            sized = functools.partial(_tuning_pass, operator, number_of_bins(None, bins), dtype)
            run = functools.partial(sized, (2, classes, 512, 512), layout)
            for direction in directions:
                candidates = functools.partial(neighbours, loss, direction, dtype)
                name, stated = f"{loss.name}_{direction}", candidates(classes, layout)
                case = TuningCase(name, classes, 1, dtype, layout, run, stated)
                if not loss.binary:
                    case = replace(case, sized=sized, sized_candidates=candidates)
                cases.append(case)
    return cases


def _tuning_pass(
    operator: Operator,
    bins: int,
    dtype: torch.dtype,
    shape: Shape,
    layout: str,
    device: torch.device,
) -> Launch:
    """A launch of both passes."""
    logits = random_map(shape, layout, dtype, device).sub_(0.5).mul_(8)
    target = random_labels(shape, device)
    options = Options(bins, "all")

    def both_passes() -> tuple[torch.Tensor, ...]:
        return operator.both_passes(logits, target, options=options)

    return both_passes

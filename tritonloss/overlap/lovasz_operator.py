"""What both Lovász losses have in common above their launchers: operator, bins, tuning."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.distributed import ProcessGroup

from .._core import checks
from .._core.configurations import Launch, Shape, TuningCase
from .._core.operator import Operator
from .._core.process_groups import check_process_group, name_of
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


class Around(NamedTuple):
    """What users give to both losses around their own options."""

    per_image: bool
    ignore_index: int | None
    exact: bool
    upsample: str | None
    align_corners: bool
    process_group: ProcessGroup | None


def check_around(around: Around, labels: int | None = None) -> None:
    """Check what both losses have; without ``labels``, for any number of them."""
    checks.check_flag("per_image", around.per_image)
    checks.check_ignore_index(around.ignore_index, labels)
    checks.check_flag("exact", around.exact)
    checks.check_upsample(around.upsample, around.align_corners)
    check_process_group(around.process_group)
    if around.process_group is not None and around.exact and not around.per_image:
        raise ValueError(
            "process_group must be None with exact=True, unless per_image=True: ranks add up "
            "histograms, and have no sort in common; got a process group"
        )


def checked_maps(
    logits: torch.Tensor, target: torch.Tensor, upsample: str | None, align_corners: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels as images, after all checks of both."""
    logits, target = checks.as_images(logits, target, upsample)
    checks.check_logits(logits)
    checks.check_upsample(upsample, align_corners)
    checks.check_target(logits, target, upsample, can_upsample=True)
    return logits, target


def options_of(around: Around, bins: int, classes: str) -> Options:
    """The options of the operators."""
    return Options(
        bins,
        classes,
        around.per_image,
        checks.plain_label(around.ignore_index),
        around.exact,
        around.upsample,
        around.align_corners,
        name_of(around.process_group),
    )


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

"""The operator of losses that share a read of the logits.

Its options are words, of which the losses are made again: a compiled graph may be another process's
(``joint_terms.py``). Weights are an input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .._core.loss_module import Part
from .._core.operator import Operator
from .joint_launch import (
    JointResults,
    allocated,
    launch_joint,
    launch_joint_backward,
)
from .joint_terms import Joint, described, joint_of, stacked


class Options(NamedTuple):
    """Which losses share the read."""

    losses: str  # in words, a line each
    places: Sequence[int]  # of their weights
    rows: Sequence[int]  # two each: of the own and the other table among the tables, or -1


class Results(NamedTuple):
    """What the operator returns."""

    loss: torch.Tensor  # []: the weighted sum
    terms: torch.Tensor  # [losses], without their weights
    scale: torch.Tensor | None
    table: torch.Tensor | None
    first: torch.Tensor | None  # maps for the backward pass, [N, H, W]
    second: torch.Tensor | None
    third: torch.Tensor | None
    fourth: torch.Tensor | None


class ChainedResults(NamedTuple):
    """What the operator returns that hands its logits on."""

    loss: torch.Tensor
    passed: torch.Tensor  # the logits, for losses whose gradients are there before this one's
    terms: torch.Tensor
    scale: torch.Tensor | None
    table: torch.Tensor | None
    first: torch.Tensor | None
    second: torch.Tensor | None
    third: torch.Tensor | None
    fourth: torch.Tensor | None


# --- operators ------------------------------------------------------------------------------------


def _joint(
    logits: torch.Tensor,
    target: torch.Tensor,
    weights: torch.Tensor | None,
    tables: torch.Tensor | None,
    options: Options,
    save: bool,
) -> Joint:
    """The losses as launchers take them; the backward pass needs no weights."""
    rows = [None if row < 0 or tables is None else tables[row] for row in options.rows]
    of_losses = list(zip(rows[::2], rows[1::2], strict=True))
    given = logits if weights is None else weights
    return joint_of(
        options.losses.split("\n"), of_losses, logits, target, given, options.places, save
    )


def _results(found: JointResults) -> Results:
    maps = (*found.maps, None, None, None, None)[:4]
    return Results(found.loss, found.terms, found.scale, found.table, *maps)


def _forward(
    logits: torch.Tensor,
    target: torch.Tensor,
    weights: torch.Tensor,
    tables: torch.Tensor | None,
    options: Options,
    save: bool,
) -> Results:
    joint = _joint(logits, target, weights, tables, options, save)
    return _results(launch_joint(joint, logits, target, save))


def _allocate(
    logits: torch.Tensor,
    target: torch.Tensor,
    weights: torch.Tensor,
    tables: torch.Tensor | None,
    options: Options,
    save: bool,
) -> Results:
    joint = _joint(logits, target, weights, tables, options, save)
    return _results(allocated(joint, logits, target, save))


def _backward(
    grad_loss: torch.Tensor,
    scale: Any,
    table: Any,
    first: Any,
    second: Any,
    third: Any,
    fourth: Any,
    logits: torch.Tensor,
    target: torch.Tensor,
    tables: torch.Tensor | None,
    options: Options,
) -> torch.Tensor:
    joint = _joint(logits, target, None, tables, options, True)
    kept = JointResults(grad_loss, grad_loss, scale, table, (first, second, third, fourth))
    return launch_joint_backward(joint, grad_loss, kept, logits, target)


WEIGHTED_SUM = Operator(
    "weighted_sum",
    forward=_forward,
    backward=_backward,
    allocate=_allocate,
    results=Results,
    options=Options,
    returned=2,
)


def _chained_forward(
    logits: torch.Tensor,
    target: torch.Tensor,
    weights: torch.Tensor,
    tables: torch.Tensor | None,
    options: Options,
    save: bool,
) -> ChainedResults:
    found = _forward(logits, target, weights, tables, options, save)
    return ChainedResults(found.loss, logits, *found[1:])


def _chained_allocate(
    logits: torch.Tensor,
    target: torch.Tensor,
    weights: torch.Tensor,
    tables: torch.Tensor | None,
    options: Options,
    save: bool,
) -> ChainedResults:
    found = _allocate(logits, target, weights, tables, options, save)
    return ChainedResults(found.loss, torch.empty_like(logits), *found[1:])


def _in_place(
    grad_loss: torch.Tensor,
    grad_passed: torch.Tensor,
    scale: Any,
    table: Any,
    first: Any,
    second: Any,
    third: Any,
    fourth: Any,
    logits: torch.Tensor,
    target: torch.Tensor,
    tables: torch.Tensor | None,
    options: Options,
) -> torch.Tensor:
    """The gradient, added to that of what the logits were passed on to."""
    joint = _joint(logits, target, None, tables, options, True)
    kept = JointResults(grad_loss, grad_loss, scale, table, (first, second, third, fourth))
    return launch_joint_backward(joint, grad_loss, kept, logits, target, grad_passed)


def _chained_backward(
    grad_loss: torch.Tensor,
    grad_passed: torch.Tensor,
    scale: Any,
    table: Any,
    first: Any,
    second: Any,
    third: Any,
    fourth: Any,
    logits: torch.Tensor,
    target: torch.Tensor,
    tables: torch.Tensor | None,
    options: Options,
) -> torch.Tensor:
    """The same where that gradient is not this one's to write into."""
    return _in_place(
        grad_loss, grad_passed.clone(), scale, table, first, second, third, fourth, logits, target,
        tables, options,
    )  # fmt: skip


# Where a backward pass may write into gradients that it is given, and nothing is traced.
_CHAINED = Operator(
    "weighted_sum_chained",
    forward=_chained_forward,
    backward=_chained_backward,
    allocate=_chained_allocate,
    results=ChainedResults,
    options=Options,
    returned=3,
    reuse=_in_place,
)


def weighted_sum(
    parts: Sequence[Part],
    logits: torch.Tensor,
    weights: torch.Tensor,
    places: Sequence[int],
    chained: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(the weighted sum, all losses, the logits for others if chained) of losses of one read."""
    tables, rows = stacked([table for part in parts for table in part.tables], parts[0].logits)
    words = [described(part.slice, part.options) for part in parts]
    options = Options("\n".join(words), list(places), list(rows))
    target = parts[0].target
    if chained:
        loss, passed, terms = _CHAINED(logits, target, weights, tables, options=options)
        return loss, terms, passed
    loss, terms = WEIGHTED_SUM(logits, target, weights, tables, options=options)
    return loss, terms, None

"""The operator of a single pixelwise loss, over logits as they are or interpolated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .._core.operator import Operator
from .pixel_launch import launch_backward, launch_forward
from .pixel_terms import Kept, Loss, Results, Term, allocated, made, walk_of


def pixelwise_operator(
    loss: Loss,
    options: type[Any],
    term: Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor | None, Any, bool], Term],
) -> Operator:
    """The operator of a single loss.

    Args:
        loss: the loss.
        options: a NamedTuple with the fields of a ``Walk`` among its own.
        term: (logits, own table, other table, options, save) -> the loss as a term.
    """

    def results(value: torch.Tensor, kept: Kept) -> Results:
        return Results(value, kept.scale, *kept.maps, *(None,) * (2 - len(kept.maps)))

    def forward(
        logits: torch.Tensor,
        target: torch.Tensor,
        own_table: torch.Tensor | None,
        other_table: torch.Tensor | None,
        options: Any,
        save: bool,
    ) -> Results:
        terms = (term(logits, own_table, other_table, options, save),)
        walk = walk_of(options, logits, target)
        return results(*launch_forward(terms, logits, target, walk, save))

    def backward(
        grad_loss: torch.Tensor,
        scale: torch.Tensor,
        first: Any,
        second: Any,
        logits: torch.Tensor,
        target: torch.Tensor,
        own_table: torch.Tensor | None,
        other_table: torch.Tensor | None,
        options: Any,
    ) -> torch.Tensor:
        terms = (term(logits, own_table, other_table, options, True),)
        walk = walk_of(options, logits, target)
        kept = Kept(scale, (first, second))
        return launch_backward(terms, grad_loss, kept, logits, target, walk)

    def allocate(
        logits: torch.Tensor,
        target: torch.Tensor,
        options: Any,
        save: bool,
        **_: torch.Tensor | None,
    ) -> Results:
        return results(
            *allocated(made([loss], logits, target, walk_of(options, logits, target), save), logits)
        )

    return Operator(
        loss.name,
        forward=forward,
        backward=backward,
        allocate=allocate,
        results=Results,
        options=options,
    )

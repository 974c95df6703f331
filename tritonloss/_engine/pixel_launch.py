"""The launchers of all pixelwise losses, of one loss or of several in one read of the logits."""

from __future__ import annotations

import torch

from .._core.backend import device_guard
from .._core.prepared_launch import PreparedLaunch, kind, prepared
from .._core.process_groups import add_over_ranks
from .cell_grid import axes_of_walk, backward_over_cells, forward_over_cells
from .pixel_grid import backward_over_pixels, forward_over_pixels
from .pixel_terms import (
    Kept,
    Made,
    Term,
    Walk,
    Weights,
    allocated,
    key_of,
    made,
    numbers_of,
    tables_of,
    terms_of,
)
from .sums import sums_over


def launch_forward(
    terms: tuple[Term, ...],
    logits: torch.Tensor,
    target: torch.Tensor,
    walk: Walk,
    save: bool,
    *,
    weights: Weights | None = None,
    values: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Kept]:
    """(the sum of the losses, what their backward pass needs if ``save``).

    With ``weights``, each loss is multiplied by its own, and without it stored in ``values``.
    """
    losses = [term.loss for term in terms]
    rows = 2 * len(terms) + 1 if walk.reduction != "none" else 0
    if target.numel() == 0:  # no program runs, and so none comes last
        loss, kept = allocated(made(losses, logits, target, walk, save), logits)
        if values is not None:
            values.zero_()
        loss.zero_()
        kept.scale.zero_()
        if walk.group is not None:
            totals = torch.zeros(rows, dtype=torch.float64, device=logits.device)
            _add_other_ranks(totals, walk, weights, (loss, kept.scale, values))
        return loss, kept

    def prepare() -> tuple[PreparedLaunch, int, tuple[Made, ...]]:
        over = forward_over_pixels if walk.upsample is None else forward_over_cells
        way = over(losses, logits, target, walk)
        constants = {
            **numbers_of(terms, weights),
            "programs": way.programs,
            "TERMS": terms_of(terms, logits, walk, save),
            "REDUCTION": walk.reduction,
            **way.arguments,
        }
        launch = PreparedLaunch(way.kernel, (way.programs,), constants, way.aligned)
        return launch, way.programs, made(losses, logits, target, walk, save)

    places = None if weights is None else weights.places
    key = (key_of(terms), kind(logits), kind(target), walk, save, places)
    launch, programs, filled = prepared(key, prepare)
    loss, kept = allocated(filled, logits)
    own, other = tables_of(terms, logits)
    with device_guard(logits):
        sums = sums_over(programs, rows, logits.device)
        launch(
            logits_ptr=logits,
            target_ptr=target,
            own_ptrs=own,
            other_ptrs=other,
            map_ptrs=kept.maps,
            values_ptr=loss,
            loss_ptr=loss,
            terms_ptr=loss if values is None else values,
            scale_ptr=kept.scale,
            weights_ptr=loss if weights is None else weights.numbers,
            scratch_ptr=sums["scratch_ptr"],
            tickets_ptr=sums["tickets_ptr"],
            **axes_of_walk(logits, target, walk),
        )
        if walk.group is not None:
            totals = sums["scratch_ptr"][:rows].clone()
            _add_other_ranks(totals, walk, weights, (loss, kept.scale, values))
    return loss, kept


def _add_other_ranks(
    totals: torch.Tensor,
    walk: Walk,
    weights: Weights | None,
    results: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
) -> None:
    """Make the results those of all ranks' pixels: the loss, the scales, perhaps each value."""
    loss, scale, values = results
    found, factors = means_of_ranks(totals, walk)
    if weights is not None:
        of_losses = torch.stack([weights.numbers[place] for place in weights.places])
        loss.copy_((of_losses * found).sum())
        scale.copy_(of_losses * factors)
    else:
        loss.copy_(found.sum())
        scale.copy_(factors)
    if values is not None:
        values.copy_(found)


def means_of_ranks(totals: torch.Tensor, walk: Walk) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every loss its value over all ranks' pixels, and the factor of its pixels' gradients.

    ``totals`` are this rank's sums as ``store_loss`` has them, float64: of every loss its values
    and what they are divided by, then the valid pixels. In a group they become those of all ranks.
    """
    ranks = 1 if walk.group is None else add_over_ranks(totals, walk.group)
    values, divisors = totals[:-1].view(-1, 2).unbind(1)
    if walk.reduction == "mean":
        divisors = torch.where(totals[-1] > 0, divisors, 1.0)
        divisors = torch.where(divisors == 0, torch.nan, divisors)
    else:
        divisors = torch.ones_like(divisors)
    return values / divisors, ranks / divisors


def launch_backward(
    terms: tuple[Term, ...],
    upstream: torch.Tensor,
    kept: Kept,
    logits: torch.Tensor,
    target: torch.Tensor,
    walk: Walk,
    *,
    weights: Weights | None = None,
    before: torch.Tensor | None = None,
) -> torch.Tensor:
    """The gradient of the logits; it is added to ``before``, in place, if that is there.

    ``weights`` are those of the forward pass, for a loss that is a map.
    """
    losses = [term.loss for term in terms]
    if target.numel() == 0:
        return torch.zeros_like(logits) if before is None else before
    grad_logits = torch.empty_like(logits) if before is None else before
    own, other = tables_of(terms, logits)

    def prepare() -> tuple[PreparedLaunch, int]:
        over = backward_over_pixels if walk.upsample is None else backward_over_cells
        way = over(losses, logits, target, walk, (upstream, grad_logits))
        known = terms_of(terms, logits, walk, save=True, adds=before is not None)
        constants = {**numbers_of(terms, weights), "TERMS": known, **way.arguments}
        launch = PreparedLaunch(way.kernel, (way.programs,), constants, way.aligned)
        return launch, sum(known.stored)

    # The layout of a gradient that is made here follows from that of the logits.
    upstream_kind = kind(upstream) if walk.reduction == "none" else None
    others = (
        None if weights is None else weights.places,
        None if before is None else kind(before),
    )
    key = (key_of(terms), kind(logits), kind(target), upstream_kind, walk, others)
    launch, maps = prepared(key, prepare)
    with device_guard(logits):
        launch(
            upstream_ptr=upstream,
            scale_ptr=kept.scale,
            logits_ptr=logits,
            target_ptr=target,
            own_ptrs=own,
            other_ptrs=other,
            map_ptrs=kept.maps[:maps],
            grad_ptr=grad_logits,
            weights_ptr=kept.scale if weights is None else weights.numbers,
            **axes_of_walk(logits, target, walk),
        )
    return grad_logits

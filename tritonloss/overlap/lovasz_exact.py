"""The launchers of the exact Lovász losses: a sort of every class's errors, one after the other."""

from __future__ import annotations

import torch
import triton

from .._core.prepared_launch import PreparedLaunch, kind, prepared
from .._engine.pixel_grid import in_grains, over_pixels
from .._engine.pixel_terms import Loss
from .._engine.planes import ignored_class
from .lovasz_exact_kernels import _errors_kernel, _rank_increments_kernel
from .lovasz_terms import SOFTMAX, Counts, Options, Results, chosen

# Items of a program that makes increments of ranks.
_ITEMS = 1024


def launch_exact(
    loss: Loss,
    logits: torch.Tensor,
    target: torch.Tensor,
    results: Results,
    counts: Counts,
    options: Options,
) -> None:
    """Fill the results, of which only the softmax's statistics are there yet."""
    groups = results.scale.numel()
    items = target.numel() // groups
    key = results.scale.new_empty((groups, items))
    own = torch.empty_like(key, dtype=torch.int8)
    losses, totals = [], []
    for channel in range(logits.size(1)):
        _launch_errors(loss, (logits, target), results, (key, own), counts, options, channel)
        errors, order = key.sort(dim=-1, descending=True, stable=True)
        found = own.gather(-1, order).cumsum(-1, dtype=counts.of_groups.dtype)
        _launch_ranks((errors, order, found), results.table, logits, channel, options)
        losses.append(errors.sum(-1, dtype=torch.float64))
        totals.append(found[:, -1])
    _fill_means(torch.stack(losses, -1), torch.stack(totals, -1), results, counts, options)


def _launch_errors(
    loss: Loss,
    maps: tuple[torch.Tensor, torch.Tensor],
    results: Results,
    written: tuple[torch.Tensor, torch.Tensor],
    counts: Counts,
    options: Options,
    channel: int,
) -> None:
    """Write the errors of a class, and which pixels are of the class."""
    logits, target = maps
    key, own = written

    def prepare() -> PreparedLaunch:
        # As the softmax's statistics are tuned: a hinge has none, and nothing of its own to tune.
        programs, arguments = over_pixels([SOFTMAX], "forward", logits, target)
        del arguments["full"]
        tile = arguments["TILE"]
        labels = 2 if loss.binary else logits.size(1)
        constants = {
            "logits_strides": in_grains(logits, tile),
            "target_strides": in_grains(target, tile),
            "channel": channel,
            "IGNORED": ignored_class(options.ignore_index, labels, target.dtype),
            "PER_IMAGE": options.per_image,
            "HINGE": loss.binary,
            **arguments,
            # A class's logits are not side by side with other lanes' of one pixel.
            "TILE": tile._replace(lanes=1, flat=tile.flat and tile.lanes == 1),
        }
        return PreparedLaunch(_errors_kernel, (programs,), constants, tile.grain > 1)

    known = "lovasz_errors", loss.name, kind(logits), kind(target), options, channel
    prepared((*known, counts.of_groups.dtype), prepare)(
        logits_ptr=logits,
        target_ptr=target,
        largest_ptr=key if results.largest is None else results.largest,
        log_sum_ptr=key if results.log_sum is None else results.log_sum,
        key_ptr=key,
        own_ptr=own,
        counts_ptr=counts.of_groups,
    )


def _launch_ranks(
    sorted_errors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    weights: torch.Tensor | None,
    logits: torch.Tensor,
    channel: int,
    options: Options,
) -> None:
    """Multiply sorted errors by the increments of their ranks, and write those to their pixels."""
    errors, order, found = sorted_errors
    groups, items = errors.shape
    classes, pixels = logits.size(1), logits[0, 0].numel()

    def prepare() -> PreparedLaunch:
        tiles = triton.cdiv(items, _ITEMS)
        constants = {
            "items": items,
            "pixels": pixels,
            "classes": classes,
            "channel": channel,
            "tiles": tiles,
            "PER_IMAGE": options.per_image,
            "SAVE": weights is not None,
            "SIZE": _ITEMS,
            "num_warps": 4,
            "enable_fp_fusion": True,
        }
        return PreparedLaunch(_rank_increments_kernel, (groups * tiles,), constants)

    known = "lovasz_ranks", kind(errors), found.dtype, pixels, classes, channel, options
    prepared((*known, weights is None), prepare)(
        key_ptr=errors,
        order_ptr=order,
        found_ptr=found,
        weights_ptr=errors if weights is None else weights,
    )


def _fill_means(
    losses: torch.Tensor,
    totals: torch.Tensor,
    results: Results,
    counts: Counts,
    options: Options,
) -> None:
    """Fill in the mean over groups of the mean over classes; ``losses`` are [groups, C]."""
    if options.classes == "present":
        takes_part = totals > 0
    else:
        takes_part = torch.zeros_like(totals, dtype=torch.bool)
        for channel in chosen(options.classes) or range(totals.size(1)):
            takes_part[:, channel] = True
    number = takes_part.sum(-1).clamp(min=1).to(losses.dtype)
    of_groups = torch.where(takes_part, losses, 0).sum(-1) / number
    wrong = counts.of_groups.view(-1, 2)[:, 0]
    loss = torch.where(wrong > 0, torch.nan, of_groups).mean()
    results.loss.copy_(loss)
    results.scale.copy_(1 / (number * number.numel()))
    if results.table is not None and options.classes != "all":
        results.table.mul_(_of_images(takes_part, results.table))


def _of_images(takes_part: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Whether a class of a group takes part, as a factor of increments [N, C, ...]."""
    return takes_part.view(*takes_part.shape, *(1,) * (weights.dim() - 2)).to(weights.dtype)

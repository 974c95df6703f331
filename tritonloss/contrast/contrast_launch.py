"""The launchers of pixel contrast."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from .._core.backend import device_guard
from .._core.prepared_launch import PreparedLaunch, kind, prepared
from .._core.process_groups import add_over_ranks
from .._engine.planes import compute_dtype
from .._engine.sums import sums_over
from .contrast_kernels import (
    _classes_kernel,
    _gradient_kernel,
    _negatives_kernel,
    _positives_kernel,
    _slopes_kernel,
    _statistics_kernel,
)
from .selection_launch import launch_selection
from .tile_launch import Options, Pair, over_tiles, pair_of

# Slopes are at most 2. Times this, float16 holds them down to 4e-12.
_SCALE = 2.0**14


class Results(NamedTuple):
    """What the operator returns."""

    loss: torch.Tensor  # []
    share: torch.Tensor  # []: 1 over the number of anchors that count, or all ranks over it
    statistics: torch.Tensor  # [3, A]: see Side
    anchor_classes: torch.Tensor  # int32 [A]
    key_classes: torch.Tensor | None  # int32 [M], unless the keys are the anchors
    bounds: torch.Tensor | None  # [2, A]: lowest and highest score that counts, of the hardest


def allocate(
    anchors: torch.Tensor,
    anchor_labels: torch.Tensor,
    keys: torch.Tensor | None,
    key_labels: torch.Tensor | None,
    options: Options,
) -> Results:
    """The results, not filled."""
    dtype = compute_dtype(anchors.dtype if keys is None else keys.dtype)
    count = anchors.size(0)
    integers: dict[str, Any] = {"dtype": torch.int32, "device": anchors.device}
    return Results(
        loss=anchors.new_empty((), dtype=dtype),
        share=anchors.new_empty((), dtype=dtype),
        statistics=anchors.new_empty((3, count), dtype=dtype),
        anchor_classes=torch.empty(count, **integers),
        key_classes=None if key_labels is None else torch.empty(len(key_labels), **integers),
        bounds=None if options.hardest is None else anchors.new_empty((2, count), dtype=dtype),
    )


# --- forward --------------------------------------------------------------------------------------


def launch_forward(
    anchors: torch.Tensor,
    anchor_labels: torch.Tensor,
    keys: torch.Tensor | None,
    key_labels: torch.Tensor | None,
    options: Options,
) -> Results:
    """The loss, and what the backward pass needs."""
    results = allocate(anchors, anchor_labels, keys, key_labels, options)
    totals = torch.empty(2, dtype=torch.float64, device=anchors.device)
    pair = pair_of(anchors, keys, options)
    if len(pair.anchors) == 0 or len(pair.keys) == 0:
        _zero(results, totals)
    else:
        with device_guard(anchors):
            _launch_classes(anchor_labels, results.anchor_classes, options)
            if key_labels is not None and results.key_classes is not None:
                _launch_classes(key_labels, results.key_classes, options)
            _launch_passes(pair, results, totals, options)
    if options.group is not None:
        ranks = add_over_ranks(totals, options.group)
        value, count = totals.unbind()
        results.share.copy_(ranks / count.clamp(min=1))
        results.loss.copy_(value / count.clamp(min=1) * _ratio(options))
    return results


def _zero(results: Results, totals: torch.Tensor) -> None:
    """Fill the results where there is no anchor or no key."""
    totals.zero_()
    for result in results:
        if result is not None:
            result.zero_()


def _ratio(options: Options) -> float:
    return options.temperature / options.base_temperature


def _launch_classes(labels: torch.Tensor, classes: torch.Tensor, options: Options) -> None:
    """Write labels as classes."""

    def prepare() -> PreparedLaunch:
        ignored = options.ignore_index
        constants = {
            "count": labels.numel(),
            "stride": labels.stride(0),
            "ignored": 0 if ignored is None else int(ignored),
            "IGNORES": ignored is not None,
            "BLOCK": 1024,
            "num_warps": 4,
            "enable_fp_fusion": True,
        }
        programs = triton.cdiv(labels.numel(), 1024)
        return PreparedLaunch(_classes_kernel, (programs,), constants, aligned=False)

    launch = prepared(("contrast_classes", kind(labels), options.ignore_index), prepare)
    launch(labels_ptr=labels, classes_ptr=classes)


def _launch_passes(pair: Pair, results: Results, totals: torch.Tensor, options: Options) -> None:
    """Go over the negatives, and then over the positives."""
    of_negatives, of_positives = (over_tiles(w, pair, options) for w in ("negatives", "positives"))
    count, dtype = len(pair.anchors), results.statistics.dtype
    parts, splits = of_negatives["splits"], of_positives["splits"]
    negatives = pair.anchors.new_empty((2, parts, count), dtype=dtype)
    positives = pair.anchors.new_empty((3, splits, count), dtype=dtype)
    log_sum = pair.anchors.new_empty(count, dtype=dtype)
    tensors = _pointers(pair, results)
    if results.bounds is not None:
        launch_selection(pair, tensors, results.bounds, options)
    key = kind(pair.anchors), kind(pair.keys), pair.own, options

    def prepare_negatives() -> PreparedLaunch:
        programs = (of_negatives["tiles"] * parts,)
        return PreparedLaunch(_negatives_kernel, programs, of_negatives)

    def prepare_positives() -> PreparedLaunch:
        programs = (of_positives["tiles"] * splits,)
        return PreparedLaunch(_positives_kernel, programs, {**of_positives, "parts": parts})

    prepared(("contrast_negatives", *key), prepare_negatives)(**tensors, partial_ptr=negatives)
    prepared(("contrast_positives", *key), prepare_positives)(
        **tensors, negatives_ptr=negatives, log_sum_ptr=log_sum, partial_ptr=positives
    )
    block = 128
    sums = sums_over(triton.cdiv(count, block), 2, pair.anchors.device)

    def prepare_statistics() -> PreparedLaunch:
        constants = {
            "programs": sums["programs"],
            "anchors": count,
            "splits": splits,
            "ratio": _ratio(options),
            "BLOCK": block,
            "num_warps": 4,
            "enable_fp_fusion": True,
        }
        return PreparedLaunch(_statistics_kernel, (sums["programs"],), constants, aligned=True)

    prepared(("contrast_statistics", *key), prepare_statistics)(
        partial_ptr=positives,
        log_sum_ptr=log_sum,
        statistics_ptr=results.statistics,
        loss_ptr=results.loss,
        share_ptr=results.share,
        totals_ptr=totals,
        scratch_ptr=sums["scratch_ptr"],
        tickets_ptr=sums["tickets_ptr"],
    )


def _pointers(pair: Pair, results: Results) -> dict[str, Any]:
    """The tensors that all kernels over tiles take."""
    classes, bounds = results.anchor_classes, results.bounds
    return {
        "anchors_ptr": pair.anchors,
        "anchor_classes_ptr": classes,
        "keys_ptr": pair.keys,
        "key_classes_ptr": classes if results.key_classes is None else results.key_classes,
        "bounds_ptr": results.statistics if bounds is None else bounds,
    }


# --- backward -------------------------------------------------------------------------------------


def launch_backward(
    grad_loss: torch.Tensor,
    share: torch.Tensor,
    statistics: torch.Tensor,
    anchor_classes: torch.Tensor,
    key_classes: Any,
    bounds: Any,
    anchors: torch.Tensor,
    keys: Any,
    options: Options,
) -> torch.Tensor:
    """The anchors' gradient, also that of the keys where these are the anchors."""
    gradient = torch.empty(anchors.shape, dtype=anchors.dtype, device=anchors.device)
    pair = pair_of(anchors, keys, options)
    if gradient.numel() == 0 or len(pair.keys) == 0:
        return gradient.zero_()
    own = pair.own
    results = Results(
        grad_loss,
        share,
        statistics,
        anchor_classes,
        None if own else key_classes,
        None if options.hardest is None else bounds,
    )
    arguments = over_tiles("slopes", pair, options)
    splits, tile = arguments["splits"], arguments["TILE"]
    partial = anchors.new_empty((splits, *anchors.shape), dtype=statistics.dtype)
    key = kind(pair.anchors), kind(pair.keys), own, options

    def prepare_slopes() -> PreparedLaunch:
        programs = arguments["tiles"] * splits * triton.cdiv(tile.dims, tile.width)
        return PreparedLaunch(_slopes_kernel, (programs,), {**arguments, "SCALE": _SCALE})

    def prepare_gradient() -> PreparedLaunch:
        constants = {
            "elements": gradient.numel(),
            "splits": splits,
            "factor": 1.0 / (options.base_temperature * _SCALE),
            "BLOCK": 512,
            "num_warps": 4,
            "enable_fp_fusion": True,
        }
        programs = (triton.cdiv(gradient.numel(), 512),)
        return PreparedLaunch(_gradient_kernel, programs, constants, aligned=True)

    with device_guard(anchors):
        prepared(("contrast_slopes", *key), prepare_slopes)(
            **_pointers(pair, results), statistics_ptr=statistics, partial_ptr=partial
        )
        prepared(("contrast_gradient", *key, anchors.dtype), prepare_gradient)(
            partial_ptr=partial,
            upstream_ptr=grad_loss,
            share_ptr=share,
            gradient_ptr=gradient,
        )
    return gradient

"""The launchers of the Lovász losses."""

from __future__ import annotations

from typing import Any

import torch
import triton

from .._core.backend import device_guard, registers, warp_size
from .._core.configurations import Configuration, launch_configuration
from .._core.prepared_launch import PreparedLaunch, kind, prepared
from .._core.process_groups import add_over_ranks
from .._core.tuning_inputs import random_map
from .._engine.cell_grid import _divisor, _even
from .._engine.pixel_grid import _classes_in_lanes, _grain, _is_flat, in_grains, over_pixels
from .._engine.pixel_terms import Loss, Term, Walk, terms_of
from .._engine.pixel_tuning import pixel_candidates
from .._engine.pixels import Tile
from .._engine.planes import ignored_class
from .._engine.sums import sums_over
from .lovasz_cell_launch import (
    count_over_cells,
    interpolated,
    into_nodes,
    launch_backward_over_cells,
)
from .lovasz_exact import launch_exact
from .lovasz_gradient_kernels import _hinge_gradient_kernel, _softmax_gradient_kernel
from .lovasz_hinge_kernels import _hinge_histogram_kernel
from .lovasz_kernels import (
    _increments_kernel,
    _softmax_histogram_kernel,
    _softmax_statistics_kernel,
)
from .lovasz_terms import (
    FEW_BINS,
    SOFTMAX,
    Counts,
    Options,
    Results,
    bins_of,
    chosen,
    filled_by_kernels,
    is_interpolated,
    is_quick,
    kept,
    zero_counts,
)

# Programs of a histogram, if they have 8 warps, that a large GPU has work for, and the most tiles
# that one goes through.
_PROGRAMS = 1056
_MOST_ROUNDS = 16
# Bins of a class that a lane makes increments of, unless that took more than 16 warps.
_BINS_OF_LANE = 4
# Classes of a lane whose probabilities and increments stay in registers, going back.
_HELD = 32


def launch_forward(
    loss: Loss, logits: torch.Tensor, target: torch.Tensor, options: Options, save: bool
) -> Results:
    """The loss, and what the backward pass needs if ``save``."""
    results = filled_by_kernels(loss, logits, target, options, save)
    is_of_one_batch = options.group is not None and not options.per_image
    if target.numel() == 0 and not is_of_one_batch:
        for result in results:
            if result is not None:
                result.zero_()
        _over_ranks(results, options)
        return kept(results, save)
    counts = zero_counts(loss, logits, target, options)
    with device_guard(logits):
        if options.exact:
            _launch_exact(loss, logits, target, results, counts, options)
        else:
            if target.numel() > 0:
                _launch_counts(loss, logits, target, results, counts, options)
            ranks = 1
            if options.group is not None and not options.per_image:
                ranks = add_over_ranks(counts.both, options.group)
            _launch_increments(loss, logits, results, counts, options)
            if ranks > 1:
                results.scale.mul_(ranks)
        if options.per_image:
            _over_ranks(results, options)
            if is_interpolated(logits, target, options) and not options.exact:
                _scale_table(results)
    return kept(results, save)


def _launch_counts(
    loss: Loss,
    logits: torch.Tensor,
    target: torch.Tensor,
    results: Results,
    counts: Counts,
    options: Options,
) -> None:
    """Write the statistics of a softmax, and count the errors in every bin of every class."""
    if is_interpolated(logits, target, options):
        count_over_cells(loss, logits, target, results, counts, options)
        return
    if not loss.binary:
        _launch_statistics(logits, target, results, counts, options)
    _launch_histogram(loss, logits, target, results, counts, options)


def _launch_exact(
    loss: Loss,
    logits: torch.Tensor,
    target: torch.Tensor,
    results: Results,
    counts: Counts,
    options: Options,
) -> None:
    """Fill the results by a sort of every class."""
    if is_interpolated(logits, target, options):
        logits = interpolated(logits, target, options)
    if not loss.binary:
        _launch_statistics(logits, target, results, counts, options)
    launch_exact(loss, logits, target, results, counts, options)


def _over_ranks(results: Results, options: Options) -> None:
    """Make the mean over images one over those of all ranks of a group."""
    if options.group is None:
        return
    images = results.scale.numel()
    totals = results.loss.new_zeros(2, dtype=torch.float64)
    totals[0] = results.loss * images
    totals[1] = images
    ranks = add_over_ranks(totals, options.group)
    total, number = totals.unbind()
    number = number.clamp(min=1)
    results.loss.copy_(total / number)
    results.scale.mul_(ranks * images / number)


def _scale_table(results: Results) -> None:
    """Multiply each image's increments by its factor, which is 1 then: going back there is one."""
    assert results.table is not None
    results.table.mul_(results.scale.view(-1, 1, 1, 1))
    results.scale.fill_(1.0)


# --- statistics -----------------------------------------------------------------------------------


def _launch_statistics(
    logits: torch.Tensor, target: torch.Tensor, results: Results, counts: Counts, options: Options
) -> None:
    """Write the largest logit of every pixel, and the logarithm of the sum."""

    def prepare() -> PreparedLaunch:
        programs, arguments = over_pixels([SOFTMAX], "forward", logits, target, few=True)
        tile = arguments["TILE"]
        constants = {
            "logits_strides": in_grains(logits, tile),
            "target_strides": in_grains(target, tile),
            "TERMS": terms_of((Term(SOFTMAX, ()),), logits, Walk(None, "sum"), save=False),
            "IGNORED": ignored_class(options.ignore_index, logits.size(1), target.dtype),
            "PER_IMAGE": options.per_image,
            "BINS": None if options.exact else bins_of(SOFTMAX, options),
            **arguments,
            **registers(),
        }
        return PreparedLaunch(_softmax_statistics_kernel, (programs,), constants, tile.grain > 1)

    key = "lovasz_statistics", kind(logits), kind(target), options, counts.of_groups.dtype
    tensors: dict[str, Any] = {
        "logits_ptr": logits,
        "target_ptr": target,
        "largest_ptr": results.largest,
        "log_sum_ptr": results.log_sum,
        "histogram_ptr": counts.histogram,
        "counts_ptr": counts.of_groups,
    }
    prepared(key, prepare)(**tensors)


# --- histograms -----------------------------------------------------------------------------------


def histogram_heuristic(loss: Loss) -> Configuration:
    """A configuration that is always valid: several pixels per lane, of a few classes at a time.

    Where a histogram takes registers for its bins there is one class, and no spill. That of a hinge
    has twice the bins, which more warps share.
    """
    warps, pixels, classes = 8, 8, 2
    if not is_quick():
        pixels, classes = 16, 1
    elif loss.binary:
        warps, classes = 16, 1
    return {"PIXELS": pixels * warps * warp_size(), "CLASSES": classes, "num_warps": warps}


def _over_tiles(
    loss: Loss, logits: torch.Tensor, target: torch.Tensor, bins: int
) -> tuple[int, dict[str, Any]]:
    """(programs, arguments) of a histogram, whose programs go through several tiles each."""
    images, classes = logits.shape[:2]
    side_by_side, even = (_is_flat(in_lanes, logits, target) for in_lanes in (False, True))
    in_lanes = _classes_in_lanes(logits)
    configuration = launch_configuration(
        f"{loss.name}_histogram",
        device=logits.device,
        dtype=logits.dtype,
        classes=classes,
        window=1,
        layout="channels_last" if in_lanes else "contiguous" if side_by_side else "strided",
        heuristic=histogram_heuristic(loss),
    )
    pixels, warps = int(configuration["PIXELS"]), int(configuration["num_warps"])
    if not side_by_side and logits.stride(3) * pixels >= 2**31:
        even = False  # a tile's pixels are counted in 32 bits
    per_lane = max(pixels // (warps * warp_size()), 1)
    grain = _grain(per_lane, logits, target) if side_by_side else 1
    # Without whole aligned grains every pixel has an address, which takes registers: then there are
    # fewer pixels, where a histogram takes many as well, and of pixels that lie apart one class.
    # (Grains of 2 would be one more kernel to compile.)
    grain = grain if grain == 4 else 1
    apart = even and not side_by_side
    at_once = _even(classes, 1 if apart else int(configuration["CLASSES"]))
    fewer = 2 if grain == 1 and not is_quick() else 1
    if not is_quick() and bins > FEW_BINS:
        fewer *= 4
    pixels = max(pixels // fewer, warps * warp_size())
    size = logits.size(2) * logits.size(3)
    tiles, class_groups = triton.cdiv(size, pixels), triton.cdiv(classes, at_once)
    work = images * tiles * class_groups * warps // 8
    rounds = min(max(work // _PROGRAMS, 1), _MOST_ROUNDS, tiles)
    chunks = triton.cdiv(tiles, rounds)
    flat, double = side_by_side or even, logits.dtype == torch.float64
    tile = Tile(pixels, 1, at_once, grain, flat, classes, double, bundle=1, slots=1)
    return images * chunks * class_groups, {
        "logits_strides": in_grains(logits, tile),
        "pixels": size // grain,
        "width": _divisor(logits.size(3)),
        "chunks": chunks,
        "rounds": rounds,
        "APART": apart,
        "FAR": _is_far(logits) or _is_far(target),
        "TILE": tile,
        "num_warps": warps,
        "enable_fp_fusion": True,
    }


def _is_far(tensor: torch.Tensor) -> bool:
    """Whether 32 bits are not enough for where an image's pixels are."""
    height, width = tensor.shape[-2:]
    reach = height * tensor.stride(-2) + width * tensor.stride(-1)
    return max(height * width, reach) >= 2**30


def _launch_histogram(
    loss: Loss,
    logits: torch.Tensor,
    target: torch.Tensor,
    results: Results,
    counts: Counts,
    options: Options,
) -> None:
    """Count the errors in every bin of every class."""

    def prepare() -> PreparedLaunch:
        bins = bins_of(loss, options)
        programs, arguments = _over_tiles(loss, logits, target, bins.count)
        arguments |= {"PER_IMAGE": options.per_image, "BINS": bins}
        if loss.binary:
            kernel: Any = _hinge_histogram_kernel
            arguments["target_strides"] = in_grains(target, arguments["TILE"])
            arguments["IGNORED"] = ignored_class(options.ignore_index, 2, target.dtype)
            arguments["ALIGNED"] = target.stride()[1:] == (target.size(2), 1)
        else:
            kernel = _softmax_histogram_kernel
        return PreparedLaunch(kernel, (programs,), arguments, arguments["TILE"].grain > 1)

    key = "lovasz_histogram", loss.name, kind(logits), kind(target), options, counts[0].dtype
    tensors: dict[str, Any] = {
        "logits_ptr": logits,
        "histogram_ptr": counts.histogram,
    }
    if loss.binary:
        tensors["target_ptr"] = target
    else:
        tensors |= {"largest_ptr": results.largest, "log_sum_ptr": results.log_sum}
    prepared(key, prepare)(**tensors)


def _launch_increments(
    loss: Loss, logits: torch.Tensor, results: Results, counts: Counts, options: Options
) -> None:
    """Make the loss and the table of increments of the histograms."""
    groups, classes = results.scale.numel(), logits.size(1)
    programs = groups * classes

    def prepare() -> PreparedLaunch:
        constants = {
            "groups": groups,
            "classes": classes,
            "programs": programs,
            "CLASSES": triton.next_power_of_2(classes),
            "PRESENT": options.classes == "present",
            "CHOSEN": chosen(options.classes),
            "BINS": bins_of(loss, options),
            "num_warps": min(max(bins_of(loss, options).count // (_BINS_OF_LANE * 32), 1), 16),
            "enable_fp_fusion": True,
        }
        return PreparedLaunch(_increments_kernel, (programs,), constants, aligned=True)

    dtypes = logits.dtype, counts[0].dtype
    key = "lovasz_increments", loss.name, classes, groups, options, dtypes, logits.device
    sums = sums_over(programs, 1, logits.device)
    tensors: dict[str, Any] = {
        "histogram_ptr": counts.histogram,
        "counts_ptr": counts.of_groups,
        "table_ptr": results.table,
        "class_loss_ptr": results.scale.new_empty((2, groups, classes)),
        "loss_ptr": results.loss,
        "scale_ptr": results.scale,
        "scratch_ptr": sums["scratch_ptr"],
        "tickets_ptr": sums["tickets_ptr"],
    }
    prepared(key, prepare)(**tensors)


# --- backward -------------------------------------------------------------------------------------


def gradient_heuristic(loss: Loss, logits: torch.Tensor) -> Configuration:
    """A configuration that is always valid; up to 32 classes of a lane stay in registers."""
    warps, classes = 4, logits.size(1)
    lanes, pixels = 1, 4
    if _classes_in_lanes(logits):
        lanes = 8 if classes > 32 else min(4, triton.next_power_of_2(classes))
    slots = triton.cdiv(classes, lanes)
    if not loss.binary:
        pixels = 4 if slots <= 8 else 2 if slots <= 20 or slots > _HELD else 1
    return {
        "PIXELS": pixels * warps * warp_size() // lanes,
        "CLASS_LANES": lanes,
        "UNROLL": slots if slots <= _HELD else 4,
        "num_warps": warps,
    }


def launch_backward(
    loss: Loss,
    grad_loss: torch.Tensor,
    results: Results,
    logits: torch.Tensor,
    target: torch.Tensor,
    options: Options,
) -> torch.Tensor:
    """The gradient of the logits."""
    if target.numel() == 0:
        return torch.zeros_like(logits)
    with device_guard(logits):
        if not is_interpolated(logits, target, options):
            grad_logits = torch.empty_like(logits)
            _launch_gradient(loss, grad_loss, results, logits, target, grad_logits, options)
        elif options.exact:
            # Every logit is read before its gradient is written in its place.
            at_labels = interpolated(logits, target, options)
            _launch_gradient(loss, grad_loss, results, at_labels, target, at_labels, options)
            grad_logits = into_nodes(at_labels, logits, target, options)
        else:
            grad_logits = launch_backward_over_cells(
                loss, grad_loss, results, logits, target, options
            )
    return grad_logits


def _launch_gradient(
    loss: Loss,
    grad_loss: torch.Tensor,
    results: Results,
    logits: torch.Tensor,
    target: torch.Tensor,
    grad_logits: torch.Tensor,
    options: Options,
) -> None:
    """Write the gradient of logits at the labels' resolution."""

    def prepare() -> PreparedLaunch:
        heuristic = gradient_heuristic(loss, logits)
        programs, arguments = over_pixels(
            [loss], "backward", logits, target, grad_logits, heuristic=heuristic
        )
        tile = arguments["TILE"]
        labels = 2 if loss.binary else logits.size(1)
        constants = {
            "logits_strides": in_grains(logits, tile),
            "target_strides": in_grains(target, tile),
            "grad_strides": in_grains(grad_logits, tile),
            "IGNORED": ignored_class(options.ignore_index, labels, target.dtype),
            "PER_IMAGE": options.per_image,
            "BINS": None if options.exact else bins_of(loss, options),
            **arguments,
        }
        kernel: Any = _softmax_gradient_kernel
        if loss.binary:
            kernel = _hinge_gradient_kernel
            del constants["full"]
        return PreparedLaunch(kernel, (programs,), constants, tile.grain > 1)

    key = "lovasz_gradient", loss.name, kind(logits), kind(target), options
    tensors: dict[str, Any] = {
        "upstream_ptr": grad_loss,
        "scale_ptr": results.scale,
        "logits_ptr": logits,
        "target_ptr": target,
        "table_ptr": results.table,
        "grad_ptr": grad_logits,
    }
    if not loss.binary:
        tensors |= {"largest_ptr": results.largest, "log_sum_ptr": results.log_sum}
    prepared(key, prepare)(**tensors)


# --- tuning ---------------------------------------------------------------------------------------


def neighbours(
    loss: Loss, direction: str, dtype: torch.dtype, classes: int, layout: str
) -> list[Configuration]:
    """The heuristic and its neighbours, one setting changed at a time: what the tuner tries."""
    if direction == "forward":
        return pixel_candidates(loss, direction, dtype, classes, layout)
    like = random_map((1, classes, 2, 32), layout, dtype, torch.device("meta"))
    heuristic = histogram_heuristic(loss)
    changes: list[Configuration]
    if direction == "backward":
        heuristic = gradient_heuristic(loss, like)
        unroll = int(heuristic["UNROLL"])
        changes = [{"UNROLL": max(unroll // 2, 1)}, {"UNROLL": min(2 * unroll, _HELD)}]
    else:
        at_once = int(heuristic["CLASSES"])
        changes = [{"CLASSES": max(at_once // 2, 1)}, {"CLASSES": at_once * 2}]
    pixels, warps = int(heuristic["PIXELS"]), int(heuristic["num_warps"])
    changes += [{"PIXELS": pixels // 2}, {"PIXELS": pixels * 2}]
    changes += [{"PIXELS": pixels // 2, "num_warps": warps // 2}]
    candidates = [heuristic, *({**heuristic, **change} for change in changes)]
    return [c for i, c in enumerate(candidates) if c not in candidates[:i]]

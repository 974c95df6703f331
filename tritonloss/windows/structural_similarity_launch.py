"""Launchers of the structural similarity loss: forward, and backward in two schedules."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy
import torch

from kernels_reference.gaussian_window import gaussian_window
from kernels_reference.structural_similarity import largest_difference

from .._core.backend import device_guard
from .._core.configurations import Configuration
from .._core.prepared_launch import PreparedLaunch, kind, prepared
from .._core.process_groups import add_over_ranks
from .._engine.planes import compute_dtype
from .._engine.strip_launch import (
    channels_in_lanes,
    grain_of,
    ignored_class,
    label_strides,
    strides,
    strip_configuration,
    strip_heuristic,
    strip_launch,
)
from .._engine.strip_windows import window_of
from .._engine.sums import sums_over
from .structural_difference import Sampling
from .structural_labels import empty_found, look_at_labels
from .structural_similarity_kernels import (
    _structural_similarity_backward_kernel,
    _structural_similarity_forward_kernel,
    _structural_similarity_stored_kernel,
)


class Options(NamedTuple):
    """The options of the loss, as they pass through the operator."""

    window_size: int = 3
    sigma: float = 1.5
    beta: float = 0.1
    stability: float = 0.01
    bce_weight: float = 0.5
    padding: str = "zeros"
    hard_mining: bool = True
    reweight: bool = True
    ignore_index: int | None = 255
    store: bool = False  # whether the forward pass leaves e f to the backward pass
    group: str | None = None  # the name of a process group


class Results(NamedTuple):
    """What a forward pass returns."""

    loss: torch.Tensor  # []
    statistics: torch.Tensor  # [2]: bce_weight / V, (1 - bce_weight) / M
    stored: torch.Tensor  # e f [N, C, H, W], or [0] unless the options say "store"
    found: torch.Tensor  # which classes occur where, see structural_labels.py


@functools.lru_cache(maxsize=256)
def _label_weights(
    window_size: int, sigma: float, dtype: torch.dtype, columns: int
) -> tuple[tuple[float, ...], str]:
    """(weights, complement): 1-D weights for label maps, and how 1 - mean_y is found with them.

    1 - mean_y must be 0 on flat maps, and precise when only a far corner differs. The weights are
    rounded to multiples of half the dtype's epsilon that sum to 1. All weighted sums along a row
    are then exact, and an all-ones window has the mean 1 to the bit. So 1 - mean_y is a plain
    difference ("window") as long as the corner weighs enough, and otherwise a difference per row
    ("row"). The rounding would spoil weights below 5e-4: there 1 - y is filtered on its own
    ("filtered"). So it is for one column per lane, whose weights are computed in the kernel.
    """
    weights = gaussian_window(window_size, sigma)
    if weights[0] < 5e-4 or columns == 1:
        return weights, "filtered"
    units = 2**53 if dtype == torch.float64 else 2**24
    counts = [round(weight * units) for weight in weights]
    counts[window_size // 2] += units - sum(counts)
    rounded = tuple(count / units for count in counts)
    return rounded, "window" if weights[0] ** 2 >= 5e-4 else "row"


def _window_arguments(
    options: Options, logits: torch.Tensor, target: torch.Tensor, columns: int
) -> dict[str, Any]:
    """The kernels' arguments that describe the window and the sampling."""
    dtype = compute_dtype(logits.dtype)
    size, sigma, padding = options.window_size, options.sigma, options.padding
    label_weights, complement = _label_weights(size, sigma, dtype, columns)
    threshold = options.beta * largest_difference(size, sigma, options.stability)
    sampling = Sampling(
        label_weights=label_weights,
        complement=complement,
        stability=options.stability,
        ignored=ignored_class(options.ignore_index, logits.size(1), target.dtype),
        threshold=threshold if options.hard_mining else -1.0,
        reweight=options.reweight,
        # Pixels are loaded again where a row's columns are mirrored, since those are other pixels,
        # and where they would take too many registers, as four columns of three rows do.
        delayed=columns > 1 and columns * (size // 2) < 12 and padding in ("zeros", "valid"),
    )
    return {
        "window": size,
        "WINDOW": window_of(size, sigma, padding),
        "SAMPLING": sampling,
    }


def heuristic_of(operator: str, window_size: int) -> Configuration:
    """A configuration that is always valid, for windows of this size."""
    columns = 4 if 3 <= window_size <= 7 else 2 if window_size <= 11 else 1
    configuration = strip_heuristic(columns, ROWS=64 if window_size <= 5 else 128)
    if operator == "structural_similarity_forward":
        configuration["schedule"] = "recompute" if window_size <= 5 else "stored"
    return configuration


def _configuration(operator: str, logits: torch.Tensor, window_size: int) -> Configuration:
    return strip_configuration(operator, logits, window_size, heuristic_of(operator, window_size))


def stores_differences(logits: torch.Tensor, window_size: int) -> bool:
    """Whether such logits have the schedule "stored", in which the forward pass leaves e f."""
    # Kept in 16 bits, e would be rounded before it weights the gradient: it is recomputed instead.
    if logits.element_size() < 4:
        return False

    def prepare() -> str:
        configuration = _configuration("structural_similarity_forward", logits, window_size)
        return str(configuration["schedule"])

    return prepared((_SCHEDULE, kind(logits), window_size), prepare) == "stored"


def empty_results(logits: torch.Tensor, target: torch.Tensor, options: Options) -> Results:
    """The tensors that a forward pass fills."""
    dtype = compute_dtype(logits.dtype)
    loss = torch.empty((), dtype=dtype, device=logits.device)
    statistics = torch.empty(2, dtype=dtype, device=logits.device)
    stored = torch.empty_like(logits) if options.store else logits.new_empty(0)
    return Results(loss, statistics, stored, empty_found(logits))


# Names of the launches below, in the keys under which they are kept. The keys hold what a launch
# depends on, except tensors that are allocated like one in the key.
_SCHEDULE, _FORWARD, _BACKWARD, _STORED = (f"structural_similarity {i}" for i in range(4))


class _ForwardPlan(NamedTuple):
    """The launch of a forward pass, for logits and labels of one kind."""

    launch: PreparedLaunch
    programs: int


def forward_pass(logits: torch.Tensor, target: torch.Tensor, options: Options) -> Results:
    """The loss, and what the backward pass needs: Results."""
    results = empty_results(logits, target, options)
    plan = prepared(
        (_FORWARD, kind(logits), kind(target), options),
        lambda: _forward_plan(logits, target, results.stored, options),
    )
    if plan.programs == 0:
        results.loss.zero_()
        results.statistics.zero_()
        if options.group is not None:
            totals = torch.zeros(4, dtype=torch.float64, device=logits.device)
            _add_other_ranks(totals, options, results)
        return results
    radius, ignore_index = options.window_size // 2, options.ignore_index
    with device_guard(logits):
        valid = look_at_labels(target, results.found, logits.size(1), radius, ignore_index)
        sums = sums_over(plan.programs, 3, logits.device)
        plan.launch(
            logits_ptr=logits,
            target_ptr=target,
            loss_ptr=results.loss,
            statistics_ptr=results.statistics,
            stored_ptr=results.stored,
            found_ptr=results.found,
            valid_ptr=valid,
            scratch_ptr=sums["scratch_ptr"],
            tickets_ptr=sums["tickets_ptr"],
        )
        if options.group is not None:
            totals = torch.cat((sums["scratch_ptr"][:3], valid.view(1)))
            _add_other_ranks(totals, options, results)
    return results


def _add_other_ranks(totals: torch.Tensor, options: Options, results: Results) -> None:
    """Make the loss and the statistics those of all ranks' pixels.

    ``totals`` are this rank's sums of bce, of e f bce and of f, and its valid pixels.
    """
    assert options.group is not None
    ranks = add_over_ranks(totals, options.group)
    entropy, weighted, hard, valid = totals.unbind()
    entropy_scale = options.bce_weight / valid.clamp(min=1.0)
    weighted_scale = (1.0 - options.bce_weight) / hard.clamp(min=1.0)
    results.loss.copy_(entropy_scale * entropy + weighted_scale * weighted)
    results.statistics.copy_(ranks * torch.stack((entropy_scale, weighted_scale)))


def _forward_plan(
    logits: torch.Tensor, target: torch.Tensor, stored: torch.Tensor, options: Options
) -> _ForwardPlan:
    moved = (logits, target, stored) if options.store else (logits, target)
    configuration = _configuration("structural_similarity_forward", logits, options.window_size)
    grid, launch = strip_launch(logits.shape, configuration, options.padding, *moved)
    strip = launch["STRIP"]
    bce_weight, rest = _halves(options.bce_weight)
    arguments = {
        "logits_strides": strides(logits, strip),
        "target_strides": label_strides(target, strip),
        "stored_strides": strides(stored if options.store else logits, strip),
        "height": logits.size(2),
        "width": logits.size(3),
        "programs": grid[0],
        "bce_weight": bce_weight,
        "bce_weight_rest": rest,
        "STORED": options.store,
        **_window_arguments(options, logits, target, strip.columns),
        **launch,
    }
    launch_forward = PreparedLaunch(
        _structural_similarity_forward_kernel, grid, arguments, launch["STRIP"].grain > 1
    )
    return _ForwardPlan(launch_forward, grid[0])


def _halves(number: float) -> tuple[float, float]:
    """Two float32 numbers whose sum is ``number``: kernels take floats as float32."""
    high = float(numpy.float32(number))
    return high, float(numpy.float32(number - high))


def backward_pass(
    grad_loss: torch.Tensor,
    statistics: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    found: torch.Tensor,
    options: Options,
) -> torch.Tensor:
    """The gradient of the logits, with e recomputed."""
    grad_logits = torch.empty_like(logits)
    launch = prepared(
        (_BACKWARD, kind(logits), kind(target), options),
        lambda: _backward_plan(logits, target, grad_logits, options),
    )
    with device_guard(logits):
        launch(
            grad_loss_ptr=grad_loss,
            statistics_ptr=statistics,
            logits_ptr=logits,
            target_ptr=target,
            found_ptr=found,
            grad_logits_ptr=grad_logits,
        )
    return grad_logits


def _backward_plan(
    logits: torch.Tensor, target: torch.Tensor, grad_logits: torch.Tensor, options: Options
) -> PreparedLaunch:
    configuration = _configuration("structural_similarity_backward", logits, options.window_size)
    if not options.reweight:
        configuration["UNROLL"] = 1  # two rows at a time would spill 8 bytes on sm_80
    grid, launch = strip_launch(
        logits.shape, configuration, options.padding, logits, target, grad_logits
    )
    strip = launch["STRIP"]
    arguments = {
        "logits_strides": strides(logits, strip),
        "target_strides": label_strides(target, strip),
        "grad_logits_strides": strides(grad_logits, strip),
        "height": logits.size(2),
        "width": logits.size(3),
        **_window_arguments(options, logits, target, strip.columns),
        **launch,
    }
    return PreparedLaunch(
        _structural_similarity_backward_kernel, grid, arguments, launch["STRIP"].grain > 1
    )


def stored_pass(
    grad_loss: torch.Tensor,
    statistics: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    stored: torch.Tensor,
    ignore_index: int | None,
) -> None:
    """Turn the stored e f into the gradient, in place."""
    launch = prepared(
        (_STORED, kind(logits), kind(target), kind(stored), ignore_index),
        lambda: _stored_plan(logits, target, stored, ignore_index),
    )
    with device_guard(logits):
        launch(
            grad_loss_ptr=grad_loss,
            statistics_ptr=statistics,
            logits_ptr=logits,
            target_ptr=target,
            stored_ptr=stored,
        )


def _stored_plan(
    logits: torch.Tensor, target: torch.Tensor, stored: torch.Tensor, ignore_index: int | None
) -> PreparedLaunch:
    configuration = strip_configuration(
        "structural_similarity_stored", logits, 1, strip_heuristic(4)
    )
    moved = (logits, target, stored)
    if grain_of(int(configuration["COLUMNS"]), *moved) == 1 and not channels_in_lanes(logits):
        configuration["COLUMNS"] = 1  # so that neighbouring lanes have neighbouring pixels
    grid, launch = strip_launch(logits.shape, configuration, "zeros", *moved)
    arguments = {
        "logits_strides": strides(logits, launch["STRIP"]),
        "target_strides": label_strides(target, launch["STRIP"]),
        "stored_strides": strides(stored, launch["STRIP"]),
        "height": logits.size(2),
        "width": logits.size(3),
        "IGNORED": ignored_class(ignore_index, logits.size(1), target.dtype),
        **launch,
    }
    return PreparedLaunch(
        _structural_similarity_stored_kernel, grid, arguments, launch["STRIP"].grain > 1
    )

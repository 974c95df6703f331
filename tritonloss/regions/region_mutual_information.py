"""Region mutual information (RMI): the labels of a region given its predictions.

Zhao et al., "Region Mutual Information Loss for Semantic Segmentation". A region of R x R pixels is
a point with d = R^2 coordinates. Over all regions of an image, class by class, with Y the labels
and P the predicted probabilities, both centred,

    M = S_Y - S_YP (S_P + eps I)^-1 S_PY + eps I                       Eq. 12
    RMI = mean over images, sum over classes, of log det M / (2 d)     Eq. 16
    loss = bce_weight BCE + (1 - bce_weight) RMI                       Eq. 15

Bytes per pass, with L of logits, T of labels and pooling cells of s x s pixels. Forward: a pooling
pass reads L + T and writes two maps of L / s^2; lag sums read them, and a matrix per (image, class)
is eliminated. Backward: the maps are correlated with the weights found, and the result is spread
over the pixels, 2 L + T. Without pooling the moments and the gradient are formed from logits and
labels, and no map with classes is stored but the gradient.
"""

from __future__ import annotations

import functools
import math
from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
from torch.distributed import ProcessGroup

from kernels_reference.region_mutual_information import pooled_size
from kernels_reference.region_mutual_information import rmi_loss as rmi_loss_reference

from .._core import checks
from .._core.backend import serves_triton
from .._core.configurations import Configuration, Launch, Shape, TuningCase
from .._core.example import Example
from .._core.loss_module import LossModule
from .._core.operator import Operator
from .._core.process_groups import check_process_group, name_of, ranks_agree
from .._core.tuning_inputs import random_labels, random_map
from .._engine.planes import compute_dtype
from .backward import backward_pass
from .forward import add_other_ranks, forward_pass
from .plan import (
    Options,
    Saved,
    cells_and_warps,
    is_small,
    kernels_of_large_images,
    plan_of,
)

__all__ = ["RMILoss", "rmi_loss", "tuning_cases"]

POOLINGS = ("avg", "max", "nearest")
MOMENTS = ("mean", "sum")
IGNORES = ("zero", "drop")
PRECISIONS = ("float64", "float32")
_EPSILON = {"mean": 1e-6, "sum": 5e-4}
_LARGEST_REGION = 5
_LARGEST_POOL = 8

# --- operator -------------------------------------------------------------------------------------


class Results(NamedTuple):
    """What a forward pass returns: loss [], info int32 [N, C], and the tensors of ``Saved``."""

    loss: torch.Tensor
    info: torch.Tensor
    statistics: torch.Tensor
    residual: torch.Tensor
    labels: torch.Tensor
    kept: torch.Tensor
    weights: torch.Tensor


def _forward(logits: torch.Tensor, target: torch.Tensor, options: Options) -> Results:
    if logits.size(0) == 0:
        results = _empty_results(logits, target, options)
        totals = logits.new_zeros(4, dtype=torch.float64)
        add_other_ranks(totals, options, results.loss, results.statistics)
        return results
    loss, info, saved = forward_pass(options, logits, target)
    return Results(loss, info, *saved)


def _backward(
    grad_loss: torch.Tensor,
    statistics: torch.Tensor,
    residual: torch.Tensor,
    labels: torch.Tensor,
    kept: torch.Tensor,
    weights: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    options: Options,
) -> torch.Tensor:
    if logits.size(0) == 0:
        return torch.empty_like(logits)
    saved = Saved(statistics, residual, labels, kept, weights)
    return backward_pass(options, grad_loss, logits, target, saved)


def _empty_results(logits: torch.Tensor, target: torch.Tensor, options: Options) -> Results:
    """Tensors of the shapes and dtypes that a forward pass returns."""
    plan = plan_of(options, logits, target)
    map_shape = plan.map_shape if plan.has_maps else (0,)
    return Results(
        loss=logits.new_empty((), dtype=compute_dtype(logits.dtype)),
        info=logits.new_empty((plan.images, plan.classes), dtype=torch.int32),
        statistics=logits.new_empty(1, dtype=torch.float64),
        residual=logits.new_empty(map_shape, dtype=plan.arithmetic),
        labels=logits.new_empty(map_shape, dtype=torch.float16),
        kept=logits.new_empty(plan.kept_shape, dtype=torch.uint8),
        weights=logits.new_empty(plan.weights_shape, dtype=torch.float64),
    )


RMI = Operator(
    "rmi",
    forward=_forward,
    backward=_backward,
    allocate=_empty_results,
    results=Results,
    options=Options,
    returned=2,
)


# --- function -------------------------------------------------------------------------------------


def rmi_loss(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    region_size: int = 3,
    pooling: str | None = "avg",
    pool_size: int = 4,
    moments: str = "mean",
    epsilon: float | None = None,
    bce_weight: float = 0.5,
    ignore: str = "zero",
    ignore_index: int | None = checks.IGNORE_INDEX,
    precision: str | None = None,
    bce_smooth: float = 0.0,
    return_info: bool = False,
    process_group: ProcessGroup | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Region mutual information loss: how uncertain regions of labels stay, given the predictions.

    With d = region_size^2, P and Y the probabilities sigmoid(logits) and the one-hot labels in all
    regions of the pooled maps, S their second moments:

        M = S_Y - S_YP (S_P + epsilon I)^-1 S_PY + epsilon I            per image and class
        RMI = mean over images, sum over classes, of log det M / (2 d)
        loss = bce_weight BCE + (1 - bce_weight) RMI

    BCE is summed over classes and averaged over valid pixels. With one class Y is (target == 1).
    Values are often negative, or large with moments="sum", which adds log n / 2 per class for n
    regions.

    Under an ignored pixel a logit that is not finite changes nothing. Elsewhere NaN makes the
    loss NaN, and the gradient of its class in its image (with "max" at the pixels that the
    maxima come from); an infinite logit is a probability of 0 or 1, and makes the loss infinite
    where that is wrong.

    Args:
        logits: [N, C, H, W] with C >= 1, float16, bfloat16 or float32 (or float64), any strides.
        target: integer labels [N, H, W], uint8 to int64: 0 to C - 1, or 0 and 1 if C is 1.
        region_size: side of a region in pooled pixels, 1 to 5. Default 3.
        pooling: "avg" (default) or "max", both with a margin of pool_size // 2 pixels, which are
            zeros that count for "avg" and are left out for "max"; "nearest" takes labels from the
            nearest pixel and interpolates probabilities linearly, corners on corners; None does
            not pool.
        pool_size: side and step of the pooling, 1 (none) to 8. Default 4.
        moments: "mean" (default, the paper) divides by the number of regions; "sum" (the released
            code) does not.
        epsilon: what is added to the diagonals, > 0. Default 1e-6 for "mean", 5e-4 for "sum".
        bce_weight: share of the cross entropy, in [0, 1]. Default 0.5.
        ignore: "zero" (default) counts invalid pixels as perfectly predicted background; "drop"
            leaves out the regions that touch one, at many times the price: it forms every product
            of every region.
        ignore_index: label of pixels that are invalid, any integer or None. Default 255, which has
            to be given where there are more than 255 classes and it is one of them. Other labels
            out of range raise on the CPU; on a GPU, where looking would synchronise, they count as
            ignored unless TRITONLOSS_CHECK_LABELS=1 is set.
        precision: "float64" or "float32" for the sums of products, or None (default): float32 on
            GPUs that are slow in float64, else float64. ignore="drop", maps of less than
            2 region_size - 1 rows or columns (without pooling of up to three columns more), and
            images of up to 1024 regions and 128 x 128 pixels take float64 in any case.
        bce_smooth: added to the number of valid pixels that BCE is divided by, >= 0; the released
            code has 1. Default 0.
        return_info: whether to return info as well. Default False.
        process_group: the ranks whose images are one batch with these; all of them have to call,
            with any number of images. Default None: no others. The value is that of the whole
            batch. The gradient is, too, times the number of ranks: DistributedDataParallel takes
            the mean of the ranks' gradients, which makes it that of the whole batch.

    Returns:
        The loss, a float32 scalar (float64 for float64 logits); 0 with zero gradient if no pixel is
        valid. The gradient has the dtype of the logits.
        With return_info also info, int32 [N, C] on the device: 0, or the order of the first
        leading minor of the matrix of P and Y that is not positive definite (its loss is then NaN).

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes do not match, an option is out of range, the pooled map is smaller than a
            region, or a label is out of range (see ignore_index).

    Reference:
        Zhao et al., "Region Mutual Information Loss for Semantic Segmentation", Eq. 12 to 16.

    Example:
        >>> import torch
        >>> from tritonloss.functional import rmi_loss
        >>> logits = torch.randn(2, 19, 32, 64, requires_grad=True)
        >>> target = torch.randint(0, 19, (2, 32, 64))
        >>> rmi_loss(logits, target).backward()
        >>> logits.grad.shape
        torch.Size([2, 19, 32, 64])
    """
    with ranks_agree(process_group, logits):
        checks.check_logits(logits)
        checks.check_target(logits, target)
        _check_options(
            region_size, pooling, pool_size, moments, epsilon, bce_weight, ignore, ignore_index,
            precision, bce_smooth, return_info, process_group, logits.size(1),
        )  # fmt: skip
        _check_region_fits(logits, region_size, pooling, pool_size)
        checks.check_labels_in_range(target, checks.labels_of(logits), ignore_index)
    ridge = _EPSILON[moments] if epsilon is None else float(epsilon)
    options = Options(
        region_size, pooling, pool_size, moments, ridge, float(bce_weight), ignore,
        None if ignore_index is None else int(ignore_index), precision, float(bce_smooth),
        group=name_of(process_group),
    )  # fmt: skip
    if not serves_triton(logits) or (logits.size(0) == 0 and process_group is None):
        given = options._asdict()
        del given["small"], given["group"]
        return rmi_loss_reference(
            logits, target, **given, return_info=return_info, process_group=process_group
        )
    options = options._replace(small=is_small(options, logits.size(2), logits.size(3)))
    loss, info = RMI(logits, target, options=options)
    return (loss, info) if return_info else loss


def _check_options(
    region_size: int,
    pooling: str | None,
    pool_size: int,
    moments: str,
    epsilon: float | None,
    bce_weight: float,
    ignore: str,
    ignore_index: int | None,
    precision: str | None,
    bce_smooth: float,
    return_info: bool,
    process_group: ProcessGroup | None,
    classes: int | None = None,
) -> None:
    """Check all options; without ``classes``, for any number of them."""
    checks.check_integer("region_size", region_size, 1, _LARGEST_REGION)
    checks.check_option("pooling", pooling, POOLINGS, or_none=True)
    checks.check_integer("pool_size", pool_size, 1, _LARGEST_POOL)
    checks.check_option("moments", moments, MOMENTS)
    if epsilon is not None:
        checks.check_range("epsilon", epsilon, 0.0, math.inf, interval="()")
    checks.check_range("bce_weight", bce_weight, 0.0, 1.0)
    checks.check_option("ignore", ignore, IGNORES)
    checks.check_ignore_index(ignore_index, classes)
    checks.check_option("precision", precision, PRECISIONS, or_none=True)
    checks.check_range("bce_smooth", bce_smooth, 0.0, math.inf, interval="[)")
    checks.check_flag("return_info", return_info)
    check_process_group(process_group)


def _check_region_fits(
    logits: torch.Tensor, region_size: int, pooling: str | None, pool_size: int
) -> None:
    height, width = logits.shape[2:]
    pooled = pooled_size(height, width, pooling, pool_size)
    if min(height, width) < 1 or min(pooled) < region_size:
        raise ValueError(
            f"logits must be large enough for a region of region_size={region_size} after "
            f"pooling={pooling!r} with pool_size={pool_size}; got height {height} and width "
            f"{width}, pooled to {pooled[0]} x {pooled[1]}"
        )


# --- module ---------------------------------------------------------------------------------------


class RMILoss(LossModule, function=rmi_loss, check=_check_options):
    """Region mutual information loss as a module: :func:`tritonloss.functional.rmi_loss`.

    Args: the keyword arguments of the function, with the same defaults.

    Example:
        >>> import torch, tritonloss
        >>> criterion = tritonloss.RMILoss(pool_size=2)
        >>> criterion(torch.randn(2, 19, 32, 64), torch.randint(0, 19, (2, 32, 64))).shape
        torch.Size([])
    """

    @classmethod
    def released(cls, *, ignore_index: int | None = checks.IGNORE_INDEX) -> RMILoss:
        """The loss of the authors' code: moments are sums, 5e-4 on diagonals, BCE over V + 1."""
        return cls(
            region_size=3,
            pooling="avg",
            pool_size=4,
            moments="sum",
            epsilon=5e-4,
            bce_weight=0.5,
            ignore="zero",
            ignore_index=ignore_index,
            bce_smooth=1.0,
        )


EXAMPLES = tuple(
    Example(
        f"rmi_loss, {name}", rmi_loss, RMI, {"region_size": 2, "pool_size": 2}, RMILoss, way=way
    )
    for name, way in (("small images", nullcontext), ("large images", kernels_of_large_images))
)


# --- tuning ---------------------------------------------------------------------------------------


def _cell_candidates(pool_size: int) -> list[Configuration]:
    """Candidates for kernels whose tiles are pooling cells; the first is the heuristic's."""
    first = cells_and_warps(pool_size)
    count = max(128 // triton.next_power_of_2(pool_size), 1)
    sizes = [first, (count, 1), (2 * count, 1), (2 * count, 2), (4 * count, 2), (4 * count, 4)]
    sizes += [(8 * count, 4), (max(count // 2, 1), 1)]
    candidates: list[Configuration] = [
        {"CELLS": cells, "num_warps": warps} for cells, warps in sizes
    ]
    return [c for i, c in enumerate(candidates) if c not in candidates[:i]]


def _lane_candidates(first: int) -> list[Configuration]:
    """Candidates for kernels that go along a row; ``first`` are the heuristic's lanes."""
    lanes = [first, *(other for other in (64, 128, 256) if other != first)]
    return [{"LANES": count, "num_warps": warps} for count in lanes for warps in (2, 4)]


def _row_candidates(lanes: int, rows: int, warps: int) -> list[Configuration]:
    """Candidates for kernels that go down a strip: the heuristic's, then its neighbours."""
    sizes = [(lanes, rows, warps)]
    sizes += [(lanes, other, warps) for other in (rows // 2, rows // 4, 2 * rows)]
    sizes += [(lanes // 2, rows, warps // 2), (2 * lanes, rows, 2 * warps)]
    sizes += [(lanes // 2, rows // 2, warps // 2), (lanes // 2, rows, warps)]
    sizes = [size for size in sizes if size[0] >= 32 and size[2] >= 1]
    return [{"LANES": a, "ROWS": b, "num_warps": c} for a, b, c in sizes]


def _tuning_pass(
    operator: str,
    choices: tuple[Options, ...],
    dtype: torch.dtype,
    shape: Shape,
    layout: str,
    device: torch.device,
) -> Launch:
    """A launch of the passes that contain the operator, with each of the options in ``choices``."""
    # The layout "strided" is all that is not contiguous. Of those, channels_last is common.
    memory = "channels_last" if layout == "strided" else layout
    logits = random_map(shape, memory, dtype, device).sub_(0.5).mul_(8)
    target = random_labels(shape, device)

    def forward(options: Options) -> tuple[torch.Tensor, Saved]:
        loss, _, saved = forward_pass(options, logits, target)
        return loss, saved

    def backward(options: Options, loss: torch.Tensor, saved: Saved) -> torch.Tensor:
        return backward_pass(options, loss, logits, target, saved)

    if operator in ("rmi_pool", "rmi_cross_entropy") or operator.startswith("rmi_moments"):
        return lambda: [(loss, saved.residual) for loss, saved in map(forward, choices)]
    if operator == "rmi_sample":
        return lambda: [backward(options, *forward(options)) for options in choices]
    kept = [(options, *forward(options)) for options in choices]
    return lambda: [backward(*each) for each in kept]


def tuning_cases() -> list[TuningCase]:
    """What ``python -m tritonloss tune`` measures for this slice."""
    pooled = Options(3, "avg", 4, "mean", 1e-6, 0.5, "zero", 255, None)
    whole = pooled._replace(pooling=None)
    choices: list[tuple[str, int, tuple[Options, ...], list[Configuration]]] = []
    for region, size in ((3, 4), (2, 2), (5, 8), (4, 3)):
        cells = _cell_candidates(size)
        of_cells = (pooled._replace(pool_size=size),)
        of_maps = (pooled._replace(region_size=region),)
        of_logits = (whole._replace(region_size=region),)
        moments = (256, 64, 8) if region == 4 else (128, 64, 4)
        narrow = (128, 64, 4) if region == 5 else (32, 64, 1)
        choices += [
            ("rmi_pool", size, of_cells, cells),
            ("rmi_expand", size, of_cells, cells),
            ("rmi_moments", region, of_maps, _row_candidates(*moments)),
            ("rmi_gradient", region, of_maps, _row_candidates(128, 64, 4)),
            ("rmi_moments_of_logits", region, of_logits, _row_candidates(*narrow)),
            ("rmi_gradient_of_logits", region, of_logits, _row_candidates(*narrow)),
        ]
        if region == 3:
            dropped = (whole._replace(ignore="drop"),)
            choices.append(("rmi_cross_entropy", 1, dropped, _row_candidates(256, 8, 4)))
        if size in (4, 2):
            sampled = (pooled._replace(pooling="nearest", pool_size=size),)
            choices.append(("rmi_sample", size, sampled, _lane_candidates(128)))
    return [
        TuningCase(
            operator, 19, window, dtype, "contiguous",
            functools.partial(sized, (2, 19, 512, 1024), "contiguous"), candidates,
            sized=sized, layouts=("contiguous", "strided"),
        )
        for dtype in (torch.float32, torch.bfloat16)
        for operator, window, options, candidates in choices
        for sized in [functools.partial(_tuning_pass, operator, options, dtype)]
    ]  # fmt: skip

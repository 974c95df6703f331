"""Structural similarity loss (SSL): cross entropy weighted by how much the local structure is off.

Zhao et al., "Structural Similarity Loss for Semantic Segmentation". With p = sigmoid(z) and y the
one-hot label, both normalised by the statistics of a Gaussian window,

    e = |(y - mean_y + C4) / (deviation_y + C4) - (p - mean_p + C4) / (deviation_p + C4)|   Eq. 10
    f = 1[e > beta e_max],   M = sum f                                                   Eq. 11
    loss = bce_weight BCE + (1 - bce_weight) (1 / M) sum e f bce                         Eq. 13, 17

e, f and M carry no gradient, so that dL/dz = (p - y) (a m + b e f) is elementwise: a = bce_weight /
V, b = (1 - bce_weight) / M, with V valid pixels.

Bytes per pass, with L of logits and T of labels: forward L + T, and T for the look at the labels
(``structural_labels.py``); backward 2 L + T. There are two schedules:

- recompute: the forward pass writes sums only, the backward pass recomputes e from the logits;
- stored: the forward pass leaves e f in the buffer that the backward pass turns into the gradient.
  This spares the window's arithmetic at the price of 2 L more traffic. It pays for large windows.
  It is not for logits of 16 bits, in which e would lose its digits.

Under both, the gradient is the only map with classes that is allocated.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.distributed import ProcessGroup

from kernels_reference.structural_similarity import (
    structural_similarity_loss as structural_similarity_loss_reference,
)

from .._core import checks
from .._core.backend import serves_triton
from .._core.configurations import Configuration, Launch, Shape, TuningCase, forced
from .._core.example import Example
from .._core.loss_module import LossModule
from .._core.operator import Operator, can_reuse
from .._core.process_groups import check_process_group, name_of, ranks_agree
from .._core.tuning_inputs import random_labels, random_map
from .._engine.strip_launch import strip_candidates, strip_heuristic
from .._engine.strip_windows import PADDINGS
from .structural_similarity_launch import (
    Options,
    Results,
    backward_pass,
    empty_results,
    forward_pass,
    heuristic_of,
    stored_pass,
    stores_differences,
)

# --- operator -------------------------------------------------------------------------------------


def _structural_similarity_reuse(
    grad_loss: torch.Tensor,
    statistics: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    found: torch.Tensor,
    stored: torch.Tensor,
    options: Options,
) -> torch.Tensor | None:
    """The gradient in the buffer that holds e f; None without one.

    It is the buffer's .data, which has a version counter of its own: a caller who changes the
    gradient does not spoil the graph.
    """
    if stored.dim() < 4:
        return None
    gradient = stored.data
    stored_pass(grad_loss, statistics, logits, target, gradient, options.ignore_index)
    return gradient


STRUCTURAL_SIMILARITY = Operator(
    "structural_similarity",
    forward=forward_pass,
    backward=backward_pass,
    reuse=_structural_similarity_reuse,
    allocate=empty_results,
    results=Results,
    options=Options,
)


# --- function -------------------------------------------------------------------------------------


def structural_similarity_loss(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    window_size: int = 3,
    sigma: float = 1.5,
    beta: float = 0.1,
    stability: float = 0.01,
    bce_weight: float = 0.5,
    padding: str = "zeros",
    hard_mining: bool = True,
    reweight: bool = True,
    ignore_index: int | None = checks.IGNORE_INDEX,
    process_group: ProcessGroup | None = None,
) -> torch.Tensor:
    """Structural similarity loss: cross entropy on the samples whose local structure is most wrong.

    With p = sigmoid(logits), y the one-hot target, n(x) = (x - mean + C4) / (deviation + C4) under
    a Gaussian window, e = |n(y) - n(p)|, f = 1[e > beta e_max] and M = sum f:

        loss = bce_weight BCE + (1 - bce_weight) (1 / M) sum e f bce(logits, y)

    BCE is summed over classes and averaged over valid pixels. e, f and M are constants to the
    gradient. Each class is a binary map of its own (one against the rest); with one class
    y = (target == 1).

    Under an ignored pixel a logit that is not finite changes nothing. Elsewhere NaN makes the
    loss NaN, and of its class the gradient of every pixel whose window holds it; an infinite
    logit is a probability of 0 or 1, and makes the loss infinite where that is wrong.

    Args:
        logits: [N, C, H, W] with C >= 1, float16, bfloat16 or float32 (or float64), any strides.
        target: integer labels [N, H, W], uint8 to int64: 0 to C - 1, or 0 and 1 if C is 1.
        window_size: side of the window in pixels, odd, 1 to 31. Default 3. 1 compares single
            pixels: e = |y - p|, e_max = 1.
        sigma: standard deviation of the Gaussian window in pixels, 0.001 to 1e6. Default 1.5.
        beta: share of the theoretical e_max below which a sample is dropped, in [0, 1). Default
            0.1.
        stability: C4, 1e-20 to 1e20. Default 0.01.
        bce_weight: share of the plain cross entropy, in [0, 1]. Default 0.5.
        padding: "zeros" (default), "reflect", "replicate", or "valid": pixels whose window leaves
            the image count for the cross entropy only.
        hard_mining: False keeps all valid samples (f = 1). Default True.
        reweight: False sets e = 1 once the hard samples are chosen. Default True.
        ignore_index: label of pixels that are ignored (0 to the window, like padding), any
            integer or None. Default 255, which has to be given where there are more than 255
            classes and it is one of them. Other labels out of range raise on the CPU; on a GPU,
            where looking would synchronise, they count as ignored unless TRITONLOSS_CHECK_LABELS=1
            is set.
        process_group: the ranks whose images are one batch with these; all of them have to call,
            with any number of images. Default None: no others. The value is that of the whole
            batch. The gradient is, too, times the number of ranks: DistributedDataParallel takes
            the mean of the ranks' gradients, which makes it that of the whole batch.

    Returns:
        The loss, a float32 scalar (float64 for float64 logits); 0 with zero gradient if no pixel is
        valid. The gradient has the dtype of the logits.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes do not match, an option is out of range, or a label is (see
            ignore_index).

    Reference:
        Zhao et al., "Structural Similarity Loss for Semantic Segmentation", Eq. 10 to 17.

    Example:
        >>> import torch
        >>> from tritonloss.functional import structural_similarity_loss
        >>> logits = torch.randn(2, 19, 32, 64, requires_grad=True)
        >>> target = torch.randint(0, 19, (2, 32, 64))
        >>> structural_similarity_loss(logits, target).backward()
        >>> logits.grad.shape
        torch.Size([2, 19, 32, 64])
    """
    with ranks_agree(process_group, logits):
        checks.check_logits(logits)
        checks.check_target(logits, target)
        _check_options(
            window_size, sigma, beta, stability, bce_weight, padding, hard_mining, reweight,
            ignore_index, process_group, logits.size(1),
        )  # fmt: skip
        checks.check_padding_fits(logits, window_size, padding)
        checks.check_labels_in_range(target, checks.labels_of(logits), ignore_index)
    if not serves_triton(logits):
        return structural_similarity_loss_reference(
            logits,
            target,
            window_size=window_size,
            sigma=sigma,
            beta=beta,
            stability=stability,
            bce_weight=bce_weight,
            padding=padding,
            hard_mining=hard_mining,
            reweight=reweight,
            ignore_index=ignore_index,
            process_group=process_group,
        )
    options = Options(
        window_size=int(window_size),
        sigma=float(sigma),
        beta=float(beta),
        stability=float(stability),
        bce_weight=float(bce_weight),
        padding=padding,
        hard_mining=hard_mining,
        reweight=reweight,
        ignore_index=checks.plain_label(ignore_index),
        store=can_reuse(logits) and stores_differences(logits, window_size),
        group=name_of(process_group),
    )
    return STRUCTURAL_SIMILARITY(logits, target, options=options)[0]


def _check_options(
    window_size: int,
    sigma: float,
    beta: float,
    stability: float,
    bce_weight: float,
    padding: str,
    hard_mining: bool,
    reweight: bool,
    ignore_index: int | None,
    process_group: ProcessGroup | None,
    classes: int | None = None,
) -> None:
    """Check all options; without ``classes``, for any number of them."""
    checks.check_window_size(window_size)
    checks.check_sigma(sigma)
    checks.check_range("beta", beta, 0.0, 1.0, interval="[)")
    checks.check_range("stability", stability, 1e-20, 1e20)
    checks.check_range("bce_weight", bce_weight, 0.0, 1.0)
    checks.check_option("padding", padding, PADDINGS)
    checks.check_flag("hard_mining", hard_mining)
    checks.check_flag("reweight", reweight)
    checks.check_ignore_index(ignore_index, classes)
    check_process_group(process_group)


# --- module ---------------------------------------------------------------------------------------


class StructuralSimilarityLoss(
    LossModule, function=structural_similarity_loss, check=_check_options
):
    """:func:`tritonloss.functional.structural_similarity_loss` as a module.

    Args: the keyword arguments of the function, with the same defaults.

    Example:
        >>> import torch, tritonloss
        >>> criterion = tritonloss.StructuralSimilarityLoss(window_size=5)
        >>> criterion(torch.randn(2, 19, 32, 64), torch.randint(0, 19, (2, 32, 64))).shape
        torch.Size([])
    """


# --- tuning ---------------------------------------------------------------------------------------


def tuning_cases() -> list[TuningCase]:
    """What ``python -m tritonloss tune`` measures for this slice."""
    cases = []
    shape = (2, 19, 512, 1024)
    for window_size in (3, 11, 7, 5, 9):
        for dtype in (torch.float32, torch.bfloat16):
            sized = functools.partial(_tuning_pass, window_size, dtype)
            for operator in ("structural_similarity_forward", "structural_similarity_backward"):
                candidates = functools.partial(_tuning_candidates, operator, window_size, dtype)
                arguments = (19, window_size, dtype, "contiguous")
                run = functools.partial(sized, shape, "contiguous")
                first = candidates(19, "contiguous")
                cases.append(
                    TuningCase(
                        operator, *arguments, run, first, sized=sized, sized_candidates=candidates
                    )
                )
    run = functools.partial(_tuning_stored, shape, "contiguous")
    arguments = (19, 1, torch.float32, "contiguous")
    first = strip_candidates(strip_heuristic(4))
    name = "structural_similarity_stored"
    stored = TuningCase(name, *arguments, run, first, sized=_tuning_stored)
    return [*cases[:8], stored, *cases[8:]]  # after the windows 3 and 11, which are most used


def _tuning_candidates(
    operator: str, window_size: int, dtype: torch.dtype, classes: int, layout: str
) -> list[Configuration]:
    heuristic = heuristic_of(operator, window_size)
    if operator.endswith("forward") and dtype == torch.float32:
        return strip_candidates(heuristic, schedule=("recompute", "stored"))
    return strip_candidates(heuristic)


def _tuning_stored(shape: Shape, layout: str, device: torch.device) -> Launch:
    """A launch of the stored schedule's backward pass, on a copy, since it overwrites e f."""
    logits = random_map(shape, layout, torch.float32, device).sub_(0.5).mul_(8)
    target = random_labels(shape, device)
    options = Options(window_size=11, store=True)
    loss, statistics, stored, _ = forward_pass(logits, target, options)
    upstream = torch.ones_like(loss)

    def clone_and_turn() -> torch.Tensor:
        gradient = stored.clone()
        stored_pass(upstream, statistics, logits, target, gradient, 255)
        return gradient

    return clone_and_turn


def _tuning_pass(
    window_size: int, dtype: torch.dtype, shape: Shape, layout: str, device: torch.device
) -> Launch:
    """A launch of both passes, whose time together says which schedule is faster."""
    logits = random_map(shape, layout, dtype, device).sub_(0.5).mul_(8)
    target = random_labels(shape, device)

    def both_passes() -> tuple[torch.Tensor, torch.Tensor]:
        options = Options(window_size, store=stores_differences(logits, window_size))
        loss, statistics, stored, found = forward_pass(logits, target, options)
        upstream = torch.ones_like(loss)
        if stored.dim() == 4:
            stored_pass(upstream, statistics, logits, target, stored, 255)
            return loss, stored
        return loss, backward_pass(upstream, statistics, logits, target, found, options)

    return both_passes


def _stored() -> AbstractContextManager[Any]:
    """The schedule that keeps the structural differences instead of computing them again."""
    return forced("structural_similarity_forward", {"schedule": "stored"})


EXAMPLES = (
    Example(
        "structural_similarity_loss",
        structural_similarity_loss,
        STRUCTURAL_SIMILARITY,
        module=StructuralSimilarityLoss,
    ),
    Example(
        "structural_similarity_loss, window 7",
        structural_similarity_loss,
        STRUCTURAL_SIMILARITY,
        {"window_size": 7},
        StructuralSimilarityLoss,
    ),
    Example(
        "structural_similarity_loss, stored",
        structural_similarity_loss,
        STRUCTURAL_SIMILARITY,
        module=StructuralSimilarityLoss,
        way=_stored,
    ),
)

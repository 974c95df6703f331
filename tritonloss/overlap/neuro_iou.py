"""NeuroIoU: a loss that a network has learnt from the IoU (NeuroIoU paper, section 3).

For every image and class there are the sums over true positives, false positives and false
negatives; ``membership.py`` has the bytes and instructions. The network that knows the IoU loss
from them is small: it is PyTorch's, and so is the gradient it returns to the sums.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from kernels_reference.neuro_iou import membership_sums as membership_sums_reference

from .._core import checks
from .._core.backend import serves_triton
from .._core.configurations import Launch, TuningCase
from .._core.example import Example
from .._core.loss_module import LossModule
from .._core.operator import Operator
from .._core.tuning_inputs import random_labels, random_map
from .._engine.pixel_tuning import pixel_candidates
from .iou_surrogate import SCORES, IoUPairs, IoUSurrogate
from .membership_launch import (
    MOST_CLASSES,
    PROBABILITY,
    MembershipResults,
    SumOptions,
    allocated,
    launch_sums,
    launch_sums_backward,
)

# --- operator -------------------------------------------------------------------------------------


def _backward(
    grad_sums: torch.Tensor,
    first: torch.Tensor | None,
    second: torch.Tensor | None,
    logits: torch.Tensor,
    target: torch.Tensor,
    options: SumOptions,
) -> torch.Tensor:
    return launch_sums_backward(grad_sums, (first, second), logits, target, options)


MEMBERSHIP_SUMS = Operator(
    "membership_sums",
    forward=launch_sums,
    backward=_backward,
    allocate=allocated,
    results=MembershipResults,
    options=SumOptions,
    returned=2,
)


def tuning_cases() -> list[TuningCase]:
    """What ``python -m tritonloss tune`` measures for this slice: the most common, and no more."""
    return [
        TuningCase(
            f"{PROBABILITY.name}_{direction}",
            19,
            1,
            dtype,
            layout,
            functools.partial(_tuning_pass, dtype, layout),
            pixel_candidates(PROBABILITY, direction, dtype, 19, layout),
        )
        for layout in ("contiguous", "channels_last", "strided")
        for dtype in (torch.float32, torch.bfloat16)
        for direction in ("forward", "backward")
    ]


def _tuning_pass(dtype: torch.dtype, layout: str, device: torch.device) -> Launch:
    shape = (2, 19, 512, 1024)
    logits = random_map(shape, layout, dtype, device).sub_(0.5).mul_(8)
    target = random_labels(shape, device)
    return lambda: MEMBERSHIP_SUMS.both_passes(logits, target, options=SumOptions())


def membership_sums(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    score: str,
    ignore_index: int | None,
    upsample: str | None = None,
    align_corners: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sums, counts): [N, C, 3] each, over true positives, false positives, false negatives."""
    logits, target = checks.as_images(logits, target, upsample)
    checks.check_logits(logits)
    checks.check_upsample(upsample, align_corners)
    if logits.shape[1] > MOST_CLASSES:
        checks.check_classes(logits, MOST_CLASSES)
    checks.check_target(logits, target, upsample, can_upsample=True)
    checks.check_ignore_index(ignore_index, checks.labels_of(logits))
    checks.check_labels_in_range(target, checks.labels_of(logits), ignore_index)
    options = SumOptions(score, checks.plain_label(ignore_index), upsample, align_corners)
    if not serves_triton(logits):
        return membership_sums_reference(logits, target, **options._asdict())
    sums, counts = MEMBERSHIP_SUMS(logits, target, options=options)
    return sums, counts


# --- examples for the surrogate -------------------------------------------------------------------

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]
Source = Callable[[torch.Tensor], torch.Tensor] | Batches


def collect_iou_pairs(
    source: Source,
    batches: Batches | None = None,
    *,
    score: str = "probability",
    ignore_index: int | None = checks.IGNORE_INDEX,
    upsample: str | None = None,
    align_corners: bool = False,
) -> IoUPairs:
    """Collect examples for an IoU surrogate: one for every image and class that it has.

    The paper takes them from a network that has been trained with cross entropy, on its training
    images (section 3.1). A module is put into evaluation mode meanwhile; nothing has a gradient.

    What the surrogate has never seen, it may rate well, and a network that is trained with it finds
    that. Take pairs of worse predictions, too: of logits to which a random number was added for
    each image and class, with a standard deviation of about their own.

    Args:
        source: a network, images -> logits [N, C, H, W], or of volumes [N, C, D, H, W]; or,
            without ``batches``, an iterable of (logits, target).
        batches: an iterable of (images, target), on the network's device.
        score: what is summed up, "probability" (default) or "hinge".
        ignore_index: label of ignored pixels, an integer or None. Default 255.
        upsample: "bilinear" if targets have a higher resolution than logits. Default None.
        align_corners: of the interpolation. Default False.

    Returns:
        The examples, on the CPU; none if no image has a valid pixel.

    Raises:
        TypeError, ValueError: an option or a batch is not as described.

    Example:
        >>> import torch, tritonloss
        >>> logits, target = torch.randn(4, 3, 8, 8), torch.randint(0, 3, (4, 8, 8))
        >>> tritonloss.collect_iou_pairs([(logits, target)]).sums.shape
        torch.Size([12, 3])
    """
    checks.check_option("score", score, SCORES)
    parts = [_no_pairs(score)]
    with torch.no_grad(), _evaluating(source):
        for logits, target in _logits_of(source, batches):
            sums, counts = membership_sums(
                logits,
                target,
                score=score,
                ignore_index=ignore_index,
                upsample=upsample,
                align_corners=align_corners,
            )
            present = counts[..., 0] + counts[..., 2] > 0
            pixels = torch.full((int(present.sum()),), target[0].numel())
            parts.append(
                IoUPairs(sums[present].float().cpu(), counts[present].cpu(), pixels, score)
            )
    return IoUPairs(
        torch.cat([part.sums for part in parts]),
        torch.cat([part.counts for part in parts]),
        torch.cat([part.pixels for part in parts]),
        score,
    )


def _no_pairs(score: str) -> IoUPairs:
    none = torch.zeros(0, dtype=torch.int64)
    return IoUPairs(torch.zeros(0, 3), none.view(0, 1).expand(0, 3), none, score)


def _logits_of(source: Source, batches: Batches | None) -> Batches:
    """(logits, target) of every batch."""
    if callable(source):
        if batches is None:
            raise TypeError("batches must be given where source is a network; got None")
        for images, target in batches:
            yield source(images), target
    elif batches is not None:
        raise TypeError("batches must be None where source holds logits; got batches")
    else:
        yield from source


@contextmanager
def _evaluating(source: object) -> Iterator[None]:
    """A module is in evaluation mode, with all of its parts, and then as it was."""
    modes = {m: m.training for m in source.modules()} if isinstance(source, nn.Module) else {}
    for module in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


# --- the loss -------------------------------------------------------------------------------------


def neuro_iou_loss(
    logits: torch.Tensor,
    target: torch.Tensor,
    surrogate: IoUSurrogate,
    *,
    ignore_index: int | None = checks.IGNORE_INDEX,
    upsample: str | None = None,
    align_corners: bool = False,
) -> torch.Tensor:
    """What a surrogate takes the IoU loss for, mean over the classes that each image has.

    A pixel is predicted as the class of its largest logit, and counts with its probability of that
    class and, if it is another, with that of its label. Which set a pixel is in has no derivative,
    nor has the size of a set; true negatives have no gradient, and neither has the surrogate's
    network. The paper trains with cross entropy first, and then with this alone.

    It reads the logits once going forward, and once going back. Extra memory is the gradient and 5
    bytes per pixel of the labels, 6 of more than 256 classes; going back, interpolated logits take
    4 more. Results are the same at every call. Images, not batches, have sums: those of other ranks
    are in none of them.

    Args:
        logits: [N, C, H, W], float16, bfloat16, float32 or float64, any strides, C up to 1024. One
            channel is a binary mask: sigmoids are the probabilities, and labels are 0 and 1. Or
            [N, C, L], or volumes [N, C, D, H, W], of which those whose slices do not lie one behind
            the other are copied.
        target: integer labels [N, H, W] (or [N, L], [N, D, H, W]), uint8 to int64.
        surrogate: a fitted network (:func:`tritonloss.fit_iou_surrogate`), which also says whether
            probabilities or hinges are summed up.
        ignore_index: label of pixels that are in no set, any integer or None. Default 255, which
            has to be given where there are more than 255 classes and it is one of them. Other
            labels outside [0, C) raise on the CPU; on a GPU, where looking would synchronise, they
            count as ignored unless TRITONLOSS_CHECK_LABELS=1 is set.
        upsample: "bilinear" if the target has a higher resolution than the logits, [N, H, W] with
            H >= h and W >= w of logits [N, C, h, w], at any ratios: the loss of
            ``F.interpolate(logits.float(), size=(H, W), mode="bilinear")``, which is never in
            memory. Default None: the same size, as volumes have to have.
        align_corners: of the interpolation, as in :func:`torch.nn.functional.interpolate`. Default
            False.

    Returns:
        The loss, a float32 scalar (float64 for float64 logits); 0 with a gradient of 0 if no pixel
        is valid.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes do not match, there are too many classes, or a label is out of range.

    Source:
        "NeuroIoU: Learning a Surrogate Loss for Semantic Segmentation", equations 2 to 5 and
        section 3.3. Sums are divided by the labels' H W; the gradient goes through the softmax,
        which the paper says both to remove and to keep.

    Example:
        >>> import torch, tritonloss
        >>> logits = torch.randn(2, 4, 16, 16, requires_grad=True)
        >>> target = torch.randint(0, 4, (2, 16, 16))
        >>> pairs = tritonloss.collect_iou_pairs([(logits, target)] * 2)
        >>> fit = tritonloss.fit_iou_surrogate(pairs, steps=10, progress=False)
        >>> tritonloss.functional.neuro_iou_loss(logits, target, fit.surrogate).backward()
    """
    _check_options(surrogate, ignore_index, upsample, align_corners)
    if isinstance(logits, torch.Tensor):
        checks.check_same_device(logits, "logits", surrogate.scale, "surrogate")
    sums, counts = membership_sums(
        logits,
        target,
        score=surrogate.score,
        ignore_index=ignore_index,
        upsample=upsample,
        align_corners=align_corners,
    )
    pixels = max(math.prod(target.shape[1:]), 1)
    present = counts[..., 0] + counts[..., 2] > 0
    losses = surrogate.frozen(sums, counts, pixels)
    # Selected: where a class is absent, whatever the network returns has no part in the loss.
    total = torch.where(present, losses, 0.0).sum()
    return total / present.sum().clamp(min=1)


def _check_options(
    surrogate: IoUSurrogate, ignore_index: int | None, upsample: str | None, align_corners: bool
) -> None:
    if not isinstance(surrogate, IoUSurrogate):
        raise TypeError(f"surrogate must be an IoUSurrogate; got {type(surrogate).__name__}")
    checks.check_ignore_index(ignore_index)
    checks.check_upsample(upsample, align_corners)


class NeuroIoULoss(LossModule, function=neuro_iou_loss, check=_check_options):
    """:func:`tritonloss.functional.neuro_iou_loss` as a module, which keeps its surrogate.

    Args:
        surrogate: a fitted :class:`tritonloss.IoUSurrogate`.
        ignore_index, upsample, align_corners: as for the function.

    Raises:
        TypeError, ValueError: as the function.

    Example:
        >>> import torch, tritonloss
        >>> loss = tritonloss.NeuroIoULoss(tritonloss.IoUSurrogate())
        >>> loss(torch.randn(2, 4, 16, 16), torch.randint(0, 4, (2, 16, 16))).shape
        torch.Size([])
    """


def _unfitted() -> IoUSurrogate:
    """A network that nobody has fitted, the same one each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return IoUSurrogate(layers=1, nodes=8).requires_grad_(False)


# One for each device: transforms of torch.func cannot move a module.
_UNFITTED = {torch.device("cpu"): _unfitted()}


def _with_a_network(logits: torch.Tensor, target: torch.Tensor) -> tuple[Any, ...]:
    """Logits, target and the network above."""
    device = logits.device
    if device not in _UNFITTED:
        _UNFITTED[device] = _unfitted().to(device)
    return logits, target, _UNFITTED[device]


def _half_resolution(logits: torch.Tensor, target: torch.Tensor) -> tuple[Any, ...]:
    """The same with every second row and column of the logits."""
    return _with_a_network(logits[..., ::2, ::2], target)


EXAMPLES = (
    Example(
        "neuro_iou_loss",
        neuro_iou_loss,
        MEMBERSHIP_SUMS,
        module=NeuroIoULoss,
        arguments=_with_a_network,
    ),
    Example(
        "neuro_iou_loss, upsampled",
        neuro_iou_loss,
        MEMBERSHIP_SUMS,
        {"upsample": "bilinear"},
        NeuroIoULoss,
        _half_resolution,
    ),
)

"""The confusion matrix of logits and labels, and what a network predicts.

Both read the logits once, find each pixel's largest one in registers and keep no map of it. Bytes,
L of logits and T of labels: the matrix L + T, the prediction L and one byte per pixel.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed import ProcessGroup, all_reduce, get_backend

from kernels_reference.confusion_matrix import confusion_matrix as confusion_matrix_reference
from kernels_reference.confusion_matrix import predict as predict_reference

from .._core import checks
from .._core.backend import serves_triton
from .._core.configurations import Launch, TuningCase
from .._core.example import Example, half_resolution_and_target
from .._core.operator import Operator
from .._core.tuning_inputs import random_labels, random_map
from .._engine.pixel_tuning import pixel_candidates
from .confusion_launch import (
    LARGEST,
    empty_prediction,
    launch_label_matrix,
    launch_matrix,
    launch_prediction,
)

# --- operators ------------------------------------------------------------------------------------


class Options(NamedTuple):
    """The options of the matrix."""

    num_classes: int | None = None
    upsample: str | None = None
    align_corners: bool = False
    ignore_index: int | None = checks.IGNORE_INDEX


class Matrix(NamedTuple):
    """int64 [C, C]."""

    matrix: torch.Tensor


class PredictOptions(NamedTuple):
    """The options of the prediction."""

    size: Sequence[int] | None = None
    upsample: str | None = "bilinear"
    align_corners: bool = False


class Prediction(NamedTuple):
    """uint8 or int32 [N, H, W]."""

    prediction: torch.Tensor


def _matrix(logits: torch.Tensor, target: torch.Tensor, options: Options) -> Matrix:
    if logits.is_floating_point():
        return Matrix(launch_matrix(logits, target, options.ignore_index, options.align_corners))
    assert options.num_classes is not None
    return Matrix(launch_label_matrix(logits, target, options.num_classes, options.ignore_index))


def _empty_matrix(logits: torch.Tensor, target: torch.Tensor, options: Options) -> Matrix:
    classes = options.num_classes or checks.labels_of(logits)
    return Matrix(target.new_empty((classes, classes), dtype=torch.int64))


def _prediction(logits: torch.Tensor, options: PredictOptions) -> Prediction:
    return Prediction(launch_prediction(logits, options.size, options.align_corners))


def _empty_prediction(logits: torch.Tensor, options: PredictOptions) -> Prediction:
    return Prediction(empty_prediction(logits, options.size))


MATRIX = Operator(
    "confusion_matrix",
    forward=_matrix,
    backward=None,
    allocate=_empty_matrix,
    results=Matrix,
    options=Options,
)
PREDICTION = Operator(
    "predict",
    forward=_prediction,
    backward=None,
    allocate=_empty_prediction,
    results=Prediction,
    options=PredictOptions,
)


# --- tuning ---------------------------------------------------------------------------------------


def tuning_cases() -> list[TuningCase]:
    """What ``python -m tritonloss tune`` measures for this slice: the most common, and no more."""
    return [
        TuningCase(
            f"{LARGEST.name}_forward",
            19,
            1,
            dtype,
            layout,
            functools.partial(_tuning_pass, dtype, layout),
            pixel_candidates(LARGEST, "forward", dtype, 19, layout),
        )
        for layout in ("contiguous", "channels_last", "strided")
        for dtype in (torch.float32, torch.bfloat16)
    ]


def _tuning_pass(dtype: torch.dtype, layout: str, device: torch.device) -> Launch:
    shape = (2, 19, 512, 1024)
    logits = random_map(shape, layout, dtype, device).sub_(0.5).mul_(8)
    target = random_labels(shape, device)
    return lambda: launch_matrix(logits, target, 255)


# --- functions ------------------------------------------------------------------------------------


def confusion_matrix(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    num_classes: int | None = None,
    upsample: str | None = None,
    align_corners: bool = False,
    ignore_index: int | None = checks.IGNORE_INDEX,
) -> torch.Tensor:
    """How many pixels of label i are predicted as class j, exactly, without a map of predictions.

    A pixel is predicted as the class of its largest logit: of equal ones the first, and NaN before
    any number, as torch.argmax has it on a CPU. One channel predicts class 1 where its sigmoid is
    above 1/2, which is where the logit is above 0, and class 0 elsewhere, NaN included.

    Nothing waits for the GPU. Integers are added by atomics; their sum is the same in any order, so
    that two calls return the same matrix. It has no gradient.

    Args:
        logits: [N, C, H, W], float16, bfloat16, float32 or float64, any strides. Or what has been
            predicted: integer labels [N, H, W], of which those outside [0, num_classes) raise on
            the CPU and are not counted on a GPU (see ignore_index).
        target: integer labels [N, H, W], uint8 to int64; 0 and 1 with one channel.
        num_classes: C, where ``logits`` are labels; else None, or the number of labels that the
            logits have.
        upsample: None (default), or "bilinear": the logits are [N, C, h, w] with h <= H and w <= W,
            and what counts is ``F.interpolate(logits.float(), size=(H, W), mode="bilinear")``,
            which is never in memory. Around an infinite logit, where that gives NaN, the kernels
            take it for infinite, or leave the infinite one out if its share is 0. Without effect
            where ``logits`` are labels.
        align_corners: of the interpolation, as in :func:`torch.nn.functional.interpolate`. Default
            False.
        ignore_index: label of pixels that are not counted, any integer or None. Default 255, which
            has to be given where there are more than 255 classes and it is one of them. Other
            labels outside [0, C) raise on the CPU; on a GPU, where looking would synchronise, they
            are not counted unless TRITONLOSS_CHECK_LABELS=1 is set.

    Returns:
        The counts, int64 [C, C], [2, 2] of one channel: rows for labels, columns for predictions.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes do not match, an option is out of range, or a label is (see
            ignore_index).

    Example:
        >>> import torch, tritonloss
        >>> logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 1.0, 1.0]]).view(1, 2, 1, 3)
        >>> tritonloss.confusion_matrix(logits, torch.tensor([[[1, 1, 0]]]))
        tensor([[1, 0],
                [1, 1]])
    """
    _check_options(num_classes, upsample, align_corners, ignore_index)
    is_labels = checks.holds_labels(logits)
    if is_labels:
        classes = _check_labels(logits, target, num_classes)
    else:
        classes = _check_logits(logits, target, num_classes, upsample)
    checks.check_ignore_index(ignore_index, classes)
    checks.check_labels_in_range(target, classes, ignore_index)
    if is_labels:
        checks.check_labels_in_range(logits, classes, None, "logits")
    options = Options(num_classes, upsample, align_corners, checks.plain_label(ignore_index))
    # No transform of PyTorch finds a derivative here, and none is missed.
    logits = logits.detach()
    if not serves_triton(logits):
        return confusion_matrix_reference(logits, target, **options._asdict())
    return MATRIX(logits, target, options=options)[0]


def predict(
    logits: torch.Tensor,
    size: Sequence[int] | None = None,
    upsample: str | None = "bilinear",
    align_corners: bool = False,
) -> torch.Tensor:
    """The class of every pixel's largest logit, at full resolution, without logits of that size.

    Of equal logits it is the first class, and NaN comes before any number, as torch.argmax has it
    on a CPU. One channel predicts class 1 where its sigmoid is above 1/2, which is where the logit
    is above 0, and class 0 elsewhere, NaN included. It has no gradient.

    Args:
        logits: [N, C, h, w], float16, bfloat16, float32 or float64, any strides.
        size: (H, W) of the prediction, H >= h and W >= w, or None for that of the logits (default).
        upsample: "bilinear" (default): what counts is ``F.interpolate(logits.float(), size,
            mode="bilinear")``. Around an infinite logit, where that gives NaN, the kernels take it
            for infinite, or leave the infinite one out if its share is 0. None: the logits have
            that size.
        align_corners: of the interpolation, as in :func:`torch.nn.functional.interpolate`. Default
            False.

    Returns:
        The classes [N, H, W], uint8, or int32 of more than 256 classes.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: logits have another shape, size is smaller, or upsample is unknown.

    Example:
        >>> import torch, tritonloss
        >>> tritonloss.predict(torch.randn(2, 19, 32, 64), size=(128, 256)).shape
        torch.Size([2, 128, 256])
    """
    checks.check_logits(logits)
    checks.check_upsample(upsample, align_corners)
    if size is not None:
        size = _checked_size(size, upsample, logits)
    logits = logits.detach()
    if not serves_triton(logits):
        return predict_reference(logits, size, upsample or "bilinear", align_corners)
    return PREDICTION(logits, options=PredictOptions(size, upsample, align_corners))[0]


def _check_options(
    num_classes: int | None,
    upsample: str | None,
    align_corners: bool,
    ignore_index: int | None,
) -> None:
    if num_classes is not None:
        checks.check_positive("num_classes", num_classes)
    checks.check_upsample(upsample, align_corners)
    checks.check_ignore_index(ignore_index)


def _check_labels(labels: torch.Tensor, target: torch.Tensor, num_classes: int | None) -> int:
    checks.check_dense(labels, "logits")
    if labels.dim() != 3:
        raise ValueError(
            "logits must be a floating-point tensor of shape (N, C, H, W), or integer labels of "
            f"shape (N, H, W); got {checks.described(labels)}"
        )
    if num_classes is None:
        raise ValueError("num_classes must be given where logits are labels; got None")
    checks.check_target(labels.unsqueeze(1), target)
    return num_classes


def _check_logits(
    logits: torch.Tensor, target: torch.Tensor, num_classes: int | None, upsample: str | None
) -> int:
    checks.check_logits(logits)
    classes = checks.labels_of(logits)
    if num_classes not in (None, classes):
        raise ValueError(
            f"num_classes must be {classes} or None for logits of shape {tuple(logits.shape)}; "
            f"got {num_classes}"
        )
    checks.check_target(logits, target, upsample, can_upsample=True)
    return classes


def _checked_size(
    size: Sequence[int], upsample: str | None, logits: torch.Tensor
) -> tuple[int, ...]:
    height, width = logits.shape[2:]
    accepted = f"size must be (H, W) with H of at least {height} and W of at least {width}"
    if not isinstance(size, Sequence):
        raise TypeError(f"{accepted}; got {size!r} of type {type(size).__name__}")
    found = tuple(size)
    if not all(isinstance(side, (int, torch.SymInt)) for side in found):
        raise TypeError(f"{accepted}, which are integers; got {found}")
    if len(found) != 2 or found[0] < height or found[1] < width:
        raise ValueError(f"{accepted}; got {found}")
    if upsample is None and found != (height, width):
        raise ValueError(f'size must be {(height, width)} without upsample="bilinear"; got {found}')
    return found


# --- module ---------------------------------------------------------------------------------------


class ConfusionMatrix(nn.Module):
    """The confusion matrix of all pixels so far, added up on their device without waiting for it.

    Args:
        num_classes: C; 2 for logits of one channel.
        upsample, align_corners, ignore_index: as in :func:`tritonloss.confusion_matrix`.

    Attributes:
        matrix: int64 [C, C], a buffer that is not saved with the weights.

    Raises:
        TypeError, ValueError: as :func:`tritonloss.confusion_matrix`.

    Example:
        >>> import torch, tritonloss
        >>> metric = tritonloss.metrics.ConfusionMatrix(19)
        >>> for _ in range(3):
        ...     metric.update(torch.randn(1, 19, 32, 64), torch.randint(0, 19, (1, 32, 64)))
        >>> int(metric.compute().sum()), tritonloss.metrics.mean_iou(metric.compute()).shape
        (6144, torch.Size([]))
    """

    matrix: torch.Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        upsample: str | None = None,
        align_corners: bool = False,
        ignore_index: int | None = checks.IGNORE_INDEX,
    ) -> None:
        super().__init__()
        checks.check_positive("num_classes", num_classes)
        _check_options(num_classes, upsample, align_corners, ignore_index)
        checks.check_ignore_index(ignore_index, num_classes)
        self.num_classes = num_classes
        self.upsample = upsample
        self.align_corners = align_corners
        self.ignore_index = ignore_index
        empty = torch.zeros((num_classes, num_classes), dtype=torch.int64)
        self.register_buffer("matrix", empty, persistent=False)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> None:
        """The same as :meth:`update`."""
        self.update(logits, target)

    def update(self, logits: torch.Tensor, target: torch.Tensor) -> None:
        """Count the pixels of a batch: logits or predicted labels, and labels."""
        found = confusion_matrix(
            logits,
            target,
            num_classes=self.num_classes,
            upsample=self.upsample,
            align_corners=self.align_corners,
            ignore_index=self.ignore_index,
        )
        if found.device != self.matrix.device:  # with the first batch
            self.matrix = self.matrix.to(found.device)
        self.matrix += found

    def compute(self) -> torch.Tensor:
        """The matrix so far, int64 [C, C]; a copy, which later batches leave alone."""
        return self.matrix.clone()

    def reset(self) -> None:
        """Forget all pixels."""
        self.matrix.zero_()

    def all_reduce(self, process_group: ProcessGroup | None = None) -> None:
        """Add up the matrices of all ranks, so that each has the sum; every rank must call.

        Once: whoever counts on afterwards and adds up again counts the first pixels several times.

        Args:
            process_group: its ranks, or None for all.
        """
        device = self.matrix.device
        if get_backend(process_group) == "nccl" and device.type != "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
        message = self.matrix.to(device)
        all_reduce(message, group=process_group)
        self.matrix.copy_(message)

    def extra_repr(self) -> str:
        """The options, for printing."""
        return (
            f"num_classes={self.num_classes}, upsample={self.upsample!r}, "
            f"align_corners={self.align_corners}, ignore_index={self.ignore_index}"
        )


def _logits_alone(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (logits,)


def _half_resolution_and_size(logits: torch.Tensor, target: torch.Tensor) -> tuple[Any, ...]:
    return half_resolution_and_target(logits, target)[0], target.shape[1:]


EXAMPLES = (
    Example("confusion_matrix", confusion_matrix, MATRIX),
    Example(
        "confusion_matrix, upsampled",
        confusion_matrix,
        MATRIX,
        {"upsample": "bilinear"},
        arguments=half_resolution_and_target,
    ),
    Example("predict", predict, PREDICTION, arguments=_logits_alone),
    Example("predict, upsampled", predict, PREDICTION, arguments=_half_resolution_and_size),
)

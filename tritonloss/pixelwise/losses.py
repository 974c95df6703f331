"""Pixelwise losses: cross entropy, binary cross entropy and focal loss, one value per pixel.

With p = softmax(z) and t the pixel's label:

    cross entropy           -w_t log p_t                      dz_k = w_t (p_k - y_k)
    binary cross entropy    sum_k bce(z_k, y_k)               dz_k = sigmoid(z_k) - y_k
    focal loss              -a_t (1 - p_t)^gamma log p_t      dz_k = a_t g(p_t) (p_k - y_k)

Bytes per pass, L of logits and T of labels: forward L + T; backward 2 L + T. The softmax losses
leave the largest logit and the logarithm of the sum to the backward pass, 6 or 8 bytes per pixel
(16 for float64), binary cross entropy nothing. The gradient is the only map with classes in memory.
"""

from __future__ import annotations

import numbers
from typing import Any, NamedTuple

import torch
from torch import nn

from kernels_reference.pixelwise import (
    binary_cross_entropy as binary_cross_entropy_reference,
)
from kernels_reference.pixelwise import cross_entropy as cross_entropy_reference
from kernels_reference.pixelwise import focal_loss as focal_loss_reference

from .._core import checks
from .._core.backend import serves_triton
from .._core.configurations import Launch, Shape, TuningCase
from .._core.operator import Operator
from .._core.tuning_inputs import random_labels, random_map
from .._engine.pixel_launch import (
    REDUCTIONS,
    Loss,
    Results,
    compute_dtype,
    empty_results,
    launch_backward,
    launch_forward,
    pixel_cases,
)
from . import kernels
from .kernels import Options

# --- launchers ------------------------------------------------------------------------------------


def _softmax_saves(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """The largest logit, which is one of the logits, and log2 of the sum."""
    return dtype, compute_dtype(dtype)


def _saves_nothing(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    return ()


LOSSES = {
    "cross_entropy": Loss(
        name="cross_entropy",
        forward=kernels.cross_entropy_forward,
        backward=kernels.cross_entropy_backward,
        saved=_softmax_saves,
    ),
    "binary_cross_entropy": Loss(
        name="binary_cross_entropy",
        forward=kernels.binary_cross_entropy_forward,
        backward=kernels.binary_cross_entropy_backward,
        saved=_saves_nothing,
        unroll=16,  # one logarithm each
        binary=True,
    ),
    "focal": Loss(
        name="focal",
        forward=kernels.focal_forward,
        backward=kernels.focal_backward,
        saved=_softmax_saves,
    ),
}


def _pixelwise_forward(
    name: str,
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    options: Options,
    reduction: str,
    ignore_index: int | None,
    save: bool,
) -> Results:
    """The loss called ``name``, and what its backward pass needs if ``save``."""
    return launch_forward(
        LOSSES[name], logits, target, (weight, None), options.numbers, options.compiled, reduction,
        ignore_index, save,
    )  # fmt: skip


def _pixelwise_backward(
    name: str,
    upstream: torch.Tensor,
    results: Results,
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    options: Options,
    ignore_index: int | None,
) -> torch.Tensor:
    """The gradient of the logits under an upstream gradient [] or [N, H, W]."""
    return launch_backward(
        LOSSES[name], upstream, results, logits, target, (weight, None), options.numbers,
        options.compiled, ignore_index,
    )  # fmt: skip


def tuning_cases() -> list[TuningCase]:
    """What ``python -m tritonloss tune`` measures for this slice."""
    return pixel_cases(list(LOSSES.values()), _tuning_pass)


def _tuning_pass(
    loss: Loss, dtype: torch.dtype, shape: Shape, layout: str, device: torch.device
) -> Launch:
    logits = random_map(shape, layout, dtype, device).sub_(0.5).mul_(8)
    target = random_labels(shape, device)
    options = Options(weighted=False, smoothing=0.0, gamma=2.0, detached=False)
    name = loss.name

    def both_passes() -> tuple[torch.Tensor, torch.Tensor]:
        results = _pixelwise_forward(name, logits, target, None, options, "mean", 255, save=True)
        upstream = torch.ones_like(results.loss)
        gradient = _pixelwise_backward(name, upstream, results, logits, target, None, options, 255)
        return results.loss, gradient

    return both_passes


# --- operators ------------------------------------------------------------------------------------


class CallOptions(NamedTuple):
    """The options of all losses of this file, as they pass through the operators."""

    reduction: str
    ignore_index: int | None
    smoothing: float = 0.0
    gamma: float = 0.0
    detached: bool = False

    def of_kernels(self, weight: torch.Tensor | None) -> Options:
        """What the device functions take."""
        return Options(weight is not None, self.smoothing, self.gamma, self.detached)


def _operator(loss: Loss) -> Operator:
    name = loss.name

    def forward(
        logits: torch.Tensor,
        target: torch.Tensor,
        weight: torch.Tensor | None,
        options: CallOptions,
        save: bool,
    ) -> Results:
        reduction, ignore_index = options.reduction, options.ignore_index
        return _pixelwise_forward(
            name, logits, target, weight, options.of_kernels(weight), reduction, ignore_index, save
        )

    def backward(
        grad_loss: torch.Tensor,
        scale: torch.Tensor,
        first: torch.Tensor,
        second: torch.Tensor,
        logits: torch.Tensor,
        target: torch.Tensor,
        weight: torch.Tensor | None,
        options: CallOptions,
    ) -> torch.Tensor:
        return _pixelwise_backward(
            name, grad_loss, Results(scale, scale, first, second), logits, target, weight,
            options.of_kernels(weight), options.ignore_index,
        )  # fmt: skip

    def allocate(
        logits: torch.Tensor, options: CallOptions, save: bool, **_: torch.Tensor | None
    ) -> Results:
        return empty_results(loss, logits, options.reduction, save)

    return Operator(
        name,
        forward=forward,
        backward=backward,
        allocate=allocate,
        results=Results,
        options=CallOptions,
    )


OPERATORS = {name: _operator(loss) for name, loss in LOSSES.items()}


# --- functions ------------------------------------------------------------------------------------


def _check(
    logits: torch.Tensor, target: torch.Tensor, reduction: str, ignore_index: int | None
) -> None:
    """The checks that all losses of this file share, but for the labels' range."""
    checks.check_logits(logits)
    checks.check_target(logits, target)
    _check_options(reduction, ignore_index, logits.size(1))


def _check_options(reduction: str, ignore_index: int | None, classes: int | None = None) -> None:
    checks.check_option("reduction", reduction, REDUCTIONS)
    checks.check_ignore_index(ignore_index, classes)


def _check_focal(
    gamma: float, alpha: float | torch.Tensor | None, detach_weight: bool, logits: Any = None
) -> None:
    """The focal loss's own options; without ``logits``, for any number of classes."""
    checks.check_range("gamma", gamma, 0.0, 100.0)
    checks.check_flag("detach_weight", detach_weight)
    if isinstance(alpha, (int, float, numbers.Real)):
        checks.check_range("alpha", alpha, 0.0, 1e6)
    else:
        checks.check_class_weights("alpha", alpha, logits, or_number="a number in [0, 1e6], ")


def _call(
    name: str,
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    reduction: str,
    ignore_index: int | None,
    *,
    smoothing: float = 0.0,
    gamma: float = 0.0,
    detached: bool = False,
) -> torch.Tensor:
    # The weights get no gradient.
    weight = None if weight is None else weight.detach()
    ignored = None if ignore_index is None else int(ignore_index)
    options = CallOptions(reduction, ignored, float(smoothing), float(gamma), detached)
    return OPERATORS[name](logits, target, weight, options=options)[0]


def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    weight: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int | None = checks.IGNORE_INDEX,
    reduction: str = "mean",
) -> torch.Tensor:
    """Cross entropy of the softmax, as :func:`torch.nn.functional.cross_entropy` defines it.

    Of a pixel with the label t, with smoothing s and C classes:

        (1 - s) w_t (-log p_t) + (s / C) sum_k w_k (-log p_k)

    The mean divides by the sum of w_t over valid pixels. The one exception to torch's definition:
    if no pixel is valid the mean is 0 with zero gradient, not NaN.

    Under an ignored pixel a logit that is not finite changes nothing. Elsewhere NaN and
    infinity make their pixel's loss NaN, and the gradient of all of its classes; -infinity is a
    probability of 0.

    Args:
        logits: [N, C, H, W] with C >= 2, float16, bfloat16 or float32 (or float64), any strides.
        target: integer labels [N, H, W], uint8 to int64.
        weight: a weight for each class, floating-point [C], or None for 1. It gets no gradient.
        label_smoothing: s, in [0, 1]. Default 0.
        ignore_index: label of pixels that take part in nothing, any integer or None. Default 255,
            which has to be given where there are more than 255 classes and it is one of them. Other
            labels outside [0, C) raise on the CPU; on a GPU, where looking would synchronise, they
            count as ignored unless TRITONLOSS_CHECK_LABELS=1 is set.
        reduction: "mean" (default), "sum", or "none": [N, H, W], zero at ignored pixels.

    Returns:
        The loss in float32 (float64 for float64 logits). The gradient has the dtype of the logits.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes do not match, an option is out of range, or a label is (see
            ignore_index).

    Reference:
        Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", Section 7 (the
        smoothing).

    Example:
        >>> import torch
        >>> from tritonloss.functional import cross_entropy
        >>> logits = torch.randn(2, 19, 32, 64, requires_grad=True)
        >>> target = torch.randint(0, 19, (2, 32, 64))
        >>> cross_entropy(logits, target, label_smoothing=0.1).backward()
        >>> logits.grad.shape
        torch.Size([2, 19, 32, 64])
    """
    _check(logits, target, reduction, ignore_index)
    checks.check_classes(logits)
    checks.check_class_weights("weight", weight, logits)
    checks.check_range("label_smoothing", label_smoothing, 0.0, 1.0)
    checks.check_labels_in_range(target, logits.size(1), ignore_index)
    if not serves_triton(logits):
        return cross_entropy_reference(
            logits,
            target,
            weight=weight,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            reduction=reduction,
        )
    return _call(
        "cross_entropy", logits, target, weight, reduction, ignore_index, smoothing=label_smoothing
    )


def binary_cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    pos_weight: torch.Tensor | None = None,
    ignore_index: int | None = checks.IGNORE_INDEX,
    reduction: str = "mean",
) -> torch.Tensor:
    """Binary cross entropy of one sigmoid per class against the rest, from integer labels.

    Of a pixel with the label t, summed over classes:

        w_t softplus(-z_t) + sum over k != t of softplus(z_k)

    which is torch's ``binary_cross_entropy_with_logits`` of the one-hot label. The mean is over
    valid pixels. With one class the labels are 1 where the class is and 0 where it is not.

    Under an ignored pixel a logit that is not finite changes nothing. Elsewhere NaN makes its
    pixel's loss NaN, and its own gradient; an infinite logit is a probability of 0 or 1, and
    makes the loss infinite where that is wrong.

    Args:
        logits: [N, C, H, W] with C >= 1, float16, bfloat16 or float32 (or float64), any strides.
        target: integer labels [N, H, W], uint8 to int64: 0 to C - 1, or 0 and 1 if C is 1.
        pos_weight: w, a weight for the positive term of each class, floating-point [C], or None for
            1. It gets no gradient.
        ignore_index: label of pixels that take part in nothing, any integer or None. Default 255,
            which has to be given where there are more than 255 classes and it is one of them. Other
            labels out of range raise on the CPU; on a GPU, where looking would synchronise, they
            count as ignored unless TRITONLOSS_CHECK_LABELS=1 is set.
        reduction: "mean" (default), "sum", or "none": [N, H, W], zero at ignored pixels.

    Returns:
        The loss in float32 (float64 for float64 logits); the mean is 0 with zero gradient if no
        pixel is valid. The gradient has the dtype of the logits.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes do not match, an option is out of range, or a label is (see
            ignore_index).

    Reference:
        :func:`torch.nn.functional.binary_cross_entropy_with_logits`.

    Example:
        >>> import torch
        >>> from tritonloss.functional import binary_cross_entropy
        >>> logits = torch.randn(2, 1, 32, 64)
        >>> target = torch.randint(0, 2, (2, 32, 64))
        >>> binary_cross_entropy(logits, target, reduction="none").shape
        torch.Size([2, 32, 64])
    """
    _check(logits, target, reduction, ignore_index)
    checks.check_class_weights("pos_weight", pos_weight, logits)
    checks.check_labels_in_range(target, checks.labels_of(logits), ignore_index)
    if not serves_triton(logits):
        return binary_cross_entropy_reference(
            logits, target, pos_weight=pos_weight, ignore_index=ignore_index, reduction=reduction
        )
    return _call("binary_cross_entropy", logits, target, pos_weight, reduction, ignore_index)


def focal_loss(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    gamma: float = 2.0,
    alpha: float | torch.Tensor | None = None,
    detach_weight: bool = False,
    ignore_index: int | None = checks.IGNORE_INDEX,
    reduction: str = "mean",
) -> torch.Tensor:
    """Focal loss of the softmax: cross entropy that turns away from pixels it has learnt.

    Of a pixel with the label t:

        -a_t (1 - p_t)^gamma log p_t

    The mean is over valid pixels, whatever their a_t.

    Under an ignored pixel a logit that is not finite changes nothing. Elsewhere NaN and
    infinity make their pixel's loss NaN, and the gradient of all of its classes; -infinity is a
    probability of 0, and as the pixel's own class makes the loss infinite.

    Args:
        logits: [N, C, H, W] with C >= 2, float16, bfloat16 or float32 (or float64), any strides.
        target: integer labels [N, H, W], uint8 to int64.
        gamma: how steeply the weight falls, 0 to 100. Default 2; 0 is cross entropy.
        alpha: a, a factor for each class, floating-point [C], one number in [0, 1e6] for all of
            them, or None for 1. It gets no gradient.
        detach_weight: True holds (1 - p_t)^gamma constant in the gradient. Default False: the full
            gradient.
        ignore_index: label of pixels that take part in nothing, any integer or None. Default 255,
            which has to be given where there are more than 255 classes and it is one of them. Other
            labels outside [0, C) raise on the CPU; on a GPU, where looking would synchronise, they
            count as ignored unless TRITONLOSS_CHECK_LABELS=1 is set.
        reduction: "mean" (default), "sum", or "none": [N, H, W], zero at ignored pixels.

    Returns:
        The loss in float32 (float64 for float64 logits); the mean is 0 with zero gradient if no
        pixel is valid. The gradient has the dtype of the logits.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes do not match, an option is out of range, or a label is (see
            ignore_index).

    Reference:
        Lin et al., "Focal Loss for Dense Object Detection", Eq. 5, over the softmax.

    Example:
        >>> import torch
        >>> from tritonloss.functional import focal_loss
        >>> logits = torch.randn(2, 19, 32, 64)
        >>> focal_loss(logits, torch.randint(0, 19, (2, 32, 64)), gamma=1.5).shape
        torch.Size([])
    """
    _check(logits, target, reduction, ignore_index)
    checks.check_classes(logits)
    _check_focal(gamma, alpha, detach_weight, logits)
    if alpha is not None and not isinstance(alpha, torch.Tensor):
        dtype = compute_dtype(logits.dtype)
        alpha = torch.full((logits.size(1),), float(alpha), dtype=dtype, device=logits.device)
    checks.check_labels_in_range(target, logits.size(1), ignore_index)
    if not serves_triton(logits):
        return focal_loss_reference(
            logits,
            target,
            gamma=float(gamma),
            alpha=alpha,
            detach_weight=detach_weight,
            ignore_index=ignore_index,
            reduction=reduction,
        )
    return _call(
        "focal", logits, target, alpha, reduction, ignore_index, gamma=gamma, detached=detach_weight
    )


# --- modules --------------------------------------------------------------------------------------


class CrossEntropyLoss(nn.Module):
    """:func:`tritonloss.functional.cross_entropy` as a module; ``weight`` is a buffer.

    Args: the keyword arguments of the function, with the same defaults.

    Example:
        >>> import torch, tritonloss
        >>> criterion = tritonloss.CrossEntropyLoss(label_smoothing=0.1)
        >>> criterion(torch.randn(2, 19, 32, 64), torch.randint(0, 19, (2, 32, 64))).shape
        torch.Size([])
    """

    weight: torch.Tensor | None

    def __init__(
        self,
        *,
        weight: torch.Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int | None = checks.IGNORE_INDEX,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        _check_options(reduction, ignore_index)
        checks.check_class_weights("weight", weight, None)
        checks.check_range("label_smoothing", label_smoothing, 0.0, 1.0)
        self.register_buffer("weight", weight)
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.reduction = reduction

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Logits [N, C, H, W], target [N, H, W] -> scalar, or [N, H, W]."""
        return cross_entropy(
            logits,
            target,
            weight=self.weight,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """The options, for printing."""
        return (
            f"weight={_described(self.weight)}, label_smoothing={self.label_smoothing}, "
            f"ignore_index={self.ignore_index}, reduction={self.reduction!r}"
        )


class BinaryCrossEntropyLoss(nn.Module):
    """:func:`tritonloss.functional.binary_cross_entropy` as a module; ``pos_weight`` is a buffer.

    Args: the keyword arguments of the function, with the same defaults.

    Example:
        >>> import torch, tritonloss
        >>> criterion = tritonloss.BinaryCrossEntropyLoss(pos_weight=torch.tensor([2.0]))
        >>> criterion(torch.randn(2, 1, 32, 64), torch.randint(0, 2, (2, 32, 64))).shape
        torch.Size([])
    """

    pos_weight: torch.Tensor | None

    def __init__(
        self,
        *,
        pos_weight: torch.Tensor | None = None,
        ignore_index: int | None = checks.IGNORE_INDEX,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        _check_options(reduction, ignore_index)
        checks.check_class_weights("pos_weight", pos_weight, None)
        self.register_buffer("pos_weight", pos_weight)
        self.ignore_index = ignore_index
        self.reduction = reduction

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Logits [N, C, H, W], target [N, H, W] -> scalar, or [N, H, W]."""
        return binary_cross_entropy(
            logits,
            target,
            pos_weight=self.pos_weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """The options, for printing."""
        return (
            f"pos_weight={_described(self.pos_weight)}, ignore_index={self.ignore_index}, "
            f"reduction={self.reduction!r}"
        )


class FocalLoss(nn.Module):
    """:func:`tritonloss.functional.focal_loss` as a module; a tensor ``alpha`` is a buffer.

    Args: the keyword arguments of the function, with the same defaults.

    Example:
        >>> import torch, tritonloss
        >>> criterion = tritonloss.FocalLoss(gamma=2.0, alpha=0.25)
        >>> criterion(torch.randn(2, 19, 32, 64), torch.randint(0, 19, (2, 32, 64))).shape
        torch.Size([])
    """

    alpha: float | torch.Tensor | None

    def __init__(
        self,
        *,
        gamma: float = 2.0,
        alpha: float | torch.Tensor | None = None,
        detach_weight: bool = False,
        ignore_index: int | None = checks.IGNORE_INDEX,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        _check_options(reduction, ignore_index)
        _check_focal(gamma, alpha, detach_weight)
        self.gamma = gamma
        if isinstance(alpha, torch.Tensor):
            self.register_buffer("alpha", alpha)
        else:
            self.alpha = alpha
        self.detach_weight = detach_weight
        self.ignore_index = ignore_index
        self.reduction = reduction

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Logits [N, C, H, W], target [N, H, W] -> scalar, or [N, H, W]."""
        return focal_loss(
            logits,
            target,
            gamma=self.gamma,
            alpha=self.alpha,
            detach_weight=self.detach_weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """The options, for printing."""
        return (
            f"gamma={self.gamma}, alpha={_described(self.alpha)}, "
            f"detach_weight={self.detach_weight}, ignore_index={self.ignore_index}, "
            f"reduction={self.reduction!r}"
        )


def _described(option: float | torch.Tensor | None) -> str:
    """An option in short: of a tensor its shape."""
    return f"tensor{tuple(option.shape)}" if isinstance(option, torch.Tensor) else repr(option)

"""A weighted sum of losses as one module, with as few reads of the logits as there can be.

Pixelwise losses and losses of overlap share one read going forward, and one read and write going
back (``joint_kernels.py``), of interpolated logits as well (``class_cells.py``); bytes and memory
are those of one of them. Others, such as the Lovász loss, RMI and SSL, are calls of their own.
Their gradients are there first, and what shares a read is added to them in place, so that one of
them takes no second gradient.
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from .._core.backend import serves_triton
from .._core.configurations import Launch, TuningCase
from .._core.example import Example, half_resolution_and_target
from .._core.loss_module import LossModule
from .._core.operator import can_reuse, is_transformed
from .._core.tuning_inputs import random_labels, random_map
from .._engine.joint_operator import WEIGHTED_SUM, Options, weighted_sum
from .._engine.joint_terms import described, grouped
from .._engine.pixel_tuning import pixel_candidates
from ..overlap.dice import DiceLoss
from ..overlap.lovasz import LovaszSoftmaxLoss
from ..overlap.probabilities import LOSSES
from ..overlap.scores import DICE
from . import cross_entropy, focal_loss
from .binary_cross_entropy import BinaryCrossEntropyLoss
from .cross_entropy import CrossEntropyLoss
from .focal_loss import FocalLoss

Weight = float | torch.Tensor


class WeightedSum(nn.Module):
    """The sum of losses, each times its weight, as one loss.

    Weights are numbers on the device of the logits, so that a schedule may set them between steps:
    ``criterion.weights = (1.0, 0.3)`` neither compiles anything anew nor waits for the device. What
    the losses were in the latest call, without their weights, is in ``criterion.terms``, [losses]
    and detached, for logging.

    One read of the logits going forward, and one read and write going back, are shared by

    - pixelwise losses (cross entropy, binary cross entropy, focal loss, margin calibration) of one
      ``reduction``, up to four of them, or three beside losses of overlap;
    - losses of overlap (dice, generalised dice, Tversky, soft IoU) of one ``activation``, any
      number of them, of images, sequences or volumes, each with a process group or without.

    They have to ignore the same label, to have the same ``align_corners`` if logits are
    interpolated, and more than one loss of margin calibration takes a read of its own. With
    ``upsample`` a loss of overlap of a softmax goes through the logits once more before the
    gradient, and takes 4 bytes per pixel of the labels for the time of the backward pass. Every
    other loss has a read of its own: a Lovasz loss reads the logits twice going forward, and once
    going back. There the gradient of the first of those alone is what the others are added to; each
    further one of them takes a gradient of its own for a moment. Under torch.compile it is Inductor
    that adds gradients up.

    Args:
        members: pairs of a weight, a finite number or a tensor without dimensions, and a loss of
            this package as a module. A ``reduction`` has to be "mean" or "sum". Weights get no
            gradient.

    Attributes:
        losses: the losses, in their order.
        weights: [losses], float64; a buffer, which goes to the device of the logits, and keeps its
            dtype under ``.half()``. It can be set to as many numbers or tensors.
        terms: [losses], the losses of the latest call, or None before the first. Neither
            torch.export nor a transform of torch.func sets it.

    Raises:
        TypeError: a member is no such pair.
        ValueError: there is no member, a weight is not finite, or a reduction is "none".

    Example:
        >>> import torch, tritonloss
        >>> criterion = tritonloss.WeightedSum(
        ...     [(1.0, tritonloss.CrossEntropyLoss()), (0.5, tritonloss.DiceLoss())]
        ... )
        >>> logits = torch.randn(2, 19, 32, 64, requires_grad=True)
        >>> criterion(logits, torch.randint(0, 19, (2, 32, 64))).backward()
        >>> criterion.terms.shape
        torch.Size([2])
        >>> criterion.weights = (1.0, 0.25)
    """

    _weights: torch.Tensor
    terms: torch.Tensor | None

    def __init__(self, members: Sequence[tuple[Weight, LossModule]]) -> None:
        super().__init__()
        weights, losses = _checked_members(members)
        self.losses = nn.ModuleList(losses)
        self.register_buffer("_weights", torch.zeros(len(losses), dtype=torch.float64))
        self.terms = None
        self._fill(weights)

    @property
    def weights(self) -> torch.Tensor:
        """The weights, [losses]."""
        return self._weights

    @weights.setter
    def weights(self, weights: Iterable[Weight]) -> None:
        if not isinstance(weights, Iterable):
            raise TypeError(
                f"weights must be a sequence of numbers; got {weights!r} "
                f"of type {type(weights).__name__}"
            )
        given = list(weights)
        if len(given) != len(self.losses):
            raise ValueError(
                f"weights must be as many as there are losses, {len(self.losses)}; got {len(given)}"
            )
        for place, weight in enumerate(given):
            _check_weight(f"weights[{place}]", weight)
        self._fill(given)

    def _fill(self, weights: Iterable[Weight]) -> None:
        """Write the weights in place, without waiting for the device."""
        with torch.no_grad():
            for place, weight in enumerate(weights):
                self._weights[place] = weight

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The sum for logits [N, C, H, W] and labels [N, H, W]: a scalar."""
        if not isinstance(logits, torch.Tensor):
            raise TypeError(f"logits must be a tensor; got {type(logits).__name__}")
        for place, loss in enumerate(self.losses):
            _check_reduction(place, loss)
        if self._weights.device != logits.device:
            self._weights = self._weights.to(logits.device)
        if serves_triton(logits):
            total, terms = self._shared(logits, target)
        else:
            values = {i: loss(logits, target) for i, loss in enumerate(self.losses)}
            total, terms = self._sum_of(values), _stacked(values)
        if not (is_transformed() or torch.compiler.is_exporting()):
            self.terms = terms
        return total

    def _apply(self, fn: Any, recurse: bool = True) -> WeightedSum:
        """Weights go to another device, but keep their digits where others change their dtype."""
        weights = self._weights
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._weights = weights.to(self._weights.device)
        return self

    def _sum_of(self, values: dict[int, torch.Tensor]) -> torch.Tensor:
        """The weighted sum of some of the losses, by their numbers."""
        total: torch.Tensor | None = None
        for place, value in values.items():
            part = value * self._weights[place].to(value.dtype)
            total = part if total is None else total + part
        assert total is not None
        return total

    def _shared(
        self, logits: torch.Tensor, target: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(the sum, all losses), of losses that share a read where they can."""
        members: list[Any] = list(self.losses)
        parts = [loss.part(logits, target) for loss in members]
        losses = [None if part is None else described(part.slice, part.options) for part in parts]
        first = next((part for part in parts if part is not None), None)
        groups = [[i] for i in range(len(parts))]
        if first is not None:
            groups = grouped(losses, first.logits, first.target)
        alone = [group[0] for group in groups if len(group) == 1]
        groups = [group for group in groups if len(group) > 1]
        # Others' gradients are added to only if all of them are new: a user's own loss may return
        # one that something else holds, too.
        ours = all(type(self.losses[i]).forward is LossModule.forward for i in alone)
        given = logits
        values: dict[int, torch.Tensor] = {}
        total: torch.Tensor | None = None
        for number, group in enumerate(groups, 1):
            together = [parts[i] for i in group]
            chosen = [part for part in together if part is not None]
            is_last = number == len(groups) and not alone
            is_image = chosen[0].logits is given
            chained = ours and is_image and not is_last and can_reuse(logits)
            image = logits if is_image else chosen[0].logits
            result, terms, passed = weighted_sum(chosen, image, self._weights, group, chained)
            logits = logits if passed is None else passed
            total = result if total is None else total + result
            if group == list(range(len(parts))):
                return total, terms.detach()
            values |= dict(zip(group, terms.unbind(), strict=True))
        others = {i: self.losses[i](logits, target) for i in alone}
        if others:
            rest = self._sum_of(others)
            total = rest if total is None else total + rest
        assert total is not None
        return total, _stacked(values | others)

    def extra_repr(self) -> str:
        """The weights, for printing."""
        return f"weights={self._weights.tolist()}"


def _stacked(values: dict[int, torch.Tensor]) -> torch.Tensor:
    """The losses in the order of their numbers, detached."""
    return torch.stack([values[place].detach() for place in range(len(values))])


def _checked_members(members: Any) -> tuple[list[Weight], list[LossModule]]:
    """(weights, losses) of pairs."""
    if not isinstance(members, Sequence) or isinstance(members, str):
        raise TypeError(
            "members must be a sequence of pairs (weight, loss); "
            f"got {members!r} of type {type(members).__name__}"
        )
    if not members:
        raise ValueError("members must have at least one pair (weight, loss); got none")
    weights, losses = [], []
    for place, member in enumerate(members):
        if not isinstance(member, Sequence) or len(member) != 2:
            raise TypeError(f"members[{place}] must be a pair (weight, loss); got {member!r}")
        weight, loss = member
        _check_weight(f"members[{place}][0]", weight)
        if not isinstance(loss, LossModule):
            raise TypeError(
                f"members[{place}][1] must be a loss of tritonloss as a module; "
                f"got {loss!r} of type {type(loss).__name__}"
            )
        _check_reduction(place, loss)
        weights.append(weight)
        losses.append(loss)
    return weights, losses


def _check_weight(name: str, weight: Any) -> None:
    """A weight is a finite number or a tensor without dimensions, whose value nobody looks at."""
    if isinstance(weight, torch.Tensor):
        if weight.dim() or weight.is_complex():
            raise ValueError(
                f"{name} must be a number or a real tensor without dimensions; "
                f"got {weight.dtype} of shape {tuple(weight.shape)}"
            )
        return
    if isinstance(weight, bool) or not isinstance(weight, numbers.Real):
        raise TypeError(
            f"{name} must be a number or a tensor without dimensions; "
            f"got {weight!r} of type {type(weight).__name__}"
        )
    if not math.isfinite(weight):
        raise ValueError(f"{name} must be finite; got {weight!r}")


def _check_reduction(place: int, loss: nn.Module) -> None:
    """A member is one number, so its reduction cannot be "none"."""
    if getattr(loss, "reduction", None) == "none":
        raise ValueError(
            f'reduction of losses[{place}], {type(loss).__name__}, must be "mean" or "sum", '
            'so that it can be a part of a sum; got "none"'
        )


# --- what tests and tools go through --------------------------------------------------------------


def tuning_cases() -> list[TuningCase]:
    """What ``python -m tritonloss tune`` measures: two sums, each in one read."""
    entropy = ("pixelwise.cross_entropy", cross_entropy.LOSS, cross_entropy.Options())
    dice = ("overlap.scores", LOSSES["softmax"], DICE)
    focal = ("pixelwise.focal_loss", focal_loss.LOSS, focal_loss.Options())
    return [
        TuningCase(
            f"{name}_{direction}",
            19,
            1,
            dtype,
            layout,
            functools.partial(_tuning_pass, words, dtype, layout),
            pixel_candidates(first[1], direction, dtype, 19, layout, second[1]),
        )
        for layout in ("contiguous", "channels_last", "strided")
        for dtype in (torch.float32, torch.bfloat16)
        for name, first, second in (("joint", dice, entropy), ("weighted_sum", focal, entropy))
        for words in (tuple(described(word, options) for word, _, options in (first, second)),)
        for direction in ("forward", "backward")
    ]


def _tuning_pass(
    words: Sequence[str], dtype: torch.dtype, layout: str, device: torch.device
) -> Launch:
    shape = (2, 19, 512, 512)
    logits = random_map(shape, layout, dtype, device).sub_(0.5).mul_(8)
    target = random_labels(shape, device)
    weights = torch.ones(2, dtype=torch.float64, device=device)
    options = Options("\n".join(words), [0, 1], [-1] * 4)

    def both_passes() -> tuple[torch.Tensor, ...]:
        return WEIGHTED_SUM.both_passes(logits, target, weights, None, options=options)

    return both_passes


def _entropy_and_dice(activation: str, per_image: bool, **between: Any) -> WeightedSum:
    entropy = CrossEntropyLoss if activation == "softmax" else BinaryCrossEntropyLoss
    dice = DiceLoss(activation=activation, per_image=per_image, **between)
    return WeightedSum([(1.0, entropy(**between)), (1.0, dice)])


def _focal_and_lovasz(per_image: bool) -> WeightedSum:
    lovasz = LovaszSoftmaxLoss(per_image=per_image)
    return WeightedSum([(0.5, FocalLoss()), (2.0, lovasz), (1.0, CrossEntropyLoss())])


_FLAGS = (False, True)
_ENTROPY_AND_DICE = {
    (activation, per_image, upsample, align_corners): _entropy_and_dice(
        activation, per_image, upsample=upsample, align_corners=align_corners
    )
    for activation in ("softmax", "sigmoid")
    for per_image in _FLAGS
    for upsample, align_corners in ((None, False), ("bilinear", False), ("bilinear", True))
}
_FOCAL_AND_LOVASZ = {per_image: _focal_and_lovasz(per_image) for per_image in _FLAGS}


def cross_entropy_and_dice(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    activation: str = "softmax",
    per_image: bool = False,
    upsample: str | None = None,
    align_corners: bool = False,
) -> torch.Tensor:
    """The sum of both losses: of a softmax, or of sigmoids."""
    criterion = _ENTROPY_AND_DICE[activation, per_image, upsample, align_corners]
    result: torch.Tensor = criterion(logits, target)
    return result


def focal_and_lovasz(
    logits: torch.Tensor, target: torch.Tensor, *, per_image: bool = False
) -> torch.Tensor:
    """A sum of which two losses share a read, and one is added to them."""
    result: torch.Tensor = _FOCAL_AND_LOVASZ[per_image](logits, target)
    return result


EXAMPLES = (
    Example("cross_entropy_and_dice", cross_entropy_and_dice, WEIGHTED_SUM),
    Example(
        "cross_entropy_and_dice, sigmoid",
        cross_entropy_and_dice,
        WEIGHTED_SUM,
        {"activation": "sigmoid"},
    ),
    Example(
        "cross_entropy_and_dice, per image",
        cross_entropy_and_dice,
        WEIGHTED_SUM,
        {"per_image": True},
    ),
    Example(
        "cross_entropy_and_dice, upsampled",
        cross_entropy_and_dice,
        WEIGHTED_SUM,
        {"upsample": "bilinear"},
        arguments=half_resolution_and_target,
    ),
    Example("focal_and_lovasz", focal_and_lovasz, WEIGHTED_SUM),
)

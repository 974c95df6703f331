"""A weighted sum of losses as one module, with as few reads of the logits as there can be.

Pixelwise losses and losses of overlap share one read going forward, and one read and write going
back (``joint_kernels.py``); bytes and memory are those of one of them. Others, such as the Lovász
loss, RMI and SSL, are calls of their own. Their gradients are there first, and what shares a read
is added to them in place, so that one of them takes no second gradient.
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from .._core.backend import serves_triton
from .._core.configurations import Launch, TuningCase
from .._core.example import Example
from .._core.loss_module import LossModule, Part
from .._core.operator import Operator, can_reuse, is_transformed
from .._core.tuning_inputs import random_labels, random_map
from .._engine.joint_launch import (
    JointResults,
    allocated,
    launch_joint,
    launch_joint_backward,
)
from .._engine.joint_terms import Joint, described, grouped, joint_of, stacked
from .._engine.pixel_tuning import pixel_candidates
from ..overlap.dice import DiceLoss
from ..overlap.lovasz import LovaszSoftmaxLoss
from ..overlap.probabilities import LOSSES
from ..overlap.scores import DICE
from . import cross_entropy
from .binary_cross_entropy import BinaryCrossEntropyLoss
from .cross_entropy import CrossEntropyLoss
from .focal_loss import FocalLoss

Weight = float | torch.Tensor


class Options(NamedTuple):
    """Which losses share the read."""

    losses: str  # in words, a line each
    places: Sequence[int]  # of their weights
    rows: Sequence[int]  # two each: of the own and the other table among the tables, or -1


class Results(NamedTuple):
    """What the operator returns."""

    loss: torch.Tensor  # []: the weighted sum
    terms: torch.Tensor  # [losses], without their weights
    scale: torch.Tensor | None
    table: torch.Tensor | None
    first: torch.Tensor | None  # maps for the backward pass, [N, H, W]
    second: torch.Tensor | None
    third: torch.Tensor | None
    fourth: torch.Tensor | None


class ChainedResults(NamedTuple):
    """What the operator returns that hands its logits on."""

    loss: torch.Tensor
    passed: torch.Tensor  # the logits, for losses whose gradients are there before this one's
    terms: torch.Tensor
    scale: torch.Tensor | None
    table: torch.Tensor | None
    first: torch.Tensor | None
    second: torch.Tensor | None
    third: torch.Tensor | None
    fourth: torch.Tensor | None


# --- operators ------------------------------------------------------------------------------------


def _joint(
    logits: torch.Tensor,
    target: torch.Tensor,
    weights: torch.Tensor | None,
    tables: torch.Tensor | None,
    options: Options,
    save: bool,
) -> Joint:
    """The losses as launchers take them; the backward pass needs no weights."""
    rows = [None if row < 0 or tables is None else tables[row] for row in options.rows]
    of_losses = list(zip(rows[::2], rows[1::2], strict=True))
    given = logits if weights is None else weights
    return joint_of(options.losses.split("\n"), of_losses, logits, target, given, options.places, save)


def _results(found: JointResults) -> Results:
    maps = (*found.maps, None, None, None, None)[:4]
    return Results(found.loss, found.terms, found.scale, found.table, *maps)


def _forward(
    logits: torch.Tensor,
    target: torch.Tensor,
    weights: torch.Tensor,
    tables: torch.Tensor | None,
    options: Options,
    save: bool,
) -> Results:
    joint = _joint(logits, target, weights, tables, options, save)
    return _results(launch_joint(joint, logits, target, save))


def _allocate(
    logits: torch.Tensor,
    target: torch.Tensor,
    weights: torch.Tensor,
    tables: torch.Tensor | None,
    options: Options,
    save: bool,
) -> Results:
    joint = _joint(logits, target, weights, tables, options, save)
    return _results(allocated(joint, logits, target, save))


def _backward(
    grad_loss: torch.Tensor,
    scale: Any,
    table: Any,
    first: Any,
    second: Any,
    third: Any,
    fourth: Any,
    logits: torch.Tensor,
    target: torch.Tensor,
    tables: torch.Tensor | None,
    options: Options,
) -> torch.Tensor:
    joint = _joint(logits, target, None, tables, options, True)
    kept = JointResults(grad_loss, grad_loss, scale, table, (first, second, third, fourth))
    return launch_joint_backward(joint, grad_loss, kept, logits, target)


WEIGHTED_SUM = Operator(
    "weighted_sum",
    forward=_forward,
    backward=_backward,
    allocate=_allocate,
    results=Results,
    options=Options,
    returned=2,
)


def _chained_forward(
    logits: torch.Tensor,
    target: torch.Tensor,
    weights: torch.Tensor,
    tables: torch.Tensor | None,
    options: Options,
    save: bool,
) -> ChainedResults:
    loss, *others = _forward(logits, target, weights, tables, options, save)
    return ChainedResults(loss, logits, *others)


def _chained_allocate(
    logits: torch.Tensor,
    target: torch.Tensor,
    weights: torch.Tensor,
    tables: torch.Tensor | None,
    options: Options,
    save: bool,
) -> ChainedResults:
    loss, *others = _allocate(logits, target, weights, tables, options, save)
    return ChainedResults(loss, torch.empty_like(logits), *others)


def _in_place(
    grad_loss: torch.Tensor,
    grad_passed: torch.Tensor,
    scale: Any,
    table: Any,
    first: Any,
    second: Any,
    third: Any,
    fourth: Any,
    logits: torch.Tensor,
    target: torch.Tensor,
    tables: torch.Tensor | None,
    options: Options,
) -> torch.Tensor:
    """The gradient, added to that of what the logits were passed on to."""
    joint = _joint(logits, target, None, tables, options, True)
    kept = JointResults(grad_loss, grad_loss, scale, table, (first, second, third, fourth))
    return launch_joint_backward(joint, grad_loss, kept, logits, target, grad_passed)


def _chained_backward(
    grad_loss: torch.Tensor,
    grad_passed: torch.Tensor,
    scale: Any,
    table: Any,
    first: Any,
    second: Any,
    third: Any,
    fourth: Any,
    logits: torch.Tensor,
    target: torch.Tensor,
    tables: torch.Tensor | None,
    options: Options,
) -> torch.Tensor:
    """The same where that gradient is not this one's to write into."""
    return _in_place(
        grad_loss, grad_passed.clone(), scale, table, first, second, third, fourth, logits, target,
        tables, options,
    )  # fmt: skip


# Where a backward pass may write into gradients that it is given, and nothing is traced.
_CHAINED = Operator(
    "weighted_sum_chained",
    forward=_chained_forward,
    backward=_chained_backward,
    allocate=_chained_allocate,
    results=ChainedResults,
    options=Options,
    returned=3,
    reuse=_in_place,
)


# --- module ---------------------------------------------------------------------------------------


class WeightedSum(nn.Module):
    """The sum of losses, each times its weight, as one loss.

    Weights are numbers on the device of the logits, so that a schedule may set them between steps:
    ``criterion.weights = (1.0, 0.3)`` neither compiles anything anew nor waits for the device. What
    the losses were in the latest call, without their weights, is in ``criterion.terms``, [losses]
    and detached, for logging.

    Args:
        members: pairs of a weight, a finite number or a tensor without dimensions, and a loss of
            this package as a module. A ``reduction`` has to be "mean" or "sum". Weights get no
            gradient.

    Attributes:
        losses: the losses, in their order.
        weights: [losses], float64; a buffer. It can be set to as many numbers or tensors.
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
        for place, loss in enumerate(self.losses):
            _check_reduction(place, loss)
        if self._weights.device != logits.device:
            self._weights = self._weights.to(logits.device)
        if serves_triton(logits):
            total, values = self._shared(logits, target)
        else:
            values = [loss(logits, target) for loss in self.losses]
            total = self._sum_of(dict(enumerate(values)))
        if not (is_transformed() or torch.compiler.is_exporting()):
            self.terms = torch.stack([value.detach() for value in values])
        return total

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
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(the sum, all losses), of losses that share a read where they can."""
        parts = [loss.part(logits, target) for loss in self.losses]
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
            chosen = [part for i in group if (part := parts[i]) is not None]
            is_last = number == len(groups) and not alone
            is_image = chosen[0].logits is given
            chained = ours and is_image and not is_last and can_reuse(logits)
            image = logits if is_image else chosen[0].logits
            result, terms, passed = _called(chosen, image, self._weights, group, chained)
            logits = logits if passed is None else passed
            total = result if total is None else total + result
            values |= dict(zip(group, terms.unbind(), strict=True))
        others = {i: self.losses[i](logits, target) for i in alone}
        if others:
            rest = self._sum_of(others)
            total = rest if total is None else total + rest
        assert total is not None
        values |= others
        return total, [values[i] for i in range(len(parts))]

    def extra_repr(self) -> str:
        """The weights, for printing."""
        return f"weights={self._weights.tolist()}"


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


def _called(
    parts: Sequence[Part],
    logits: torch.Tensor,
    weights: torch.Tensor,
    places: Sequence[int],
    chained: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(the weighted sum, all losses, the logits for others if chained) of losses of one read."""
    tables, rows = stacked([table for part in parts for table in part.tables], parts[0].logits)
    words = [described(part.slice, part.options) for part in parts]
    options = Options("\n".join(words), list(places), list(rows))
    target = parts[0].target
    if chained:
        loss, passed, terms = _CHAINED(logits, target, weights, tables, options=options)
        return loss, terms, passed
    loss, terms = WEIGHTED_SUM(logits, target, weights, tables, options=options)
    return loss, terms, None


# --- what tests and tools go through --------------------------------------------------------------


def tuning_cases() -> list[TuningCase]:
    """What ``python -m tritonloss tune`` measures: cross entropy and dice in one read."""
    losses = (LOSSES["softmax"], cross_entropy.LOSS)
    return [
        TuningCase(
            f"weighted_sum_{direction}",
            19,
            1,
            dtype,
            layout,
            functools.partial(_tuning_pass, dtype, layout),
            pixel_candidates(losses[0], direction, dtype, 19, layout, losses[1]),
        )
        for layout in ("contiguous", "channels_last", "strided")
        for dtype in (torch.float32, torch.bfloat16)
        for direction in ("forward", "backward")
    ]


def _tuning_pass(dtype: torch.dtype, layout: str, device: torch.device) -> Launch:
    shape = (2, 19, 512, 512)
    logits = random_map(shape, layout, dtype, device).sub_(0.5).mul_(8)
    target = random_labels(shape, device)
    weights = torch.ones(2, dtype=torch.float64, device=device)
    words = (
        described("pixelwise.cross_entropy", cross_entropy.Options()),
        described("overlap.scores", DICE),
    )
    options = Options("\n".join(words), [0, 1], [-1] * 4)

    def both_passes() -> tuple[torch.Tensor, ...]:
        return WEIGHTED_SUM.both_passes(logits, target, weights, None, options=options)

    return both_passes


_ENTROPY_AND_DICE = {
    "softmax": WeightedSum([(1.0, CrossEntropyLoss()), (1.0, DiceLoss())]),
    "sigmoid": WeightedSum([(1.0, BinaryCrossEntropyLoss()), (1.0, DiceLoss(activation="sigmoid"))]),
}
_FOCAL_AND_LOVASZ = WeightedSum(
    [(0.5, FocalLoss()), (2.0, LovaszSoftmaxLoss()), (1.0, CrossEntropyLoss())]
)


def cross_entropy_and_dice(
    logits: torch.Tensor, target: torch.Tensor, *, activation: str = "softmax"
) -> torch.Tensor:
    """The sum of both losses: of a softmax, or of sigmoids."""
    result: torch.Tensor = _ENTROPY_AND_DICE[activation](logits, target)
    return result


def focal_and_lovasz(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A sum of which two losses share a read, and one is added to them."""
    result: torch.Tensor = _FOCAL_AND_LOVASZ(logits, target)
    return result


EXAMPLES = (
    Example("cross_entropy_and_dice", cross_entropy_and_dice, WEIGHTED_SUM),
    Example(
        "cross_entropy_and_dice, sigmoid",
        cross_entropy_and_dice,
        WEIGHTED_SUM,
        {"activation": "sigmoid"},
    ),
    Example("focal_and_lovasz", focal_and_lovasz, WEIGHTED_SUM),
)

"""A weighted sum of losses as one module."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from .._core.loss_module import LossModule
from .._core.operator import is_transformed

Weight = float | torch.Tensor


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
        values = [loss(logits, target) for loss in self.losses]
        weights = self._weights.to(values[0].dtype)
        total = values[0] * weights[0]
        for place, value in enumerate(values[1:], 1):
            total = total + value * weights[place]
        if not (is_transformed() or torch.compiler.is_exporting()):
            self.terms = torch.stack([value.detach() for value in values])
        return total

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

"""Examples: every slice shows how its functions are called, and tests and tools go through them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from .loss_module import LossModule
from .operator import Operator


def logits_and_target(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The positional arguments (logits, target), which most losses take."""
    return logits, target


def half_resolution_and_target(
    logits: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """What losses that interpolate take: of the logits every second row and column."""
    return logits[..., ::2, ::2], target


@dataclass(frozen=True)
class Example:
    """A call of a public function, with options that show one way through its kernels.

    Attributes:
        name: the function's name, and what is special about the call.
        function: the public function.
        operator: the operator that the function calls.
        options: keyword arguments that suit images of a few pixels.
        module: the function as a module, if it is a loss.
        arguments: (logits, target) -> the positional arguments; logits have at least two classes.
        way: a context that the call is made in, where only that shows the kernels in question.
        binary: whether the function takes one channel alone, which ``arguments`` pick.
    """

    name: str
    function: Callable[..., Any]
    operator: Operator
    options: Mapping[str, Any] = field(default_factory=dict)
    module: type[LossModule] | None = None
    arguments: Callable[[torch.Tensor, torch.Tensor], tuple[Any, ...]] = logits_and_target
    way: Callable[[], AbstractContextManager[Any]] = nullcontext
    binary: bool = False

    def __call__(
        self, logits: torch.Tensor, target: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor, ...]:
        """The results, always as a tuple; options given here go before the example's own."""
        with self.way():
            results = self.function(*self.arguments(logits, target), **{**self.options, **options})
        return (results,) if isinstance(results, torch.Tensor) else tuple(results)

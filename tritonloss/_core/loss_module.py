"""Losses as modules: a function's options, checked and kept."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn


class Part(NamedTuple):
    """A call of a loss, checked, for those who put several of them into one read of the logits.

    Attributes:
        logits: the logits as an image.
        target: the labels likewise.
        slice: the module, below the package, whose ``MEMBER`` can share a read.
        options: the options of its operator.
        tables: what its operator takes beside logits and labels: a table of the classes, or None.
    """

    logits: torch.Tensor
    target: torch.Tensor
    slice: str
    options: Any
    tables: tuple[Any, ...]


class LossModule(nn.Module):
    """A loss's function as a module: the same options, checked when it is made.

    ``class SomeLoss(LossModule, function=some_loss, check=check_options)`` is all a module needs:
    its constructor takes what ``some_loss`` takes after ``logits`` and ``target``, and hands it by
    name to ``check_options``. A tensor becomes a buffer, everything else an attribute. With
    ``part``, which takes what ``some_loss`` takes and checks it, it is a loss that can share a read
    of the logits with others.
    """

    _function: ClassVar[Callable[..., Any]]
    _check: ClassVar[Callable[..., Any]]
    _part: ClassVar[Callable[..., Part] | None] = None
    _options: ClassVar[tuple[inspect.Parameter, ...]]

    def __init_subclass__(
        cls,
        *,
        function: Callable[..., Any] | None = None,
        check: Callable[..., Any] | None = None,
        part: Callable[..., Part] | None = None,
        **rest: Any,
    ) -> None:
        super().__init_subclass__(**rest)
        if function is None or check is None:  # a user's own subclass of a loss
            return
        cls._function, cls._check = staticmethod(function), staticmethod(check)
        cls._part = None if part is None else staticmethod(part)
        cls._options = tuple(inspect.signature(function).parameters.values())[2:]
        cls.__signature__ = inspect.Signature(cls._options)  # type: ignore[attr-defined]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__()
        bound = inspect.Signature(self._options).bind(*arguments, **options)
        bound.apply_defaults()
        self._check(**bound.arguments)
        for option in self._options:
            self._keep(option, bound.arguments[option.name])

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> Any:
        """What the function returns for logits [N, C, H, W]: a scalar, or a map [N, H, W]."""
        return self._function(logits, target, **self._all_kept())

    def part(self, logits: torch.Tensor, target: torch.Tensor) -> Part | None:
        """This call as a part of a sum; None if it cannot share a read with others."""
        # A user's own subclass may compute something else.
        if self._part is None or type(self).forward is not LossModule.forward:
            return None
        return self._part(logits, target, **self._all_kept())

    def extra_repr(self) -> str:
        """The options, for printing."""
        names = [option.name for option in self._options if hasattr(self, option.name)]
        return ", ".join(f"{name}={_described(getattr(self, name))}" for name in names)

    def _keep(self, option: inspect.Parameter, value: Any) -> None:
        """Keep an option's value under its name."""
        if isinstance(value, torch.Tensor) or option.annotation == "torch.Tensor | None":
            self.register_buffer(option.name, value)
        else:
            setattr(self, option.name, value)

    def _all_kept(self) -> dict[str, Any]:
        return {option.name: self._kept(option) for option in self._options}

    def _kept(self, option: inspect.Parameter) -> Any:
        """An option's value as the function takes it."""
        return getattr(self, option.name)


def _described(value: Any) -> str:
    """A value in short: a tensor is described by its shape."""
    return f"tensor{tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)

"""Custom operators of PyTorch, made of functions that take and return tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def signed(function: Any, arguments: dict[str, Any], returned: Any) -> None:
    """Give a function of ``*arguments`` the signature that torch.library reads a schema from."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(n, kind, annotation=t) for n, t in arguments.items()]
    function.__signature__ = inspect.Signature(parameters, return_annotation=returned)


def filled(results: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """The results with an empty tensor in every place where there is none."""
    there = next(result for result in results if result is not None)
    return tuple(there.new_empty(0) if result is None else result for result in results)


def several(count: int) -> Any:
    return tuple.__class_getitem__((Tensor,) * count)


def custom_operator(name: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    operator = torch.library.custom_op(f"tritonloss::{name}", function, mutates_args=())
    operator.register_fake(fake)
    return operator

"""A call that torch.compile does not look into. Importing this takes a second: see operator.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def _apply(function: Any, *arguments: Any) -> Any:
    return function.apply(*arguments)


# Not to be traced, not even where torch.compile has left the caller itself uncompiled.
apply: Callable[..., Any] = torch.compiler.disable(  # type: ignore[no-untyped-call]
    _apply,
    reason="tritonloss: transforms of torch.func cannot be compiled around a loss; use "
    "torch.compile inside of torch.func.grad, vjp or vmap, not around them",
)

"""One function on one case's tensors: forward, backward, both."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from perf.operations.contract import Case, Outputs

State = tuple[tuple[Tensor, ...], list[Tensor]]  # outputs, and the inputs that want a gradient


class Trial:
    """Calls a function as training does; inputs and upstream gradients are made beforehand."""

    def __init__(
        self, function: Callable[..., Outputs], case: Case, inputs: Sequence[Tensor]
    ) -> None:
        self._function = function
        self._options = case.options
        self._inputs = [x.detach() for x in inputs]
        self._upstream: list[Tensor] | None = None

    def forward(self) -> State:
        """The outputs with their graph."""
        arguments = [
            x.detach().requires_grad_() if x.is_floating_point() else x for x in self._inputs
        ]
        found = self._function(*arguments, **self._options)
        outputs = (found,) if isinstance(found, Tensor) else tuple(found)
        return outputs, [x for x in arguments if x.requires_grad]

    def backward(self, state: State) -> tuple[Tensor, ...]:
        """Gradients of the inputs; torch.autograd.grad adds to no buffer. None of what has none."""
        outputs, leaves = state
        if not any(output.requires_grad for output in outputs):
            return ()
        if self._upstream is None:
            self._upstream = [_upstream(index, output) for index, output in enumerate(outputs)]
        return torch.autograd.grad(outputs, leaves, self._upstream)

    def full(self) -> tuple[Tensor, ...]:
        """One step of training: forward and backward."""
        return self.backward(self.forward())

    def results(self) -> list[Tensor]:
        """Outputs, then gradients."""
        state = self.forward()
        return [output.detach() for output in state[0]] + list(self.backward(state))


def _upstream(index: int, output: Tensor) -> Tensor:
    """An output's gradient: random numbers from 0.5 to 1.5, the same for all providers and dtypes.

    With 1 everywhere a factor that is missing in a backward pass would not show.
    """
    values = torch.empty(output.shape, dtype=torch.float32, device=output.device)
    if output.device.type == "meta":
        return values.to(output.dtype)
    generator = torch.Generator(output.device).manual_seed(2 + index)
    return values.uniform_(0.5, 1.5, generator=generator).to(output.dtype)

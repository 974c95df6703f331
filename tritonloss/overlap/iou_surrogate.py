"""A network that learns the IoU loss from what a segmentation network gets right and wrong.

Of an image and a class there are three sums: of the probabilities of its true positives, its false
positives and its false negatives (NeuroIoU paper, equation 2). The IoU depends on how many pixels
these are, which has no derivative. A small network that has learnt it from the sums has one.

The paper leaves open how the network's inputs are scaled, and which function activates it. Sums are
divided by the pixels of an image here, and then by what is usual among the examples; both are part
of the network, and are saved with it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from kernels_reference.base import without_autocast

from .._core import checks
from .._core.progress import Progress

SCORES = ("probability", "hinge")
_ACTIVATIONS = ("tanh", "softplus")


class IoUPairs(NamedTuple):
    """Examples for :func:`fit_iou_surrogate`: one for every class that an image has.

    Attributes:
        sums: float32 [P, 3], over true positives, false positives and false negatives.
        counts: int64 [P, 3], how many pixels these are.
        pixels: int64 [P], of the image.
        score: what was summed up, "probability" or "hinge".
    """

    sums: torch.Tensor
    counts: torch.Tensor
    pixels: torch.Tensor
    score: str = "probability"

    def iou_loss(self) -> torch.Tensor:
        """The truth: 1 - TP / (TP + FP + FN), float32 [P]."""
        true_positives = self.counts[:, 0].double()
        return (1 - true_positives / self.counts.sum(1)).float()


class SurrogateFit(NamedTuple):
    """What :func:`fit_iou_surrogate` returns.

    Attributes:
        surrogate: the network, frozen.
        error: the root of its mean squared error on the examples it was not fitted to.
        truth: the IoU losses of these examples, float32 [H].
        predicted: what the network makes of them, float32 [H].
    """

    surrogate: IoUSurrogate
    error: float
    truth: torch.Tensor
    predicted: torch.Tensor


class IoUSurrogate(nn.Module):
    """A network that predicts the IoU loss of an image and a class (NeuroIoU paper, section 3.1).

    Args:
        inputs: 3, the sums over true positives, false positives and false negatives; or 6, the
            means over them as well (0 of none). Default 3.
        score: what is summed up. "probability" (default), or "hinge": max(0, 1 - s) of a pixel that
            has the class and max(0, 1 + s) of one that has not, s its logit (section 3.3).
        layers: hidden layers, default 4.
        nodes: of a hidden layer, default 100.
        activation: "tanh" (default) or "softplus", which are smooth: so is the gradient.

    Attributes:
        scale: [inputs], a buffer: what inputs are multiplied by. :func:`fit_iou_surrogate` sets it.

    Raises:
        TypeError, ValueError: an option has the wrong type, or is out of range.

    Example:
        >>> import torch, tritonloss
        >>> surrogate = tritonloss.IoUSurrogate()
        >>> sums, counts = torch.rand(2, 19, 3), torch.ones(2, 19, 3, dtype=torch.int64)
        >>> surrogate(sums, counts, 4096).shape
        torch.Size([2, 19])
    """

    scale: torch.Tensor

    def __init__(
        self,
        inputs: int = 3,
        *,
        score: str = "probability",
        layers: int = 4,
        nodes: int = 100,
        activation: str = "tanh",
    ) -> None:
        super().__init__()
        checks.check_integer("inputs", inputs, 3, 6)
        if inputs not in (3, 6):
            raise ValueError(f"inputs must be 3 or 6; got {inputs}")
        checks.check_option("score", score, SCORES)
        checks.check_option("activation", activation, _ACTIVATIONS)
        checks.check_positive("layers", layers)
        checks.check_positive("nodes", nodes)
        self.inputs, self.score = inputs, score
        self.layers, self.nodes, self.activation = layers, nodes, activation
        widths = [inputs] + [nodes] * layers + [1]
        self.linear = nn.ModuleList(
            nn.Linear(before, after) for before, after in zip(widths, widths[1:], strict=False)
        )
        self.register_buffer("scale", torch.ones(inputs))

    def forward(
        self, sums: torch.Tensor, counts: torch.Tensor, pixels: int | torch.Tensor
    ) -> torch.Tensor:
        """The predicted IoU losses.

        Args:
            sums: float32 [..., 3], over true positives, false positives and false negatives.
            counts: integers [..., 3], how many pixels these are.
            pixels: of an image: a number, or a tensor that broadcasts against [..., 1].

        Returns:
            The losses, float32 [...].
        """
        return self.of_features(self.features(sums, counts, pixels))

    def frozen(
        self, sums: torch.Tensor, counts: torch.Tensor, pixels: int | torch.Tensor
    ) -> torch.Tensor:
        """What :meth:`forward` returns, without a gradient to the network's weights."""
        return self.of_features(self.features(sums, counts, pixels), frozen=True)

    def features(
        self, sums: torch.Tensor, counts: torch.Tensor, pixels: int | torch.Tensor
    ) -> torch.Tensor:
        """What the first layer gets but for the scale, [..., inputs]."""
        shares = sums / pixels
        if self.inputs == 3:
            return shares
        return torch.cat((shares, sums / counts.clamp(min=1)), -1)

    def of_features(self, features: torch.Tensor, *, frozen: bool = False) -> torch.Tensor:
        """The outputs [...] for features [..., inputs], in their dtype, whatever autocast says."""
        weights = [weight.detach() if frozen else weight for weight in self.linear.parameters()]
        scaled = features * self.scale.to(features.dtype)
        if torch.is_grad_enabled() and (scaled.requires_grad or not frozen):
            outputs: torch.Tensor = _Network.apply(scaled, self.activation, *weights)  # type: ignore[no-untyped-call]
        else:
            outputs = _layers(scaled, self.activation, weights)[-1]
        return outputs.squeeze(-1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save the weights, the scale and the options; :meth:`load` reads them again."""
        torch.save({"options": self._options(), "state": self.state_dict()}, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> IoUSurrogate:
        """A surrogate that :meth:`save` has saved, frozen and on the CPU."""
        saved = torch.load(path, map_location="cpu", weights_only=True)
        surrogate = cls(**saved["options"])
        surrogate.load_state_dict(saved["state"])
        return surrogate.requires_grad_(False)

    def extra_repr(self) -> str:
        """The options, for printing."""
        return ", ".join(f"{name}={value!r}" for name, value in self._options().items())

    def _options(self) -> dict[str, Any]:
        names = ("inputs", "score", "layers", "nodes", "activation")
        return {name: getattr(self, name) for name in names}


class _Network(torch.autograd.Function):
    """A network's outputs and their gradient, neither of which autocast changes.

    PyTorch's own gradient of a layer is one of 16 bits if autocast is on in the backward pass.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, activation: str, *weights: torch.Tensor) -> torch.Tensor:
        """The outputs [..., 1] for inputs [..., D]; ``weights`` are a matrix and a bias a layer."""
        return _layers(x, activation, weights)[-1]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        """Keep the inputs: the layers' outputs are small, and made again."""
        x, ctx.activation, *weights = inputs
        ctx.save_for_backward(x, *weights)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients of the inputs and of the weights, by differentiable operations."""
        x, *weights = ctx.saved_tensors
        gradients: list[torch.Tensor | None] = []
        with without_autocast(x):
            befores = [x, *_layers(x, ctx.activation, weights)[:-1]]
            for place in reversed(range(len(befores))):
                weight, before = weights[2 * place].to(x.dtype), befores[place]
                if place < len(befores) - 1:
                    grad = grad * _slope(befores[place + 1], ctx.activation)
                needs_weight, needs_bias = ctx.needs_input_grad[2 + 2 * place : 4 + 2 * place]
                rows = grad.flatten(0, -2)
                gradients.insert(0, rows.sum(0) if needs_bias else None)
                of_weight = rows.mT @ before.flatten(0, -2) if needs_weight else None
                gradients.insert(0, of_weight)
                grad = grad @ weight
        return (grad, None, *gradients)


def _layers(
    x: torch.Tensor, activation: str, weights: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """What each layer returns."""
    found = []
    with without_autocast(x):
        for place in range(0, len(weights), 2):
            weight, bias = (each.to(x.dtype) for each in weights[place : place + 2])
            x = F.linear(x, weight, bias)
            if place + 2 < len(weights):
                x = torch.tanh(x) if activation == "tanh" else F.softplus(x)
            found.append(x)
    return found


def _slope(activated: torch.Tensor, activation: str) -> torch.Tensor:
    """The derivative of an activation where it has this value."""
    # log(1 + e^x) has the derivative 1 / (1 + e^-x), which is 1 - e^-y where y is its value.
    return 1 - activated.square() if activation == "tanh" else -torch.expm1(-activated)


def fit_iou_surrogate(
    pairs: IoUPairs,
    *,
    inputs: int = 3,
    activation: str = "tanh",
    steps: int = 3000,
    batch: int = 256,
    learning_rate: float = 1e-2,
    held_out: float = 0.2,
    seed: int = 0,
    progress: bool = True,
) -> SurrogateFit:
    """Fit a surrogate to examples by squared error (NeuroIoU paper, equation 3).

    Adam, with a learning rate that falls to 0 along a cosine. The random numbers are its own.

    Args:
        pairs: examples, as :func:`tritonloss.collect_iou_pairs` makes them, at least 10.
        inputs: of the network, 3 (default) or 6, as for :class:`IoUSurrogate`.
        activation: of the network, "tanh" (default) or "softplus".
        steps: of the optimiser, default 3000.
        batch: examples of a step, default 256; all of them if there are fewer.
        learning_rate: of the first step, default 1e-2.
        held_out: the share of examples that are kept for the error, above 0 and below 1. Default
            0.2.
        seed: of the weights and of the order of examples, default 0.
        progress: whether a progress bar is shown on stderr. Default True.

    Returns:
        A :class:`SurrogateFit`: the network, frozen and on the pairs' device, and its error.

    Raises:
        TypeError, ValueError: an option has the wrong type or is out of range, or there are too few
            examples.

    Example:
        >>> import torch, tritonloss
        >>> counts = torch.randint(1, 200, (500, 3))
        >>> pairs = tritonloss.IoUPairs(0.9 * counts, counts, torch.full((500,), 1000))
        >>> fit = tritonloss.fit_iou_surrogate(pairs, steps=300, progress=False)
        >>> fit.error < 0.1
        True
    """
    _check_fit(pairs, steps, batch, learning_rate, held_out)
    device = pairs.sums.device
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(pairs.sums), generator=generator).to(device)
    kept = max(1, round(held_out * len(order)))
    testing, training = order[:kept], order[kept:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        surrogate = IoUSurrogate(inputs, score=pairs.score, activation=activation).to(device)

    features = surrogate.features(pairs.sums, pairs.counts, pairs.pixels.unsqueeze(1))
    truth = pairs.iou_loss()
    usual = features[training].square().mean(0).sqrt()
    surrogate.scale.copy_(torch.where(usual > 0, 1 / usual, 1.0))
    fit_network(
        surrogate.of_features,
        list(surrogate.parameters()),
        (features[training], truth[training]),
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        generator=generator,
        progress=progress,
    )
    surrogate.requires_grad_(False)
    predicted = surrogate.of_features(features[testing])
    error = (predicted - truth[testing]).square().mean().sqrt().item()
    return SurrogateFit(surrogate, error, truth[testing], predicted)


def fit_network(
    network: Callable[[torch.Tensor], torch.Tensor],
    parameters: Sequence[nn.Parameter],
    examples: tuple[torch.Tensor, torch.Tensor],
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    generator: torch.Generator,
    progress: bool,
) -> None:
    """Fit parameters of a network by squared error to examples (inputs [P, D], outputs [P]).

    A step takes so many examples as if drawn by lot, or all of them if there are no more.
    """
    inputs, outputs = examples
    optimiser = torch.optim.Adam(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    bar = Progress(steps) if progress else None
    for step in range(steps):
        x, y = inputs, outputs
        if batch < len(outputs):
            drawn = torch.randint(len(outputs), (batch,), generator=generator).to(outputs.device)
            x, y = inputs[drawn], outputs[drawn]
        loss = (network(x) - y).square().mean()
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
        schedule.step()
        if bar is not None:
            bar.step(f"step {step + 1} of the IoU surrogate")
    if bar is not None:
        bar.close()


def _check_fit(
    pairs: IoUPairs, steps: int, batch: int, learning_rate: float, held_out: float
) -> None:
    """The arguments of a fit that no network checks."""
    if not isinstance(pairs, IoUPairs):
        raise TypeError(f"pairs must be IoUPairs; got {type(pairs).__name__}")
    if len(pairs.sums) < 10:
        raise ValueError(f"pairs must hold at least 10 examples; got {len(pairs.sums)}")
    checks.check_positive("steps", steps)
    checks.check_positive("batch", batch)
    checks.check_range("learning_rate", learning_rate, 0.0, 1.0, interval="(]")
    checks.check_range("held_out", held_out, 0.0, 1.0, interval="()")

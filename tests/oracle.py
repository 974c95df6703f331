"""The three-way oracle and its cases.

Truth is the reference in float64, the yardstick is the reference in the input's own dtype. A kernel
may be as wrong as the yardstick plus a tolerance, each element for itself: a mean error would hide
a wrong border.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import kernels_reference
import tritonloss

# What rounding may cost, relative to the largest element. In float64 and float32 that is for sums
# in another order than the yardstick's. In 16 bits it is for the rounding of the result itself; the
# interpreter truncates to bfloat16 and does not round.
ROUNDING = {
    torch.float64: 1e-10,
    torch.float32: 2e-6,
    torch.float16: 2.0**-10,
    torch.bfloat16: 2.0**-7,
}
LAYOUTS = ("contiguous", "channels_last", "sliced", "transposed", "expanded")

Outputs = tuple[Tensor, ...]


def as_layout(tensor: Tensor, layout: str) -> Tensor:
    """The same values behind other strides; "expanded" repeats the first row (stride 0)."""
    if layout == "contiguous":
        return tensor.contiguous()
    if layout == "channels_last":
        if tensor.dim() == 4:
            return tensor.contiguous(memory_format=torch.channels_last)
        return tensor.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    if layout == "sliced":
        *outer, height, width = tensor.shape
        outer[-1] += 1
        # What lies between the slices must not be read: NaN, or a label that is none.
        around = torch.full(
            (*outer, height + 2, 2 * width + 1),
            float("nan") if tensor.is_floating_point() else 77,
            dtype=tensor.dtype,
            device=tensor.device,
        )
        view = around.narrow(len(outer) - 1, 1, tensor.shape[len(outer) - 1])
        return view[..., 1:-1, 1::2].copy_(tensor)
    if layout == "transposed":
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert layout == "expanded"
    return tensor[..., :1, :].contiguous().expand_as(tensor)


def unaligned(values: Tensor, offset: int) -> Tensor:
    """The values as a part of wider maps, which begins ``offset`` elements after an aligned place.

    What lies around must not be seen: NaN, or 77.
    """
    *outer, height, width = values.shape
    around = torch.full(
        (*outer, height + 1, width + 5),
        float("nan") if values.is_floating_point() else 77,
        dtype=values.dtype,
        device=values.device,
    )
    return around[..., :height, offset : offset + width].copy_(values)


def segmentation_case(
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    label_dtype: torch.dtype = torch.uint8,
    seed: int = 0,
    ignore_index: int | None = 255,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Labels in flat areas of a few pixels, a tenth of them ignored, and logits that half agree.

    Where there is one class, the labels are 0 and 1.
    """
    generator = torch.Generator().manual_seed(seed)
    batch, classes, height, width = shape
    coarse = torch.randint(
        max(classes, 2), (batch, height // 4 + 1, width // 4 + 1), generator=generator
    ).repeat_interleave(4, 1)
    target = coarse.repeat_interleave(4, 2)[:, :height, :width].contiguous()
    logits = 2 * torch.randn((batch, classes, height, width), generator=generator)
    channels = torch.arange(classes) if classes > 1 else torch.ones(1)
    logits += 3 * (target[:, None] == channels.view(1, -1, 1, 1)) - 1
    if ignore_index is not None:
        target[torch.rand(target.shape, generator=generator) < 0.1] = ignore_index
    return logits.to(device, dtype), target.to(device, label_dtype)


def settled_case(
    shape: Sequence[int],
    *,
    beta: float = 0.1,
    margin: float = 3e-4,
    ignore_index: int | None = 255,
    layout: str = "contiguous",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    label_dtype: torch.dtype = torch.uint8,
    device: torch.device | str = "cpu",
    **window: Any,
) -> tuple[Tensor, Tensor]:
    """A segmentation_case in which no e lies so near the threshold that rounding decides."""
    window = {"window_size": 3, "sigma": 1.5, "stability": 0.01, **window}
    largest = kernels_reference.largest_difference(
        window["window_size"], window["sigma"], window["stability"]
    )
    for attempt in range(1000 * seed, 1000 * seed + 1000):
        logits, target = segmentation_case(
            shape,
            dtype=dtype,
            label_dtype=label_dtype,
            seed=attempt,
            ignore_index=ignore_index,
            device=device,
        )
        logits = as_layout(logits, layout)
        e = kernels_reference.structural_difference(
            logits.double(), target, ignore_index=ignore_index, **window
        )
        if e.numel() == 0 or ((e - beta * largest).abs() > margin * largest).all():
            return logits, target
    raise AssertionError(f"no case of shape {tuple(shape)} without an e near the threshold")


def value_and_gradients(
    function: Callable[..., Tensor | Outputs], inputs: Sequence[Tensor], backend: str
) -> tuple[Outputs, Outputs]:
    """Outputs, and gradients under a fixed random upstream gradient, from one backend."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    with tritonloss.use_backend(backend):
        outputs = function(*leaves)
    if isinstance(outputs, Tensor):
        outputs = (outputs,)
    generator = torch.Generator().manual_seed(1)
    upstream = [
        torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
        for output in outputs
    ]
    gradients = torch.autograd.grad(outputs, leaves, upstream)
    return tuple(output.detach() for output in outputs), gradients


def check_three_way(
    function: Callable[..., Tensor | Outputs],
    *inputs: Tensor,
    tolerance: float | None = None,
    gradient_tolerance: float | None = None,
) -> Outputs:
    """Hold the kernels' values and gradients to the oracle; the gradients.

    Tolerances are relative to the largest magnitude of the tensor they are for. By default they
    are its dtype's in `ROUNDING`.
    """
    kernel = value_and_gradients(function, inputs, "triton")
    yardstick = value_and_gradients(function, inputs, "reference")
    truth = value_and_gradients(function, [tensor.double() for tensor in inputs], "reference")
    tolerances = (tolerance, gradient_tolerance if gradient_tolerance is not None else tolerance)
    for kind in (0, 1):
        for position in range(len(truth[kind])):
            assert_no_worse(
                kernel[kind][position],
                yardstick[kind][position],
                truth[kind][position],
                tolerance=tolerances[kind],
                what=f"{('output', 'gradient')[kind]} {position}",
            )
    for tensor, gradient in zip(inputs, kernel[1], strict=True):
        assert gradient.shape == tensor.shape and gradient.dtype == tensor.dtype
    return kernel[1]


def assert_no_worse(
    kernel: Tensor,
    yardstick: Tensor,
    truth: Tensor,
    *,
    tolerance: float | None = None,
    what: str = "value",
) -> None:
    """error(kernel) <= error(yardstick) + tolerance, for every element."""
    assert kernel.shape == truth.shape, f"{what}: shape {tuple(kernel.shape)}"
    assert kernel.dtype == yardstick.dtype, f"{what}: dtype {kernel.dtype}"
    if truth.numel() == 0:
        return
    rounding = ROUNDING[kernel.dtype]
    if kernel.is_cuda:
        # Weights and constants reach a compiled kernel in float32.
        rounding = max(rounding, 2e-6)
    relative = max(rounding, tolerance or 0.0) if kernel.dtype != torch.float64 else rounding
    allowed = (yardstick.double() - truth).abs() + relative * truth.abs().max()
    if kernel.dtype == torch.float16:  # whose smallest number this is
        allowed += 2.0**-24
    error = (kernel.double() - truth).abs()
    excess = error - allowed
    if (excess <= 0).all():
        return
    worst = int(excess.nan_to_num(nan=float("inf")).argmax())
    values = [tensor.flatten()[worst].item() for tensor in (kernel, yardstick, truth)]
    bounds = [tensor.flatten()[worst].item() for tensor in (error, allowed)]
    where = torch.unravel_index(torch.tensor(worst), truth.shape) if truth.dim() else ()
    raise AssertionError(
        f"{what} at {tuple(int(i) for i in where)}: kernel, yardstick, truth {values}; "
        f"error, allowed {bounds}; {int((~(excess <= 0)).sum())} of {truth.numel()} elements"
    )

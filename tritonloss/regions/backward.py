"""Backward pass of region mutual information: which kernels it runs, on what, in which order.

The gradient of the probabilities that the regions are made of comes first, and the gradient of the
logits is computed from it. The mathematics is documented in region_mutual_information.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from .._core.backend import device_guard
from .._core.prepared_launch import PreparedLaunch
from .gradient_kernels import (
    _rmi_border_kernel,
    _rmi_direct_gradient_kernel,
    _rmi_interior_kernel,
    _rmi_taps_kernel,
)
from .plan import (
    Options,
    Plan,
    Saved,
    cell_arguments,
    cell_grid,
    configuration_of,
    contiguous_strides,
    core_strip,
    feature_arguments,
    is_flat,
    of_kind,
    strides,
)
from .pooling_kernels import _rmi_expand_kernel, _rmi_sample_backward_kernel


def backward_pass(
    options: Options,
    grad_loss: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    saved: Saved,
) -> torch.Tensor:
    """The gradient of the logits, in their dtype and layout."""
    grad_logits = torch.empty_like(logits)

    def prepare(plan: Plan) -> _Backward:
        return _backward(plan, logits, target, grad_logits)

    steps = of_kind("rmi backward", options, logits, target, prepare)
    with device_guard(logits):
        if not steps.plan.has_maps:
            out = _Places(grad_logits, grad_logits)
            steps.gradient.run(grad_loss, logits, target, saved, out)
            return grad_logits
        out = steps.rooms.made(steps.plan, grad_logits)
        steps.gradient.run(grad_loss, saved.residual, saved.labels, saved, out)
        for expand, room in zip(steps.expand, out, strict=True):
            if expand is not None:
                expand(
                    grad_loss_ptr=grad_loss,
                    statistics_ptr=saved.statistics,
                    logits_ptr=logits,
                    target_ptr=target,
                    grad_pooled_ptr=room,
                    grad_logits_ptr=grad_logits,
                )
    return grad_logits


class _Backward(NamedTuple):
    """The steps of the pass."""

    plan: Plan
    gradient: _LagGradient | _DirectGradient
    rooms: _Rooms
    expand: tuple[PreparedLaunch | None, ...]  # from each of the rooms to the logits


def _backward(
    plan: Plan, logits: torch.Tensor, target: torch.Tensor, grad_logits: torch.Tensor
) -> _Backward:
    rooms = _rooms(plan, grad_logits)
    shared = {
        **feature_arguments(plan, logits, target, grad_logits),
        "out_strides": contiguous_strides(plan.map_shape)
        if plan.has_maps
        else strides(grad_logits),
        "height": plan.rows,
        "width": plan.columns,
        "split": rooms.waiting.planes,
    }
    gradient: _LagGradient | _DirectGradient
    if plan.is_direct:
        gradient = _direct_gradient(plan, shared)
    else:
        gradient = _lag_gradient(plan, logits, target, shared)
    expand: tuple[PreparedLaunch | None, ...] = ()
    if plan.has_maps:
        arguments = _expand_arguments(plan, logits, target, grad_logits)
        shares = (rooms.waiting, rooms.last)
        expand = tuple(_expand(plan, share, arguments) for share in shares)
    return _Backward(plan, gradient, rooms, expand)


# --- rooms ----------------------------------------------------------------------------------------


class _Share(NamedTuple):
    """Some of the images with all classes, or some of the classes of a single image."""

    first_image: int
    images: int
    first_class: int
    classes: int

    @property
    def planes(self) -> int:
        return self.images * self.classes


class _Places(NamedTuple):
    """The memory for the gradient of the pooled maps: of the waiting planes, and of the last."""

    waiting: torch.Tensor
    last: torch.Tensor


class _Rooms(NamedTuple):
    """Where the gradient of the pooled maps is kept until the logits' is computed from it.

    That of most images waits in the memory where the gradient of the last images' logits will be.
    So only the last images take memory of their own. With one image it is the same for its classes.
    """

    waiting: _Share
    last: _Share
    start: int  # where the room of the waiting starts in the gradient of the logits
    size: int  # how many elements of that gradient the room takes

    def made(self, plan: Plan, grad_logits: torch.Tensor) -> _Places:
        """The tensors of both rooms; the same one twice if nothing waits."""
        shape = (self.last.planes, plan.rows, plan.columns)
        last = grad_logits.new_empty(shape, dtype=plan.arithmetic)
        if self.size == 0:
            return _Places(last, last)
        waiting = grad_logits.as_strided((self.size,), (1,), self.start)
        if waiting.dtype != plan.arithmetic:
            waiting = waiting.view(plan.arithmetic)
        return _Places(waiting, last)


def _rooms(plan: Plan, grad_logits: torch.Tensor) -> _Rooms:
    """The rooms of a plan; all planes are the last ones if none can wait."""
    images, classes = plan.images, plan.classes
    all_last = _Rooms(_Share(0, 0, 0, 0), _Share(0, images, 0, classes), 0, 0)
    axis = 0 if images > 1 else 1
    count = images if axis == 0 else classes
    others = classes if axis == 0 else 1
    size, pooled_size = others * plan.height * plan.width, others * plan.rows * plan.columns
    # The number of logits whose memory one pooled value takes.
    unit = plan.arithmetic.itemsize // grad_logits.dtype.itemsize
    first = count - -(-count * pooled_size * unit // (size + pooled_size * unit))
    # The room starts at a multiple of 16 bytes, as tensors do.
    start = -(-first * size // 8) * 8
    room = (count * size - start) // unit
    # The maps of a small image take little memory, and a second launch would take time.
    if plan.options.small or grad_logits.stride(axis) != size:
        return all_last
    if not 0 < first * pooled_size <= room:
        return all_last
    if axis == 0:
        waiting, last = _Share(0, first, 0, classes), _Share(first, count - first, 0, classes)
    else:
        waiting, last = _Share(0, 1, 0, first), _Share(0, 1, first, count - first)
    return _Rooms(waiting, last, start, first * pooled_size * unit)


# --- gradient to the probabilities ----------------------------------------------------------------


class _LagGradient(NamedTuple):
    """The gradient of interior and border, with one table of taps per border class."""

    arithmetic: torch.dtype
    taps: PreparedLaunch
    taps_shape: tuple[int, int, int]
    interior: PreparedLaunch
    border: PreparedLaunch | None

    def run(
        self,
        grad_loss: torch.Tensor,
        first: torch.Tensor,
        second: torch.Tensor,
        saved: Saved,
        out: _Places,
    ) -> None:
        taps = first.new_empty(self.taps_shape, dtype=self.arithmetic)
        self.taps(grad_loss_ptr=grad_loss, weights_ptr=saved.weights, taps_ptr=taps)
        for correlate in (self.interior, self.border):
            if correlate is not None:
                correlate(
                    grad_loss_ptr=grad_loss,
                    statistics_ptr=saved.statistics,
                    first_ptr=first,
                    second_ptr=second,
                    taps_ptr=taps,
                    out_ptr=out.waiting,
                    rest_ptr=out.last,
                )


def _lag_gradient(
    plan: Plan, logits: torch.Tensor, target: torch.Tensor, arguments: dict[str, Any]
) -> _LagGradient:
    """The launches of the gradient by correlation; ``arguments`` are those of both maps."""
    options, planes = plan.options, plan.planes
    region = options.region_size
    span = 2 * region - 1
    taps = {
        "images": plan.images,
        "rmi_weight": 1.0 - options.bce_weight,
        "REGION": region,
        "CELL": options.cell,
        "num_warps": 1,
        "enable_fp_fusion": True,
    }
    launch = core_strip("rmi_gradient", plan, logits, target)
    strip = launch["STRIP"]
    bands = triton.cdiv(plan.rows - span + 1, strip.rows)
    blocks = triton.cdiv(plan.columns - span + 1, strip.lanes * strip.columns)
    interior = {**arguments, **launch}
    border = None
    if region > 1:
        pixels = 2 * (region - 1) * (plan.rows + plan.columns - 2 * (region - 1))
        border = PreparedLaunch(
            _rmi_border_kernel,
            (planes, triton.cdiv(pixels, 128)),
            {**arguments, "REGION": region, "LANES": 128, "num_warps": 4},
            aligned=False,  # values are moved one by one
        )
    return _LagGradient(
        plan.arithmetic,
        PreparedLaunch(_rmi_taps_kernel, (planes, span**2), taps),
        (planes, span**2, 2 * span**2 + 1),
        PreparedLaunch(_rmi_interior_kernel, (planes, bands, blocks), interior, aligned=False),
        border,
    )


class _DirectGradient(NamedTuple):
    """The gradient from every region of every pixel."""

    launch: PreparedLaunch

    def run(
        self,
        grad_loss: torch.Tensor,
        first: torch.Tensor,
        second: torch.Tensor,
        saved: Saved,
        out: _Places,
    ) -> None:
        self.launch(
            grad_loss_ptr=grad_loss,
            statistics_ptr=saved.statistics,
            first_ptr=first,
            second_ptr=second,
            kept_ptr=saved.kept,
            weights_ptr=saved.weights,
            out_ptr=out.waiting,
            rest_ptr=out.last,
        )


def _direct_gradient(plan: Plan, arguments: dict[str, Any]) -> _DirectGradient:
    options = plan.options
    blocks = triton.cdiv(plan.rows * plan.columns, 128)
    own = {
        "blocks": blocks,
        "images": plan.images,
        "rmi_weight": 1.0 - options.bce_weight,
        "REGION": options.region_size,
        "LANES": 128,
        "CELL": options.cell,
        "DROP": options.drops,
        "num_warps": 4,
    }
    # All programs are on the first axis of the grid: the others take at most 65535.
    grid = (plan.planes * blocks,)
    # Values are moved one by one.
    return _DirectGradient(
        PreparedLaunch(_rmi_direct_gradient_kernel, grid, {**arguments, **own}, aligned=False)
    )


# --- gradient to the logits -----------------------------------------------------------------------


def _expand_arguments(
    plan: Plan, logits: torch.Tensor, target: torch.Tensor, grad_logits: torch.Tensor
) -> dict[str, Any]:
    """The arguments that the launches from maps to logits have in common."""
    if plan.options.samples:
        size = plan.options.pool_size
        launch: dict[str, Any] = configuration_of(
            "rmi_sample", plan, logits, size, LANES=128, num_warps=2
        )
    else:
        launch = cell_arguments("rmi_expand", plan, logits)
        launch["FLAT"] = is_flat(logits, target, grad_logits)
    return {
        "logits_strides": strides(logits),
        "target_strides": strides(target),
        "grad_logits_strides": strides(grad_logits),
        "classes": plan.classes,
        "height": plan.height,
        "width": plan.width,
        "pooled_height": plan.rows,
        "pooled_width": plan.columns,
        "IGNORED": plan.ignored,
        "enable_fp_fusion": True,
        **launch,
    }


def _expand(plan: Plan, share: _Share, arguments: dict[str, Any]) -> PreparedLaunch | None:
    """The launch from a share's maps to its logits, with the cross entropy; None if it is empty."""
    if share.planes == 0:
        return None
    own = {
        "channels": share.classes,
        "first_image": share.first_image,
        "first_class": share.first_class,
    }
    if plan.options.samples:
        blocks = triton.cdiv(plan.width, arguments["LANES"])
        grid: tuple[int, ...] = (share.images * plan.height, blocks)
        arguments = {**arguments, **own}
        return PreparedLaunch(_rmi_sample_backward_kernel, grid, arguments, aligned=False)
    grid = cell_grid(share.images, share.classes, plan.width, arguments)
    # Cells begin anywhere: they are moved pixel by pixel.
    return PreparedLaunch(_rmi_expand_kernel, grid, {**arguments, **own}, aligned=False)

"""The kernels and launchers of all pixelwise losses, whatever the pair of device functions.

``_pixels.py`` tells how such a pair is written, and how a program walks over its pixels.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .._core.backend import device_guard, warp_size
from .._core.configurations import Configuration, Launch, Shape, TuningCase, launch_configuration
from .._core.prepared_launch import PreparedLaunch, kind, prepared
from .._core.tuning_inputs import random_map
from .math import sanitised_label
from .pixels import Given, Pixel, Tile, far_offsets, label_pointers, map_view, pixel_program

REDUCTIONS = ("mean", "sum", "none")

# Kernel arguments that a kernel is compiled for once, whatever their value.
_SIZES = (
    "logits_strides", "target_strides", "grad_strides", "upstream_strides", "pixels", "width",
    "tiles", "full", "programs", "groups",
)  # fmt: skip

# Partial sums that one program adds up in the second stage.
_GROUP = 2048

# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def _load_pixel(
    target_ptr, target_strides, image, first, local, inside, width, IGNORED: tl.constexpr,
    CLASSES: tl.constexpr, BINARY: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The pixels of a program, labels sanitised.

    label and own are -1 where there is none. They differ for BINARY labels alone: of those 1 is
    class 0, and 0 is the absence of class 0.
    """
    pointers = label_pointers(target_ptr, target_strides, image, first, local, width, TILE)
    loaded = tl.load(pointers, mask=inside, other=0)
    # As a tensor: labels of eight bits may be fewer than the classes, and are widened then.
    classes = tl.full((), 2 if BINARY else CLASSES, tl.int32)
    label = sanitised_label(loaded, inside, classes, IGNORED)
    own = tl.where(label == 1, 0, -1) if BINARY else label
    return Pixel(label=label, own=own, inside=inside)


@triton.jit(do_not_specialize=_SIZES)
def _pixelwise_forward_kernel(
    logits_ptr,  # [N, C, H, W]
    target_ptr,  # [N, H, W]
    own_ptr,  # [C]: a table for a pixel's own class, if the loss has one
    other_ptr,  # [C]: a table for the other classes, if the loss has one
    values_ptr,  # [N, H, W]: the loss of every pixel, unless REDUCED
    partials_ptr,  # [3, programs]: sums of values, of weights, of valid pixels, if REDUCED
    first_ptr,  # up to two maps [N, H, W] for the backward pass
    second_ptr,
    numbers,  # the loss's own
    logits_strides,
    target_strides,
    pixels,  # of an image, in grains
    width,
    tiles,
    full,
    programs,
    FORWARD: tl.constexpr,
    OPTIONS: tl.constexpr,
    CLASSES: tl.constexpr,
    IGNORED: tl.constexpr,
    BINARY: tl.constexpr,
    REDUCED: tl.constexpr,
    SAVED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Reads labels and logits once (what is read again comes from the cache)."""
    dtype: tl.constexpr = partials_ptr.dtype.element_ty
    image, first, local, inside = pixel_program(pixels, tiles, TILE)
    pixel = _load_pixel(
        target_ptr, target_strides, image, first, local, inside, width, IGNORED, CLASSES, BINARY,
        TILE,
    )  # fmt: skip
    view = map_view(logits_ptr, logits_strides, image, first, local, width, TILE)
    given = Given(own_table=own_ptr, other_table=other_ptr, numbers=numbers)

    value, weight, saved = FORWARD(pixel, view, given, full, dtype, OPTIONS, CLASSES, TILE)

    valid = pixel.label >= 0
    value = tl.where(valid, value, 0.0)
    position = image * pixels * TILE.grain + first + local
    if SAVED > 0:
        tl.store(first_ptr + position, saved[0], mask=inside)
    if SAVED > 1:
        tl.store(second_ptr + position, saved[1], mask=inside)
    if REDUCED:
        partial_ptr = partials_ptr + tl.program_id(0)
        tl.store(partial_ptr, tl.sum(value))
        tl.store(partial_ptr + programs, tl.sum(tl.where(valid, weight, 0.0)))
        tl.store(partial_ptr + 2 * programs, tl.sum(tl.where(valid, 1.0, 0.0)))
    else:
        tl.store(values_ptr + position, value, mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def _pixelwise_sum_kernel(
    partials_ptr,  # [3, programs]
    sums_ptr,  # [3, groups]
    programs,
    groups,
    BLOCK: tl.constexpr,
):
    """Adds BLOCK partial sums each: a single program would take long to read those of millions."""
    group = tl.program_id(0)
    quantity = tl.program_id(1)
    offset = group * BLOCK + tl.arange(0, BLOCK)
    partial = tl.load(
        partials_ptr + quantity * programs + offset, mask=offset < programs, other=0.0
    )
    tl.store(sums_ptr + quantity * groups + group, tl.sum(partial.to(tl.float64)))


@triton.jit(do_not_specialize=_SIZES)
def _pixelwise_finish_kernel(
    partials_ptr,  # [3, programs], or sums of them
    loss_ptr,  # []
    scale_ptr,  # []: what the gradient of a pixel's value is multiplied by
    programs,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds the partial sums in float64, in an order that never changes."""
    lane = tl.arange(0, BLOCK)
    values = tl.zeros((BLOCK,), tl.float64)
    weights = tl.zeros((BLOCK,), tl.float64)
    valid = tl.zeros((BLOCK,), tl.float64)
    for start in tl.range(0, programs, BLOCK):
        offset = start + lane
        mask = offset < programs
        values += tl.load(partials_ptr + offset, mask=mask, other=0.0)
        weights += tl.load(partials_ptr + programs + offset, mask=mask, other=0.0)
        valid += tl.load(partials_ptr + 2 * programs + offset, mask=mask, other=0.0)
    loss = tl.sum(values)
    divisor = tl.zeros_like(loss) + 1.0
    if MEAN:
        # Nothing valid: 0. Weights that sum to 0: NaN, as torch has it, whatever the values.
        divisor = tl.where(tl.sum(valid) > 0, tl.sum(weights), 1.0)
        divisor = tl.where(divisor == 0, float("nan"), divisor)
    tl.store(loss_ptr, loss / divisor)
    tl.store(scale_ptr, 1.0 / divisor)


@triton.jit(do_not_specialize=_SIZES)
def _pixelwise_backward_kernel(
    upstream_ptr,  # [], or [N, H, W] unless REDUCED
    scale_ptr,  # []
    logits_ptr,  # [N, C, H, W]
    target_ptr,  # [N, H, W]
    own_ptr,  # [C]
    other_ptr,  # [C]
    first_ptr,  # up to two maps [N, H, W]
    second_ptr,
    grad_ptr,  # [N, C, H, W]
    numbers,
    upstream_strides,
    logits_strides,
    target_strides,
    grad_strides,
    pixels,  # of an image, in grains
    width,
    tiles,
    full,
    BACKWARD: tl.constexpr,
    OPTIONS: tl.constexpr,
    CLASSES: tl.constexpr,
    IGNORED: tl.constexpr,
    BINARY: tl.constexpr,
    REDUCED: tl.constexpr,
    SAVED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Reads labels and logits once more, writes the gradient once."""
    dtype: tl.constexpr = scale_ptr.dtype.element_ty
    image, first, local, inside = pixel_program(pixels, tiles, TILE)
    pixel = _load_pixel(
        target_ptr, target_strides, image, first, local, inside, width, IGNORED, CLASSES, BINARY,
        TILE,
    )  # fmt: skip
    view = map_view(logits_ptr, logits_strides, image, first, local, width, TILE)
    grad_view = map_view(grad_ptr, grad_strides, image, first, local, width, TILE)

    position = image * pixels * TILE.grain + first + local
    saved = ()
    if SAVED > 0:
        saved = (tl.load(first_ptr + position, mask=inside, other=0),)
    if SAVED > 1:
        saved = saved + (tl.load(second_ptr + position, mask=inside, other=0),)
    scale = tl.load(scale_ptr)
    if REDUCED:
        scale = scale * tl.load(upstream_ptr).to(dtype)
    else:
        offsets = far_offsets(first, local, upstream_strides[1], upstream_strides[2], width)
        upstream = upstream_ptr + image * upstream_strides[0] + offsets
        scale = scale * tl.load(upstream, mask=inside, other=0.0).to(dtype)
    scale = tl.where(pixel.label >= 0, scale, 0.0)

    given = Given(own_table=own_ptr, other_table=other_ptr, numbers=numbers)
    BACKWARD(
        scale, saved, pixel, view, grad_view, given, full, dtype, OPTIONS, CLASSES, TILE
    )  # fmt: skip


# --- launchers ------------------------------------------------------------------------------------


class Loss(NamedTuple):
    """A pixelwise loss as its launchers know it.

    ``saved`` gives the dtypes of the maps that the forward leaves to the backward, for logits of a
    dtype.
    """

    name: str
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    saved: Callable[[torch.dtype], tuple[torch.dtype, ...]]
    unroll: int = 8  # classes of a lane in one block of the forward pass, where there are so many
    held: int = 0  # up to so many classes of a lane stay in registers, to be gone through twice
    binary: bool = False  # one class: labels 0 and 1


class Results(NamedTuple):
    """What a forward launch returns: loss [] or [N, H, W], scale [], two saved maps or [0]."""

    loss: torch.Tensor
    scale: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_results(loss: Loss, logits: torch.Tensor, reduction: str, save: bool) -> Results:
    """The tensors that a forward launch fills."""
    dtype = compute_dtype(logits.dtype)
    pixels = (logits.size(0), logits.size(2), logits.size(3))
    value = torch.empty(pixels if reduction == "none" else (), dtype=dtype, device=logits.device)
    scale = torch.empty((), dtype=dtype, device=logits.device)
    dtypes = loss.saved(logits.dtype) if save else ()
    maps = [torch.empty(pixels, dtype=kind, device=logits.device) for kind in dtypes]
    maps += [logits.new_empty(0) for _ in range(2 - len(maps))]
    return Results(value, scale, *maps)


def launch_forward(
    loss: Loss,
    logits: torch.Tensor,
    target: torch.Tensor,
    tables: tuple[torch.Tensor | None, torch.Tensor | None],
    numbers: tuple[float, ...],
    options: Any,
    reduction: str,
    ignore_index: int | None,
    save: bool,
) -> Results:
    """Loss, and what its backward pass needs if ``save``.

    The device functions get ``tables`` and ``numbers`` as they are; ``options``, a NamedTuple, is
    what the kernels are compiled for.
    """
    results = empty_results(loss, logits, reduction, save)
    own, other = (_given(table, logits) for table in tables)
    reduced = reduction != "none"

    def prepare() -> _ForwardPlan:
        grid, launch = _launch(loss, f"{loss.name}_forward", logits, target)
        constants = {
            "numbers": numbers,
            "logits_strides": _strides(logits, launch["TILE"]),
            "target_strides": _strides(target, launch["TILE"]),
            "programs": grid[0],
            "FORWARD": loss.forward,
            "OPTIONS": options,
            "REDUCED": reduced,
            "SAVED": len(loss.saved(logits.dtype)) if save else 0,
            **_labels(loss, logits, target, ignore_index),
            **launch,
        }
        finish = _finish_plan(grid[0], reduction) if reduced else None
        launch_pixels = PreparedLaunch(_pixelwise_forward_kernel, grid, constants)
        return _ForwardPlan(launch_pixels, grid[0] if reduced else 0, finish)

    # The loss's functions stay alive in what is prepared, so that their addresses are theirs.
    functions = (loss.name, id(loss.forward))
    given = (own.dtype, other.dtype, numbers, options, reduction, ignore_index, save)
    plan = prepared((functions, kind(logits), kind(target), given), prepare)
    partials = results.scale.new_empty(3, plan.partials)
    with device_guard(logits):
        plan.launch(
            logits_ptr=logits,
            target_ptr=target,
            own_ptr=own,
            other_ptr=other,
            values_ptr=results.loss,
            partials_ptr=partials,
            first_ptr=results.first,
            second_ptr=results.second,
        )
        if plan.finish is None:
            results.scale.fill_(1.0)
        else:
            plan.finish.run(partials, results)
    return results


class _FinishPlan(NamedTuple):
    """How the programs' partial sums become loss and scale."""

    groups: int
    add: PreparedLaunch | None  # a first stage, where there are many
    finish: PreparedLaunch

    def run(self, partials: torch.Tensor, results: Results) -> None:
        """Loss and scale from the partial sums [3, programs]."""
        if self.add is not None:
            sums = torch.empty(3, self.groups, dtype=torch.float64, device=partials.device)
            self.add(partials_ptr=partials, sums_ptr=sums)
            partials = sums
        self.finish(partials_ptr=partials, loss_ptr=results.loss, scale_ptr=results.scale)


class _ForwardPlan(NamedTuple):
    """The launches of a forward pass, for logits and labels of one kind."""

    launch: PreparedLaunch
    partials: int  # programs that leave partial sums
    finish: _FinishPlan | None


def _finish_plan(programs: int, reduction: str) -> _FinishPlan:
    groups, add = programs, None
    if programs > _GROUP:
        groups = triton.cdiv(programs, _GROUP)
        sizes = {"programs": programs, "groups": groups, "BLOCK": _GROUP}
        options = {"num_warps": 4, "enable_fp_fusion": True}
        add = PreparedLaunch(_pixelwise_sum_kernel, (groups, 3), {**sizes, **options})
    constants = {"programs": groups, "MEAN": reduction == "mean", "BLOCK": _GROUP}
    options = {"num_warps": 8, "enable_fp_fusion": True}
    finish = PreparedLaunch(_pixelwise_finish_kernel, (1,), {**constants, **options})
    return _FinishPlan(groups, add, finish)


def launch_backward(
    loss: Loss,
    upstream: torch.Tensor,
    results: Results,
    logits: torch.Tensor,
    target: torch.Tensor,
    tables: tuple[torch.Tensor | None, torch.Tensor | None],
    numbers: tuple[float, ...],
    options: Any,
    ignore_index: int | None,
) -> torch.Tensor:
    """The gradient of the logits; of ``results`` all but the loss is used."""
    grad_logits = torch.empty_like(logits)
    own, other = (_given(table, logits) for table in tables)
    reduced = upstream.dim() == 0

    def prepare() -> PreparedLaunch:
        grid, launch = _launch(loss, f"{loss.name}_backward", logits, target, grad_logits)
        constants = {
            "numbers": numbers,
            "upstream_strides": (0, 0, 0) if reduced else upstream.stride(),
            "logits_strides": _strides(logits, launch["TILE"]),
            "target_strides": _strides(target, launch["TILE"]),
            "grad_strides": _strides(grad_logits, launch["TILE"]),
            "BACKWARD": loss.backward,
            "OPTIONS": options,
            "REDUCED": reduced,
            "SAVED": len(loss.saved(logits.dtype)),
            **_labels(loss, logits, target, ignore_index),
            **launch,
        }
        return PreparedLaunch(_pixelwise_backward_kernel, grid, constants)

    functions = (loss.name, id(loss.backward))
    maps = (kind(logits), kind(target), kind(upstream), kind(grad_logits))
    given = (own.dtype, other.dtype, numbers, options, ignore_index)
    launch = prepared((functions, maps, given), prepare)
    with device_guard(logits):
        launch(
            upstream_ptr=upstream,
            scale_ptr=results.scale,
            logits_ptr=logits,
            target_ptr=target,
            own_ptr=own,
            other_ptr=other,
            first_ptr=results.first,
            second_ptr=results.second,
            grad_ptr=grad_logits,
        )
    return grad_logits


def pixel_heuristic(loss: Loss, operator: str, logits: torch.Tensor) -> Configuration:
    """A configuration that is always valid: two or four pixels per lane."""
    warps, classes = 4, logits.size(1)
    forward = operator.endswith("forward")
    if _classes_in_lanes(logits):
        # Every lane of a pixel does all that is to do once per pixel: few classes, few lanes.
        lanes = 8 if classes > 32 else min(4, triton.next_power_of_2(classes))
        slots = triton.cdiv(classes, lanes)
        # Every value has an address of its own in registers.
        pixels = 4 if slots <= 8 else 2
        unroll = loss.unroll if forward else 4 if lanes == 8 else 8
    else:
        lanes, slots = 1, classes
        pixels, unroll = 2 if forward and loss.held else 4, loss.unroll if forward else 8
    return {
        "PIXELS": pixels * warps * warp_size() // lanes,
        "CLASS_LANES": lanes,
        "UNROLL": loss.held if forward and slots <= loss.held else unroll,
        "num_warps": warps,
    }


def pixel_candidates(
    loss: Loss, operator: str, dtype: torch.dtype, classes: int, layout: str
) -> list[Configuration]:
    """The heuristic and its neighbours, one setting changed at a time: what the tuner tries."""
    like = random_map((1, classes, 2, 32), layout, dtype, torch.device("meta"))
    heuristic = pixel_heuristic(loss, operator, like)
    pixels, lanes = int(heuristic["PIXELS"]), int(heuristic["CLASS_LANES"])
    unroll, warps = int(heuristic["UNROLL"]), int(heuristic["num_warps"])
    changes: list[Configuration] = [{"PIXELS": pixels // 2}, {"PIXELS": pixels * 2}]
    changes += [{"UNROLL": max(unroll // 2, 1)}, {"UNROLL": unroll * 2}]
    changes += [{"PIXELS": pixels // 2, "num_warps": warps // 2}]
    changes += [{"PIXELS": pixels * 2, "num_warps": warps * 2}]
    if lanes > 1:
        changes += [{"CLASS_LANES": lanes // 2, "PIXELS": pixels * 2}]
        changes += [{"CLASS_LANES": lanes * 2, "PIXELS": pixels // 2}]
    candidates = [heuristic, *({**heuristic, **change} for change in changes)]
    return [c for i, c in enumerate(candidates) if c not in candidates[:i]]


def pixel_cases(
    losses: Sequence[Loss],
    run: Callable[[Loss, torch.dtype, Shape, str, torch.device], Launch],
) -> list[TuningCase]:
    """A slice's tuning cases; ``run`` prepares both passes for logits of a shape and layout."""
    cases = []
    layouts = ("contiguous", "channels_last")
    for classes, layout in (*itertools.product((19, 150), layouts), (1, "contiguous")):
        for dtype, loss in itertools.product((torch.float32, torch.bfloat16), losses):
            if classes == 1 and not loss.binary:
                continue
            sized = functools.partial(run, loss, dtype)
            stated = functools.partial(sized, (2, classes, 512, 512), layout)
            for operator in (f"{loss.name}_forward", f"{loss.name}_backward"):
                candidates = functools.partial(pixel_candidates, loss, operator, dtype)
                arguments = (classes, 1, dtype, layout, stated, candidates(classes, layout))
                cases.append(
                    TuningCase(operator, *arguments, sized=sized, sized_candidates=candidates)
                )
    return cases


def _launch(
    loss: Loss, operator: str, logits: torch.Tensor, target: torch.Tensor, *grads: torch.Tensor
) -> tuple[tuple[int], dict[str, Any]]:
    """(grid, arguments) of a kernel that goes through all pixels of ``logits``."""
    in_lanes = _classes_in_lanes(logits) and all(grad.stride(1) == 1 for grad in grads)
    flat = _is_flat(in_lanes, logits, target, *grads)
    configuration = launch_configuration(
        operator,
        device=logits.device,
        dtype=logits.dtype,
        classes=logits.size(1),
        window=1,
        layout="channels_last" if in_lanes else "contiguous" if flat else "strided",
        heuristic=pixel_heuristic(loss, operator, logits),
    )
    warps, lanes = int(configuration["num_warps"]), int(configuration["CLASS_LANES"])
    pixels, lanes = int(configuration["PIXELS"]), lanes if in_lanes else 1
    grain = 1
    if not in_lanes:
        per_lane = max(pixels // (warps * warp_size()), 1)
        grain = _grain(per_lane, logits, target, *grads) if flat else 1
        # Without whole aligned grains a lane's neighbouring pixels would be moved one by one, each
        # time across as many cache lines as if they were apart: one pixel per lane is better.
        pixels = pixels if grain > 1 else min(pixels, warps * warp_size())
    size = logits.size(2) * logits.size(3)
    classes = logits.size(1)
    unroll = min(int(configuration["UNROLL"]), triton.cdiv(classes, lanes))
    step = unroll * lanes
    tiles = triton.cdiv(size, pixels)
    return (logits.size(0) * tiles,), {
        "pixels": size // grain,
        "width": logits.size(3),
        "tiles": tiles,
        "full": (classes - 1) // step * step,
        "CLASSES": classes,
        "TILE": Tile(pixels, lanes, unroll, grain, flat),
        "num_warps": warps,
        "enable_fp_fusion": True,
    }


def _labels(
    loss: Loss, logits: torch.Tensor, target: torch.Tensor, ignore_index: int | None
) -> dict[str, Any]:
    """The kernels' arguments that tell which labels count."""
    binary = loss.binary and logits.size(1) == 1
    classes = 2 if binary else logits.size(1)
    return {"IGNORED": ignored_class(ignore_index, classes, target.dtype), "BINARY": binary}


def ignored_class(ignore_index: int | None, classes: int, dtype: torch.dtype) -> int:
    """The ignore label if it would otherwise be a class, else -1: the range check does the rest."""
    if ignore_index is None or not 0 <= ignore_index < min(classes, torch.iinfo(dtype).max + 1):
        return -1
    return ignore_index


def _given(table: torch.Tensor | None, logits: torch.Tensor) -> torch.Tensor:
    """A table as the kernels read it: of as many numbers as there are classes, side by side."""
    return logits if table is None else table.contiguous()


def _classes_in_lanes(logits: torch.Tensor) -> bool:
    """Whether neighbouring addresses are classes, so that neighbouring lanes should be too."""
    return logits.size(1) > 1 and logits.stride(1) == 1 and logits.stride(3) != 1


def _is_flat(
    in_lanes: bool, logits: torch.Tensor, target: torch.Tensor, *maps: torch.Tensor
) -> bool:
    """Whether the pixels of every map lie at even distances, in one run where that is needed."""
    width = logits.size(3)
    if target.stride(2) != 1 or target.stride(1) != width:
        return False
    for tensor in (logits, *maps):
        if tensor.stride(2) != width * tensor.stride(3):
            return False
        if not in_lanes and tensor.stride(3) != 1:
            return False
    return True


def _grain(per_lane: int, *maps: torch.Tensor) -> int:
    """How many neighbouring pixels of flat maps can be moved at once: 1, or up to ``per_lane``."""
    grain = min(per_lane, 4)
    while grain > 1:
        strides = [stride for tensor in maps for stride in tensor.stride()[:-2]]
        size = maps[0].size(2) * maps[0].size(3)
        if size % grain == 0 and all(stride % grain == 0 for stride in strides):
            return grain
        grain //= 2
    return 1


def _strides(tensor: torch.Tensor, tile: Tile) -> tuple[int, ...]:
    """The tensor's strides as the kernels take them: outer ones in units of the grain."""
    if tile.grain == 1:
        return tensor.stride()
    outer = tensor.dim() - 2
    return (*(s // tile.grain for s in tensor.stride()[:outer]), *tensor.stride()[outer:])

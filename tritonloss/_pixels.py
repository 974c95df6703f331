"""Pixels: how the pixelwise losses walk over a batch, and how they are launched.

A program owns a run of pixels of one image and goes through their classes in blocks, unrolled, so
that the label of a pixel is handled once and no sum ever leaves a warp:

- contiguous logits: neighbouring addresses are pixels. A lane owns a few neighbouring pixels
  (``Tile.grain`` of them are moved at once) with all of their classes: vectors [pixels].
- channels_last logits: neighbouring addresses are classes. A few lanes share a pixel, each with
  every ``Tile.lanes``-th class; what they find is joined once per pixel: tiles [pixels, lanes].

A **pixelwise loss is a pair of device functions**; the two kernels here do all the rest. Names are
those of the kernels' arguments.

    @triton.jit
    def my_loss_forward(pixel, view, tables, full, dtype, OPTIONS, CLASSES, TILE):
        state = fold_classes((start values), view, pixel, tables, full, dtype, ADD, ...)
        return value, weight, saved     # [pixels] each; saved: a tuple of at most two

    @triton.jit
    def my_loss_backward(scale, saved, pixel, view, grad_view, tables, full, dtype, ...):
        write_gradients((what a class needs), view, grad_view, pixel, tables, ..., SLOPE, ...)

``ADD`` adds a block of classes to the state, ``SLOPE`` turns one class's logit into its gradient.
``weight`` is what the mean divides by the sum of. Values at pixels that are not valid may be
anything: the kernels select. ``_pixelwise_kernels.py`` has three such pairs to copy from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ._backend import device_guard, warp_size
from ._device_math import sanitised_label
from ._tuning import Configuration, launch_configuration

REDUCTIONS = ("mean", "sum", "none")

# Kernel arguments that a kernel is compiled for once, whatever their value.
_SIZES = (
    "logits_strides", "target_strides", "grad_strides", "upstream_strides", "pixels", "width",
    "tiles", "full", "programs", "groups",
)  # fmt: skip

# Partial sums that one program adds up in the second stage.
_GROUP = 2048


class Tile(NamedTuple):
    """What a program works on; known when a kernel is compiled."""

    pixels: int
    lanes: int  # that share a pixel's classes; 1: a lane has them all
    unroll: int  # classes of a lane in one block
    grain: int  # pixels that can be moved at once in every map; 1 unless the maps are flat
    flat: bool  # a map's pixels lie at even distances; labels and contiguous logits side by side


# --- device functions: where a program is ---------------------------------------------------------


@triton.jit
def pixel_program(pixels, tiles, TILE: tl.constexpr):
    """(image, first, local, inside): the run of pixels of this program."""
    PIXELS: tl.constexpr = TILE.pixels
    GRAIN: tl.constexpr = TILE.grain
    program = tl.program_id(0)
    image = (program // tiles).to(tl.int64)
    first = (program % tiles).to(tl.int64) * PIXELS
    local = tl.arange(0, PIXELS)
    inside = first + local < pixels * GRAIN
    return image, first, local, inside


@triton.jit
def far_offsets(first, local, row_stride, column_stride, width):
    """Offsets of pixels in a map with any strides."""
    pixel = first + local
    row = pixel // width
    return row * row_stride + (pixel - row * width) * column_stride


@triton.jit
def map_view(pointer, strides, image, first, local, width, TILE: tl.constexpr):
    """(pointer, offsets, class stride) of a program's pixels in a map [N, C, H, W].

    ``pointer`` moves from class to class, ``offsets`` stay: [pixels], or [pixels, 1] if lanes share
    a pixel. Strides count in grains but for the last.
    """
    GRAIN: tl.constexpr = TILE.grain
    one = tl.full((), 1, tl.int64)
    start = pointer + image * strides[0] * GRAIN
    if TILE.flat and TILE.lanes == 1:
        view = (start + first, local, one * strides[1] * GRAIN)
    elif TILE.flat:
        offsets = local.to(tl.int64) * strides[3]
        view = (start + first * strides[3], offsets[:, None], one)
    else:
        offsets = far_offsets(first, local, strides[2], strides[3], width)
        if TILE.lanes > 1:
            view = (start, offsets[:, None], one)
        else:
            view = (start, offsets, one * strides[1])
    return view


@triton.jit
def label_pointers(pointer, strides, image, first, local, width, TILE: tl.constexpr):
    """Pointers to a program's pixels in a label map [N, H, W]."""
    GRAIN: tl.constexpr = TILE.grain
    start = pointer + image * strides[0] * GRAIN
    if TILE.flat:
        pointers = start + first + local
    else:
        pointers = start + far_offsets(first, local, strides[1], strides[2], width)
    return pointers


# --- device functions: classes --------------------------------------------------------------------


@triton.jit
def class_of(start, SLOT: tl.constexpr, TILE: tl.constexpr):
    """The class in a slot of the block that begins with class ``start``: scalar, or [1, lanes]."""
    LANES: tl.constexpr = TILE.lanes
    if LANES == 1:
        result = start + SLOT
    else:
        result = start + SLOT * LANES + tl.arange(0, LANES)[None, :]
    return result


@triton.jit
def for_classes(x, TILE: tl.constexpr):
    """A value of each pixel [pixels], to be used beside its classes."""
    if TILE.lanes == 1:
        result = x
    else:
        result = x[:, None]
    return result


@triton.jit
def largest_of_lanes(x, TILE: tl.constexpr):
    """The largest of what a pixel's lanes have found, [pixels]."""
    if TILE.lanes == 1:
        result = x
    else:
        result = tl.max(x, axis=1)
    return result


@triton.jit
def smallest_of_lanes(x, TILE: tl.constexpr):
    """The smallest of what a pixel's lanes have found, [pixels]."""
    if TILE.lanes == 1:
        result = x
    else:
        result = tl.min(x, axis=1)
    return result


@triton.jit
def sum_of_lanes(x, TILE: tl.constexpr):
    """The sum of what a pixel's lanes have found, [pixels]."""
    if TILE.lanes == 1:
        result = x
    else:
        result = tl.sum(x, axis=1)
    return result


@triton.jit
def nothing_yet(value: tl.constexpr, dtype: tl.constexpr, TILE: tl.constexpr):
    """How a sum or an extreme over classes starts: [pixels], or [pixels, lanes]."""
    PIXELS: tl.constexpr = TILE.pixels
    LANES: tl.constexpr = TILE.lanes
    if LANES == 1:
        result = tl.full((PIXELS,), value, dtype)
    else:
        result = tl.full((PIXELS, LANES), value, dtype)
    return result


@triton.jit
def slot_mask(inside, SLOT: tl.constexpr, LEFT: tl.constexpr, TILE: tl.constexpr):
    """Which values of a slot exist, if LEFT classes are left at the block's start."""
    LANES: tl.constexpr = TILE.lanes
    if LANES == 1:
        mask = inside
    elif LEFT >= (SLOT + 1) * LANES:
        mask = inside[:, None]
    else:
        mask = inside[:, None] & (tl.arange(0, LANES)[None, :] < LEFT - SLOT * LANES)
    return mask


@triton.jit
def slot_pointers(view, SLOT: tl.constexpr, TILE: tl.constexpr):
    """Pointers to a slot's values."""
    pointer, offsets, stride = view
    LANES: tl.constexpr = TILE.lanes
    if LANES == 1:
        pointers = pointer + SLOT * stride + offsets
    else:
        pointers = pointer + (offsets + (SLOT * LANES + tl.arange(0, LANES)[None, :]))
    return pointers


@triton.jit
def load_block(
    view, inside, dtype: tl.constexpr, COUNT: tl.constexpr, LEFT: tl.constexpr, TILE: tl.constexpr
):
    """A block's logits, a tuple of COUNT slots; -inf where a lane has no class left."""
    values = ()
    for j in tl.static_range(COUNT):
        mask = slot_mask(inside, j, LEFT, TILE)
        if TILE.lanes == 1:
            loaded = tl.load(slot_pointers(view, j, TILE), mask=mask, other=0.0)
        else:
            loaded = tl.load(slot_pointers(view, j, TILE), mask=mask, other=float("-inf"))
        values = values + (loaded.to(dtype),)
    return values


@triton.jit
def load_table(
    table, start, SLOT: tl.constexpr, LEFT: tl.constexpr, dtype: tl.constexpr, TILE: tl.constexpr
):
    """A slot's entries in a table [classes]; 0 where a lane has no class left."""
    LANES: tl.constexpr = TILE.lanes
    if LANES == 1:
        entry = tl.load(table + class_of(start, SLOT, TILE))
    elif LEFT >= (SLOT + 1) * LANES:
        entry = tl.load(table + class_of(start, SLOT, TILE))
    else:
        mask = tl.arange(0, LANES)[None, :] < LEFT - SLOT * LANES
        entry = tl.load(table + class_of(start, SLOT, TILE), mask=mask, other=0.0)
    return entry.to(dtype)


@triton.jit
def load_class(view, index, exists, dtype: tl.constexpr, TILE: tl.constexpr):
    """Each pixel's logit of a class of its own, [pixels]; 0 where it has none."""
    pointer, offsets, stride = view
    if TILE.lanes == 1:
        pixels = offsets
    else:
        pixels = tl.reshape(offsets, (TILE.pixels,))
    offset = tl.where(exists, index, 0).to(tl.int64) * stride + pixels
    return tl.load(pointer + offset, mask=exists, other=0.0).to(dtype)


@triton.jit
def fold_classes(
    state, view, pixel, tables, full, dtype: tl.constexpr, ADD: tl.constexpr,
    OPTIONS: tl.constexpr, CLASSES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The state after ADD(state, values, start, pixel, tables, dtype, ...) of all blocks in turn.

    ``full`` is the number of classes in the blocks before the last, known at run time only, so that
    the loop over them stays one.
    """
    STEP: tl.constexpr = TILE.unroll * TILE.lanes
    FULL: tl.constexpr = (CLASSES - 1) // STEP * STEP
    LEFT: tl.constexpr = CLASSES - FULL  # at least one, at most a whole block
    COUNT: tl.constexpr = (LEFT + TILE.lanes - 1) // TILE.lanes
    inside = pixel[2]
    pointer, offsets, stride = view
    if FULL > 0:
        for start in tl.range(0, full, STEP):
            values = load_block((pointer, offsets, stride), inside, dtype, TILE.unroll, STEP, TILE)
            state = ADD(
                state, values, start, pixel, tables, dtype, OPTIONS, TILE.unroll, STEP, TILE
            )
            pointer += STEP * stride
    values = load_block((pointer, offsets, stride), inside, dtype, COUNT, LEFT, TILE)
    return ADD(state, values, FULL, pixel, tables, dtype, OPTIONS, COUNT, LEFT, TILE)


@triton.jit
def fold_classes_twice(
    first, view, pixel, tables, full, dtype: tl.constexpr, ADD_FIRST: tl.constexpr,
    ADD_SECOND: tl.constexpr, JOIN: tl.constexpr, OPTIONS: tl.constexpr, CLASSES: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """fold_classes with ADD_FIRST; then with ADD_SECOND from JOIN(the state, pixel, ...) on.

    Where one block holds all classes they stay in registers; otherwise they are loaded again, out
    of the cache if it is large enough.
    """
    if CLASSES <= TILE.unroll * TILE.lanes:
        COUNT: tl.constexpr = (CLASSES + TILE.lanes - 1) // TILE.lanes
        values = load_block(view, pixel[2], dtype, COUNT, CLASSES, TILE)
        first = ADD_FIRST(first, values, 0, pixel, tables, dtype, OPTIONS, COUNT, CLASSES, TILE)
        second = JOIN(first, dtype, TILE)
        second = ADD_SECOND(second, values, 0, pixel, tables, dtype, OPTIONS, COUNT, CLASSES, TILE)
    else:
        first = fold_classes(
            first, view, pixel, tables, full, dtype, ADD_FIRST, OPTIONS, CLASSES, TILE
        )
        second = JOIN(first, dtype, TILE)
        second = fold_classes(
            second, view, pixel, tables, full, dtype, ADD_SECOND, OPTIONS, CLASSES, TILE
        )
    return second


@triton.jit
def _write_block(
    factors, view, grad_view, start, pixel, tables, dtype: tl.constexpr, SLOPE: tl.constexpr,
    OPTIONS: tl.constexpr, COUNT: tl.constexpr, LEFT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    inside = pixel[2]
    valid = for_classes(pixel[0] >= 0, TILE)
    values = load_block(view, inside, dtype, COUNT, LEFT, TILE)
    for j in tl.static_range(COUNT):
        gradient = SLOPE(factors, values[j], start, j, LEFT, tables, dtype, OPTIONS, TILE)
        # Selected, not multiplied by 0: an ignored pixel may hold an infinity.
        gradient = tl.where(valid, gradient, 0.0)
        tl.store(slot_pointers(grad_view, j, TILE), gradient, mask=slot_mask(inside, j, LEFT, TILE))


@triton.jit
def write_gradients(
    factors, view, grad_view, pixel, tables, full, dtype: tl.constexpr, SLOPE: tl.constexpr,
    OPTIONS: tl.constexpr, CLASSES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Store SLOPE(factors, values, start, slot, left, tables, dtype, ...) of every class."""
    STEP: tl.constexpr = TILE.unroll * TILE.lanes
    FULL: tl.constexpr = (CLASSES - 1) // STEP * STEP
    LEFT: tl.constexpr = CLASSES - FULL  # at least one, at most a whole block
    COUNT: tl.constexpr = (LEFT + TILE.lanes - 1) // TILE.lanes
    pointer, offsets, stride = view
    grad_pointer, grad_offsets, grad_stride = grad_view
    if FULL > 0:
        for start in tl.range(0, full, STEP):
            _write_block(
                factors, (pointer, offsets, stride), (grad_pointer, grad_offsets, grad_stride),
                start, pixel, tables, dtype, SLOPE, OPTIONS, TILE.unroll, STEP, TILE,
            )  # fmt: skip
            pointer += STEP * stride
            grad_pointer += STEP * grad_stride
    _write_block(
        factors, (pointer, offsets, stride), (grad_pointer, grad_offsets, grad_stride), FULL, pixel,
        tables, dtype, SLOPE, OPTIONS, COUNT, LEFT, TILE,
    )  # fmt: skip


# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def _load_pixel(
    target_ptr, target_strides, image, first, local, inside, width, IGNORED: tl.constexpr,
    CLASSES: tl.constexpr, BINARY: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """(label, own, inside): sanitised label, class of its own and whether a pixel exists, [pixels].

    label and own are -1 where there is none. They differ for BINARY labels alone: of those 1 is
    class 0, and 0 is the absence of class 0.
    """
    pointers = label_pointers(target_ptr, target_strides, image, first, local, width, TILE)
    loaded = tl.load(pointers, mask=inside, other=0)
    # As a tensor: labels of eight bits may be fewer than the classes, and are widened then.
    classes = tl.full((), 2 if BINARY else CLASSES, tl.int32)
    label = sanitised_label(loaded, inside, classes, IGNORED)
    own = tl.where(label == 1, 0, -1) if BINARY else label
    return label, own, inside


@triton.jit(do_not_specialize=_SIZES)
def _pixelwise_forward_kernel(
    logits_ptr,  # [N, C, H, W]
    target_ptr,  # [N, H, W]
    own_ptr,  # [C]: a table for a pixel's own class, if the loss has one
    other_ptr,  # [C]: a table for the other classes, if the loss has one
    values_ptr,  # [N, H, W]: the loss of every pixel, unless REDUCED
    partials_ptr,  # [3, programs]: sums of values, of weights, of valid pixels, if REDUCED
    saved_ptrs,  # up to two maps [N, H, W] for the backward pass
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
    tables = (own_ptr, other_ptr)

    value, weight, saved = FORWARD(pixel, view, tables, full, dtype, OPTIONS, CLASSES, TILE)

    valid = pixel[0] >= 0
    value = tl.where(valid, value, 0.0)
    position = image * pixels * TILE.grain + first + local
    for i in tl.static_range(SAVED):
        tl.store(saved_ptrs[i] + position, saved[i], mask=inside)
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
        # Nothing valid: 0. Weights that sum to 0: NaN, as torch has it.
        divisor = tl.where(tl.sum(valid) > 0, tl.sum(weights), 1.0)
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
    saved_ptrs,  # up to two maps [N, H, W]
    grad_ptr,  # [N, C, H, W]
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
    for i in tl.static_range(SAVED):
        saved = saved + (tl.load(saved_ptrs[i] + position, mask=inside, other=0),)
    scale = tl.load(scale_ptr)
    if REDUCED:
        scale = scale * tl.load(upstream_ptr).to(dtype)
    else:
        offsets = far_offsets(first, local, upstream_strides[1], upstream_strides[2], width)
        upstream = upstream_ptr + image * upstream_strides[0] + offsets
        scale = scale * tl.load(upstream, mask=inside, other=0.0).to(dtype)
    scale = tl.where(pixel[0] >= 0, scale, 0.0)

    BACKWARD(
        scale, saved, pixel, view, grad_view, (own_ptr, other_ptr), full, dtype, OPTIONS, CLASSES,
        TILE,
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
    options: Any,
    reduction: str,
    ignore_index: int | None,
    save: bool,
) -> Results:
    """Loss, and what its backward pass needs if ``save``."""
    results = empty_results(loss, logits, reduction, save)
    grid, launch = _launch(loss, f"{loss.name}_forward", logits, target)
    partials = results.scale.new_empty(3, grid[0] if reduction != "none" else 0)
    with device_guard(logits):
        _pixelwise_forward_kernel[grid](
            logits_ptr=logits,
            target_ptr=target,
            own_ptr=_given(tables[0], logits),
            other_ptr=_given(tables[1], logits),
            values_ptr=results.loss,
            partials_ptr=partials,
            saved_ptrs=(results.first, results.second),
            logits_strides=_strides(logits, launch["TILE"]),
            target_strides=_strides(target, launch["TILE"]),
            programs=grid[0],
            FORWARD=loss.forward,
            OPTIONS=options,
            REDUCED=reduction != "none",
            SAVED=len(loss.saved(logits.dtype)) if save else 0,
            **_labels(loss, logits, target, ignore_index),
            **launch,
        )
        if reduction == "none":
            results.scale.fill_(1.0)
        else:
            _finish(partials, results, reduction)
    return results


def _finish(partials: torch.Tensor, results: Results, reduction: str) -> None:
    """Loss and scale from the programs' partial sums [3, programs]."""
    if partials.size(1) > _GROUP:
        groups = triton.cdiv(partials.size(1), _GROUP)
        sums = torch.empty(3, groups, dtype=torch.float64, device=partials.device)
        _pixelwise_sum_kernel[(groups, 3)](
            partials_ptr=partials,
            sums_ptr=sums,
            programs=partials.size(1),
            groups=groups,
            BLOCK=_GROUP,
            num_warps=4,
            enable_fp_fusion=True,
        )
        partials = sums
    _pixelwise_finish_kernel[(1,)](
        partials_ptr=partials,
        loss_ptr=results.loss,
        scale_ptr=results.scale,
        programs=partials.size(1),
        MEAN=reduction == "mean",
        BLOCK=_GROUP,
        num_warps=8,
        enable_fp_fusion=True,
    )


def launch_backward(
    loss: Loss,
    upstream: torch.Tensor,
    results: Results,
    logits: torch.Tensor,
    target: torch.Tensor,
    tables: tuple[torch.Tensor | None, torch.Tensor | None],
    options: Any,
    ignore_index: int | None,
) -> torch.Tensor:
    """The gradient of the logits; of ``results`` all but the loss is used."""
    grad_logits = torch.empty_like(logits)
    grid, launch = _launch(loss, f"{loss.name}_backward", logits, target, grad_logits)
    reduced = upstream.dim() == 0
    with device_guard(logits):
        _pixelwise_backward_kernel[grid](
            upstream_ptr=upstream,
            scale_ptr=results.scale,
            logits_ptr=logits,
            target_ptr=target,
            own_ptr=_given(tables[0], logits),
            other_ptr=_given(tables[1], logits),
            saved_ptrs=(results.first, results.second),
            grad_ptr=grad_logits,
            upstream_strides=(0, 0, 0) if reduced else upstream.stride(),
            logits_strides=_strides(logits, launch["TILE"]),
            target_strides=_strides(target, launch["TILE"]),
            grad_strides=_strides(grad_logits, launch["TILE"]),
            BACKWARD=loss.backward,
            OPTIONS=options,
            REDUCED=reduced,
            SAVED=len(loss.saved(logits.dtype)),
            **_labels(loss, logits, target, ignore_index),
            **launch,
        )
    return grad_logits


def pixel_heuristic(loss: Loss, operator: str, logits: torch.Tensor) -> Configuration:
    """A configuration that is always valid: two or four pixels per lane."""
    warps = 4
    lanes = 8 if _classes_in_lanes(logits) else 1
    slots = triton.cdiv(logits.size(1), lanes)
    forward = operator.endswith("forward")
    if lanes > 1:  # every value has an address of its own in registers
        pixels, unroll = 4 if slots <= 4 else 2, loss.unroll if forward else 4
    else:
        pixels, unroll = 2 if forward and loss.held else 4, loss.unroll if forward else 8
    return {
        "PIXELS": pixels * warps * warp_size() // lanes,
        "CLASS_LANES": lanes,
        "UNROLL": loss.held if forward and slots <= loss.held else unroll,
        "num_warps": warps,
    }


def pixel_candidates(heuristic: Configuration) -> list[Configuration]:
    """The heuristic and its neighbours, one setting changed at a time: what the tuner tries."""
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
    return logits if table is None else table


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

"""Pixels: how the pixelwise losses walk over a batch, and how they are launched.

A program owns a run of pixels of one image and goes through their classes in blocks, unrolled, so
that the label of a pixel is handled once and no sum ever leaves a warp:

- contiguous logits: neighbouring addresses are pixels. A lane owns a few neighbouring pixels
  (``Tile.grain`` of them are moved at once) with all of their classes: vectors [pixels].
- channels_last logits: neighbouring addresses are classes. A few lanes share a pixel, each with
  every ``Tile.lanes``-th class; what they find is joined once per pixel: tiles [pixels, lanes].

A **pixelwise loss is a pair of device functions**, each with a callback for a block of classes; the
two kernels of ``pixel_launch.py`` do all the rest. Here is one, w sum of max(0, z_k)^2 over the
classes that are not the pixel's own (tests/losses/test_pixelwise.py runs it):

    @triton.jit
    def _add_squares(
        state, values, start, pixel, given, dtype: tl.constexpr, OPTIONS: tl.constexpr,
        COUNT: tl.constexpr, LEFT: tl.constexpr, TILE: tl.constexpr,
    ):
        own = for_classes(pixel.own, TILE)
        total = state[0]
        for j in tl.static_range(COUNT):
            z = tl.where(class_of(start, j, TILE) == own, 0.0, tl.maximum(values[j], 0.0))
            total += z * z
        return (total,)

    @triton.jit
    def squares_forward(
        pixel, view, given, full, dtype: tl.constexpr, OPTIONS: tl.constexpr,
        CLASSES: tl.constexpr, TILE: tl.constexpr,
    ):
        state = (nothing_yet(0.0, dtype, TILE),)
        state = fold_classes(
            state, view, pixel, given, full, dtype, _add_squares, OPTIONS, CLASSES, TILE
        )
        value = sum_of_lanes(state[0], TILE) * given.numbers[0]
        return value, tl.zeros_like(value) + 1.0, ()

    @triton.jit
    def _squares_slope(
        factors, value, start, SLOT: tl.constexpr, LEFT: tl.constexpr, given, dtype: tl.constexpr,
        OPTIONS: tl.constexpr, TILE: tl.constexpr,
    ):
        scale, own = factors
        is_own = class_of(start, SLOT, TILE) == own
        return tl.where(is_own, 0.0, 2 * scale * tl.maximum(value, 0.0))

    @triton.jit
    def squares_backward(
        scale, saved, pixel, view, grad_view, given, full, dtype: tl.constexpr,
        OPTIONS: tl.constexpr, CLASSES: tl.constexpr, TILE: tl.constexpr,
    ):
        factors = (for_classes(scale * given.numbers[0], TILE), for_classes(pixel.own, TILE))
        write_gradients(
            factors, view, grad_view, pixel, given, full, dtype, _squares_slope, OPTIONS, CLASSES,
            TILE,
        )

    SQUARES = Loss("squares", squares_forward, squares_backward, saved=lambda dtype: ())

- ``pixel`` is (label, own, inside), ``_load_pixel`` says what they are. Values at pixels that are
  not valid may be anything: the kernels select.
- ``values`` holds COUNT slots of logits, [pixels] each, or [pixels, lanes]; -inf where a lane has
  no class left (the last LEFT classes need not fill a block). A value of each pixel goes beside
  them with ``for_classes``, a number of each class with ``load_table``; a state, a tuple that
  begins with ``nothing_yet``, becomes one value per pixel with ``..._of_lanes``.
- ``given`` is (own table, other table, numbers): what the launchers were given beside the logits,
  two tables [C] that may be None and numbers that no kernel is compiled for. OPTIONS is a
  NamedTuple of what kernels are compiled for.
- The forward returns (value, weight, saved), [pixels] each: the mean divides by the sum of the
  weights; ``saved`` are up to two values of the dtypes that ``Loss.saved`` names, which the
  backward gets back. ``scale`` is what the gradient of a pixel's value is multiplied by.
- Two passes over the classes: ``fold_classes_twice``, whose JOIN(state, dtype, TILE) turns the
  state of the first pass into that of the second; ``Loss.held``, ``pixelwise/margin_kernels.py``.
- Then ``launch_forward(SQUARES, ...)`` and ``launch_backward`` are the launchers; operator, fake,
  gradient and function around them are as in ``pixelwise.py``. A loss whose options are those of
  its ``Options`` needs only an entry in its ``LOSSES``, and the function.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Tile(NamedTuple):
    """What a program works on; known when a kernel is compiled."""

    pixels: int
    lanes: int  # that share a pixel's classes; 1: a lane has them all
    unroll: int  # classes of a lane in one block
    grain: int  # pixels that can be moved at once in every map; 1 unless the maps are flat
    flat: bool  # a map's pixels lie at even distances; labels and contiguous logits side by side


class Pixel(NamedTuple):
    """The pixels of a program, [pixels] each."""

    label: Any  # -1 where there is none
    own: Any  # the class of its own, -1 where there is none
    inside: Any  # whether there is such a pixel


class Given(NamedTuple):
    """What a loss's launcher was given beside logits and labels."""

    own_table: Any  # [C], or unused
    other_table: Any  # [C], or unused
    numbers: Any  # of the loss's own; no kernel is compiled for them


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
    inside = first + local < pixels.to(tl.int64) * GRAIN
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
def _as_class(index, CLASSES: tl.constexpr):
    """The nearest class: whatever an index from data has become, it leads to no foreign memory."""
    return tl.minimum(tl.maximum(index, 0), CLASSES - 1)


@triton.jit
def load_entry(table, index, dtype: tl.constexpr, CLASSES: tl.constexpr):
    """A table's entry for a class of each pixel, [pixels]; of the nearest where it is none."""
    return tl.load(table + _as_class(index, CLASSES)).to(dtype)


@triton.jit
def load_class(view, index, exists, dtype: tl.constexpr, CLASSES: tl.constexpr, TILE: tl.constexpr):
    """Each pixel's logit of a class of its own, [pixels]; 0 where it has none."""
    pointer, offsets, stride = view
    if TILE.lanes == 1:
        pixels = offsets
    else:
        pixels = tl.reshape(offsets, (TILE.pixels,))
    offset = _as_class(index, CLASSES).to(tl.int64) * stride + pixels
    return tl.load(pointer + offset, mask=exists, other=0.0).to(dtype)


@triton.jit
def fold_classes(
    state, view, pixel, given, full, dtype: tl.constexpr, ADD: tl.constexpr,
    OPTIONS: tl.constexpr, CLASSES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The state after ADD(state, values, start, pixel, given, dtype, ...) of all blocks in turn.

    ``full`` is the number of classes in the blocks before the last, known at run time only, so that
    the loop over them stays one.
    """
    STEP: tl.constexpr = TILE.unroll * TILE.lanes
    FULL: tl.constexpr = (CLASSES - 1) // STEP * STEP
    LEFT: tl.constexpr = CLASSES - FULL  # at least one, at most a whole block
    COUNT: tl.constexpr = (LEFT + TILE.lanes - 1) // TILE.lanes
    inside = pixel.inside
    pointer, offsets, stride = view
    if FULL > 0:
        for start in tl.range(0, full, STEP):
            values = load_block((pointer, offsets, stride), inside, dtype, TILE.unroll, STEP, TILE)
            state = ADD(state, values, start, pixel, given, dtype, OPTIONS, TILE.unroll, STEP, TILE)
            pointer += STEP * stride
    values = load_block((pointer, offsets, stride), inside, dtype, COUNT, LEFT, TILE)
    return ADD(state, values, FULL, pixel, given, dtype, OPTIONS, COUNT, LEFT, TILE)


@triton.jit
def fold_classes_twice(
    first, view, pixel, given, full, dtype: tl.constexpr, ADD_FIRST: tl.constexpr,
    ADD_SECOND: tl.constexpr, JOIN: tl.constexpr, OPTIONS: tl.constexpr, CLASSES: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """fold_classes with ADD_FIRST; then with ADD_SECOND from JOIN(the state, pixel, ...) on.

    Where one block holds all classes they stay in registers; otherwise they are loaded again, out
    of the cache if it is large enough.
    """
    if CLASSES <= TILE.unroll * TILE.lanes:
        COUNT: tl.constexpr = (CLASSES + TILE.lanes - 1) // TILE.lanes
        values = load_block(view, pixel.inside, dtype, COUNT, CLASSES, TILE)
        first = ADD_FIRST(first, values, 0, pixel, given, dtype, OPTIONS, COUNT, CLASSES, TILE)
        second = JOIN(first, dtype, TILE)
        second = ADD_SECOND(second, values, 0, pixel, given, dtype, OPTIONS, COUNT, CLASSES, TILE)
    else:
        first = fold_classes(
            first, view, pixel, given, full, dtype, ADD_FIRST, OPTIONS, CLASSES, TILE
        )
        second = JOIN(first, dtype, TILE)
        second = fold_classes(
            second, view, pixel, given, full, dtype, ADD_SECOND, OPTIONS, CLASSES, TILE
        )
    return second


@triton.jit
def _write_block(
    factors, view, grad_view, start, pixel, given, dtype: tl.constexpr, SLOPE: tl.constexpr,
    OPTIONS: tl.constexpr, COUNT: tl.constexpr, LEFT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    inside = pixel.inside
    valid = for_classes(pixel.label >= 0, TILE)
    values = load_block(view, inside, dtype, COUNT, LEFT, TILE)
    for j in tl.static_range(COUNT):
        gradient = SLOPE(factors, values[j], start, j, LEFT, given, dtype, OPTIONS, TILE)
        # Selected, not multiplied by 0: an ignored pixel may hold an infinity.
        gradient = tl.where(valid, gradient, 0.0)
        tl.store(slot_pointers(grad_view, j, TILE), gradient, mask=slot_mask(inside, j, LEFT, TILE))


@triton.jit
def write_gradients(
    factors, view, grad_view, pixel, given, full, dtype: tl.constexpr, SLOPE: tl.constexpr,
    OPTIONS: tl.constexpr, CLASSES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Store SLOPE(factors, values, start, slot, left, given, dtype, ...) of every class."""
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
                start, pixel, given, dtype, SLOPE, OPTIONS, TILE.unroll, STEP, TILE,
            )  # fmt: skip
            pointer += STEP * stride
            grad_pointer += STEP * grad_stride
    _write_block(
        factors, (pointer, offsets, stride), (grad_pointer, grad_offsets, grad_stride), FULL, pixel,
        given, dtype, SLOPE, OPTIONS, COUNT, LEFT, TILE,
    )  # fmt: skip

"""Which classes occur where, and how many pixels are valid: one look at the labels before the work.

In a street scene, most strips hold no pixel of most classes. There y = 0 throughout, and much of
the structural loss's arithmetic falls away. So the label map is cut into patches, and a bit is kept
for each patch and class: whether any window that is centred in the patch sees the class. Patches
are of one size, whatever strips later kernels work on, so that the backward pass can use the bits
of the forward pass.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .._core.prepared_launch import PreparedLaunch, kind, prepared
from .._engine.math import sanitised_label
from .._engine.strip_launch import ignored_class, label_strides, strip_launch
from .._engine.strips import (
    SIZES,
    Row,
    label_plane_of,
    load_columns,
    row_of,
    strip_program,
)
from .._engine.sums import Sums, comes_last, leave, sums_over, total

PATCH_ROWS = tl.constexpr(32)
PATCH_COLUMNS = tl.constexpr(128)
_COLUMNS = 4  # of a lane's chunk
_BITS = tl.constexpr(32)  # of a word
# Larger than every class: a label is never as large.
ABOVE_ALL = tl.constexpr(1 << 30)

# --- device functions -----------------------------------------------------------------------------


class Look(NamedTuple):
    """Where the bits are, and the size of the label map; a run-time value."""

    found: Any  # int32 [images, patches in y, patches in x, words]
    classes: Any
    height: Any
    width: Any


@triton.jit
def class_is_present(look, program, STRIP: tl.constexpr):
    """Whether any window of the program's strip sees the program's class."""
    ROWS: tl.constexpr = triton.next_power_of_2(STRIP.rows // PATCH_ROWS + 2)
    COLUMNS: tl.constexpr = triton.next_power_of_2(STRIP.lanes * STRIP.columns // PATCH_COLUMNS + 1)
    words = tl.cdiv(look.classes, _BITS)
    patches_y = tl.cdiv(look.height, PATCH_ROWS)
    patches_x = tl.cdiv(look.width, PATCH_COLUMNS)
    index = tl.arange(0, ROWS * COLUMNS)
    row = program.first_row // PATCH_ROWS + index // COLUMNS
    column = program.first_column // PATCH_COLUMNS + index % COLUMNS
    end_row = tl.minimum(tl.cdiv(program.first_row + STRIP.rows, PATCH_ROWS), patches_y)
    end_column = program.first_column + STRIP.lanes * STRIP.columns
    end_column = tl.minimum(tl.cdiv(end_column, PATCH_COLUMNS), patches_x)

    patch = (program.image * patches_y + row) * patches_x + column
    pointer = look.found + (patch * words + program.channel // _BITS)
    bits = tl.load(pointer, mask=(row < end_row) & (column < end_column), other=0)
    return tl.max((bits >> (program.channel % _BITS)) & 1, 0) > 0


@triton.jit
def _bit_of(label, first_class):
    """The bit of a class in the word that begins with ``first_class``; 0 if it is in another."""
    place = (label - first_class).to(tl.uint32, bitcast=True)  # large for a label below
    return tl.where(place < _BITS, 1 << (place & (_BITS - 1)).to(tl.int32), 0)


@triton.jit
def _either(a, b):
    """All bits of both."""
    return a | b


@triton.jit(do_not_specialize=SIZES)
def _label_look_kernel(
    target_ptr,  # [N, H, W]
    found_ptr,  # [N, patches in y, patches in x, words]
    valid_ptr,  # []
    scratch_ptr,  # see _engine/sums.py
    tickets_ptr,
    target_strides,
    channels,  # words of a patch, which the grid has in the place of channels
    classes,
    height,
    width,
    tiles_x,
    tiles_y,
    programs,
    RADIUS: tl.constexpr,
    IGNORED: tl.constexpr,
    STRIP: tl.constexpr,
):
    """Reads the labels once per 32 classes, writes their bits and the number of valid pixels."""
    LANES: tl.constexpr = STRIP.lanes
    COLUMNS: tl.constexpr = STRIP.columns
    UNROLL: tl.constexpr = STRIP.unroll
    BORDER: tl.constexpr = triton.next_power_of_2(2 * RADIUS + 1)
    program = strip_program(channels, tiles_x, tiles_y, STRIP)
    target = label_plane_of(target_ptr, target_strides, program, STRIP)
    first_class = program.channel * _BITS
    end_row = program.first_row + STRIP.rows
    first = tl.maximum(program.first_row - RADIUS, 0)
    end = tl.minimum(end_row + RADIUS, height)
    border = tl.arange(0, BORDER)
    outer = program.first_column + border - RADIUS
    outer += tl.where(border >= RADIUS, LANES * COLUMNS, 0)
    outer_exists = (border < 2 * RADIUS) & (outer >= 0)

    # Rows of the patch and of its border, several at a time, so that their loads overlap.
    found = tl.zeros((LANES,), tl.int32)
    beside = tl.zeros((BORDER,), tl.int32)
    valid = tl.zeros((LANES,), tl.int32)
    for i in tl.range(0, end - first, UNROLL):
        for j in tl.static_range(UNROLL):
            number = first + i + j
            limit = tl.where(number < end, width, 0)
            row = Row(number=number, chunk=program.chunk, limit=limit)
            labels, inside = load_columns(target, row, STRIP, 0, COLUMNS, "zeros", None)
            is_own = (number >= program.first_row) & (number < end_row)
            lowest_label = tl.where(is_own, 0, ABOVE_ALL)
            for v in tl.static_range(COLUMNS):
                label = sanitised_label(labels[v], inside[v], classes, IGNORED)
                found |= _bit_of(label, first_class)
                valid += tl.where(label >= lowest_label, 1, 0)
            if RADIUS > 0:
                exists = outer_exists & (outer < limit)
                pointer = row_of(target, number, STRIP) + outer.to(tl.int64) * target.column_stride
                label = tl.load(pointer, mask=exists, other=0)
                label = sanitised_label(label, exists, classes, IGNORED)
                beside |= _bit_of(label, first_class)

    # store the bits, and count the valid pixels once
    bits = tl.reduce(found, 0, _either) | tl.reduce(beside, 0, _either)
    tl.store(found_ptr + tl.program_id(0), bits)
    sums = Sums(scratch=scratch_ptr, tickets=tickets_ptr, programs=programs, rows=1)
    leave(sums, 0, tl.where(program.channel == 0, tl.sum(valid), 0))
    if comes_last(sums):
        tl.store(valid_ptr, total(sums, 0))


# --- launcher -------------------------------------------------------------------------------------


def empty_found(logits: torch.Tensor) -> torch.Tensor:
    """Memory for the bits of all patches and classes: int32 [N, patches in y and x, words]."""
    images, classes, height, width = logits.shape
    patches_y = -(-height // PATCH_ROWS.value)
    patches_x = -(-width // PATCH_COLUMNS.value)
    shape = (images, patches_y, patches_x, -(-classes // _BITS.value))
    return torch.empty(shape, dtype=torch.int32, device=logits.device)


def look_at_labels(
    target: torch.Tensor, found: torch.Tensor, classes: int, radius: int, ignore_index: int | None
) -> torch.Tensor:
    """The number of valid pixels, float64; fills ``found``."""
    valid = torch.empty((), dtype=torch.float64, device=target.device)
    launch = prepared(
        (_LOOK, kind(target), classes, radius, ignore_index),
        lambda: _look_plan(target, classes, radius, ignore_index),
    )
    sums = sums_over(found.numel(), 1, target.device)
    launch(
        target_ptr=target,
        found_ptr=found,
        valid_ptr=valid,
        scratch_ptr=sums["scratch_ptr"],
        tickets_ptr=sums["tickets_ptr"],
    )
    return valid


_LOOK = "structural labels"


def _look_plan(
    target: torch.Tensor, classes: int, radius: int, ignore_index: int | None
) -> PreparedLaunch:
    words = -(-classes // _BITS.value)
    labels = target.unsqueeze(1).expand(-1, words, -1, -1)
    warps = 1
    configuration = {
        "COLUMNS": _COLUMNS,
        "LANES": PATCH_COLUMNS.value // _COLUMNS,
        "ROWS": PATCH_ROWS.value,
        "UNROLL": 4,
        "num_warps": warps,
    }
    grid, launch = strip_launch(labels.shape, configuration, "zeros", labels)
    arguments = {
        "target_strides": label_strides(target, launch["STRIP"]),
        "classes": classes,
        "height": target.size(1),
        "width": target.size(2),
        "programs": grid[0],
        "RADIUS": radius,
        "IGNORED": ignored_class(ignore_index, classes, target.dtype),
        **launch,
    }
    return PreparedLaunch(_label_look_kernel, grid, arguments, launch["STRIP"].grain > 1)

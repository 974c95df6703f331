"""Strips: how the window kernels walk over an image.

A program owns a strip of an image: a number of lanes, each with a chunk of neighbouring columns, a
number of rows high. It walks down the rows and keeps what the rows above contribute in registers,
so that each value is loaded once per strip (neighbouring columns come from the cache). Tuples hold
one tensor [lanes] per column of a chunk; histories hold several rows of them, oldest first.

Chunks are loaded and stored whole. Where rows begin anywhere, those of odd widths or of parts of
larger maps, aligned chunks are loaded and the columns chosen out of them (``shifted_columns``), and
lanes exchange their columns before they store them (``_dealt``): all that a warp moves at a time
lies side by side. Only there is shared memory used.

``strip_windows.py`` holds the arithmetic of windows, ``strip_launch.py`` how strips are launched.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

# Kernel arguments that a kernel is compiled for once, whatever their value.
SIZES = (
    "channels", "first_channel", "classes", "height", "width", "out_height", "out_width", "tiles_x",
    "tiles_y", "window", "programs", "coefficient_stride",
)  # fmt: skip


class Strip(NamedTuple):
    """How a map is cut into programs; known when a kernel is compiled."""

    columns: int  # of one lane's chunk: 1, 2 or 4
    lanes: int
    rows: int
    unroll: int  # rows in one turn of the loop
    grain: int  # ``columns`` if every row is made of whole aligned chunks, moved at once; else 1
    channels_in_lanes: bool  # channels_last: lanes run over (chunk, channel), not over chunks
    shifted: bool  # grain is 1, but columns are neighbours: chunks are aligned ones, shifted


class Strides(NamedTuple):
    """Distances in a map [N, C, H, W]; all but the last in units of the strip's grain."""

    image: int
    channel: int
    row: int
    column: int


class LabelStrides(NamedTuple):
    """Distances in a label map [N, H, W]; all but the last in units of the strip's grain."""

    image: int
    row: int
    column: int


class Program(NamedTuple):
    """What a program and its lanes work on; a run-time value, like the tuples below."""

    image: Any
    channel: Any  # scalar, or [lanes] in channels_last
    chunk: Any  # [lanes]
    first_column: Any
    first_row: Any


class Plane(NamedTuple):
    """One channel of a map."""

    pointer: Any
    row_stride: Any  # in grains
    column_stride: Any


class Row(NamedTuple):
    """Where the lanes are in a row of a plane."""

    number: Any
    chunk: Any  # [lanes]; with one column per lane that column
    limit: Any  # how many columns exist


# --- device functions: where a program is ---------------------------------------------------------


@triton.jit
def strip_program(channels, tiles_x, tiles_y, STRIP: tl.constexpr):
    """The program, from its number.

    In a channels_last map neighbouring addresses are channels: the lanes run over them, and a
    program has all channels. Otherwise a program has one channel, and the programs of a place's
    channels follow each other, so that the labels they share stay in the cache.
    """
    LANES: tl.constexpr = STRIP.lanes
    ROWS: tl.constexpr = STRIP.rows
    program = tl.program_id(0)
    tile = program if STRIP.channels_in_lanes else program // channels
    tile_x = tile % tiles_x
    tile_y = tile // tiles_x % tiles_y
    image = (tile // tiles_x // tiles_y).to(tl.int64)
    lane = tile_x * LANES + tl.arange(0, LANES)
    if STRIP.channels_in_lanes:
        channel = lane % channels
        chunk = lane // channels
    else:
        channel = program % channels
        chunk = lane
    return Program(
        image=image,
        channel=channel,
        chunk=chunk,
        first_column=tile_x * (LANES * STRIP.columns),
        first_row=tile_y * ROWS,
    )


@triton.jit
def plane_of(pointer, strides, program, STRIP: tl.constexpr):
    """The plane of a map that the program works on."""
    GRAIN: tl.constexpr = STRIP.grain
    offset = program.image * strides.image + program.channel.to(tl.int64) * strides.channel
    return Plane(
        pointer=pointer + offset * GRAIN, row_stride=strides.row, column_stride=strides.column
    )


@triton.jit
def label_plane_of(pointer, strides, program, STRIP: tl.constexpr):
    """The plane of a label map [N, H, W] that the program works on."""
    GRAIN: tl.constexpr = STRIP.grain
    return Plane(
        pointer=pointer + program.image * strides.image * GRAIN,
        row_stride=strides.row,
        column_stride=strides.column,
    )


@triton.jit
def row_of(plane, row, STRIP: tl.constexpr):
    """Pointer to a row of a plane, by the row's number."""
    GRAIN: tl.constexpr = STRIP.grain
    return plane.pointer + tl.cast(row, tl.int64) * plane.row_stride * GRAIN


@triton.jit
def counted(row, STRIP: tl.constexpr):
    """A row's number as loops count it; see _chunks_of. In 32 bits where no chunks are moved."""
    return row.to(tl.int64) if STRIP.grain > 1 else row


@triton.jit
def below(plane, row, STRIP: tl.constexpr):
    """The plane whose row 0 is one of this plane's rows.

    With it rows are numbered as the loop counts. The compiler then moves the pointer on from row to
    row, instead of multiplying by the stride every time.
    """
    return Plane(
        pointer=row_of(plane, row, STRIP),
        row_stride=plane.row_stride,
        column_stride=plane.column_stride,
    )


@triton.jit
def source_row(row, height, PADDING: tl.constexpr):
    """The image row that is at ``row`` of the padded image; outside [0, height) for zeros."""
    if PADDING == "reflect":
        row = tl.abs(row)
        row = height - 1 - tl.abs(height - 1 - row)
    elif PADDING == "replicate":
        row = tl.minimum(tl.maximum(row, 0), height - 1)
    return row


@triton.jit
def is_below(number, limit):
    """Whether 0 <= number < limit, in one comparison: unsigned, negative numbers are large."""
    return number.to(tl.uint32, bitcast=True) < limit.to(tl.uint32, bitcast=True)


@triton.jit
def row_limit(row, height, width):
    """The number of columns that exist in ``row``: all of them, or 0 outside the image."""
    return tl.where(is_below(row, height), width, 0)


@triton.jit
def source_column(column, limit, PADDING: tl.constexpr):
    """(source, exists): the image column that is at ``column`` of the padded image."""
    if PADDING == "reflect":
        column = tl.abs(column)
        column = tl.minimum(column, 2 * (limit - 1) - column)
    elif PADDING == "replicate":
        column = tl.minimum(tl.maximum(column, 0), limit - 1)
    return column.to(tl.int64), (column >= 0) & (column < limit)


# --- device functions: loads and stores -----------------------------------------------------------


@triton.jit
def split_columns(block, LANES: tl.constexpr, COLUMNS: tl.constexpr):
    """[LANES, COLUMNS] -> tuple of COLUMNS tensors [LANES]; free, since a lane owns its columns."""
    if COLUMNS == 2:
        first, second = tl.split(block)
        columns = (first, second)
    else:
        even, odd = tl.split(tl.reshape(block, (LANES, 2, 2)))
        column_0, column_2 = tl.split(even)
        column_1, column_3 = tl.split(odd)
        columns = (column_0, column_1, column_2, column_3)
    return columns


@triton.jit
def join_columns(columns, LANES: tl.constexpr, COLUMNS: tl.constexpr):
    """The inverse of split_columns."""
    if COLUMNS == 2:
        block = tl.join(columns[0], columns[1])
    else:
        even = tl.join(columns[0], columns[2])
        odd = tl.join(columns[1], columns[3])
        block = tl.reshape(tl.join(even, odd), (LANES, COLUMNS))
    return block


@triton.jit
def _dealt(columns, LANES: tl.constexpr, COLUMNS: tl.constexpr):
    """A tuple of COLUMNS tensors [LANES] in which neighbouring lanes hold neighbouring columns.

    They exchange them through shared memory.
    """
    block = tl.reshape(join_columns(columns, LANES, COLUMNS), (COLUMNS, LANES))
    return split_columns(tl.trans(block), LANES, COLUMNS)


@triton.jit
def widened(loaded):
    """The values in the dtype of the arithmetic: float32, or float64 for float64."""
    result = loaded
    if loaded.dtype != tl.float64:
        result = loaded.to(tl.float32)
    return result


@triton.jit
def zeros(plane, STRIP: tl.constexpr):
    """Zeros [lanes] in the dtype of the arithmetic on a plane."""
    LANES: tl.constexpr = STRIP.lanes
    if plane.pointer.dtype.element_ty == tl.float64:
        result = tl.zeros((LANES,), tl.float64)
    else:
        result = tl.zeros((LANES,), tl.float32)
    return result


@triton.jit
def shifted_columns(
    row_ptr, row, STRIP: tl.constexpr, SHIFT: tl.constexpr, COUNT: tl.constexpr,
    OTHER: tl.constexpr,
):  # fmt: skip
    """load_columns of a row that begins anywhere, but whose columns are neighbours in memory.

    Loaded are the aligned chunks that hold the columns, each by one wide instruction; the place in
    the first of them at which the columns begin, another one in each row, says which values to
    take. Values of less than 32 bits are taken several at a time. No page of memory ends within an
    aligned chunk: one that holds a single column of the row may be loaded whole.
    """
    LANES: tl.constexpr = STRIP.lanes
    SIZE: tl.constexpr = row_ptr.dtype.element_ty.primitive_bitwidth // 8
    UNIT: tl.constexpr = max(SIZE, 4)  # bytes of what is chosen
    UNITS: tl.constexpr = max(STRIP.columns * SIZE // UNIT, 1)  # of a chunk
    PLACES: tl.constexpr = UNITS * UNIT // SIZE
    CHUNKS: tl.constexpr = (COUNT + 2 * PLACES - 2) // PLACES
    NEEDED: tl.constexpr = (COUNT * SIZE + UNIT - SIZE + UNIT - 1) // UNIT
    start = row.chunk * STRIP.columns + SHIFT
    address = (row_ptr + start).to(tl.int64)  # [LANES]
    place = (address.to(tl.int32) & (SIZE * (PLACES - 1))) // SIZE
    unit_type: tl.constexpr = row_ptr.dtype.element_ty if SIZE >= 4 else tl.uint32
    aligned_ptr = (address & -(SIZE * PLACES)).to(tl.pointer_type(unit_type))
    aligned_ptr = tl.multiple_of(aligned_ptr, min(SIZE * PLACES, 16))

    # A chunk is there if its first column is before the limit, and its last not before 0.
    limit = tl.where(row.limit > 0, row.limit + place, 0)
    units = ()
    for j in tl.static_range(CHUNKS):
        exists = start + j * PLACES < limit
        if SHIFT + j * PLACES < 0:
            exists = exists & (start + (j * PLACES + PLACES - 1) >= place)
        if UNITS == 1:
            units = units + (tl.load(aligned_ptr + j, mask=exists, other=0),)
        else:
            pointer = aligned_ptr[:, None] + tl.arange(0, UNITS)[None, :]  # [LANES, UNITS]
            mask = tl.broadcast_to(exists[:, None], (LANES, UNITS))
            block = tl.load(pointer + j * UNITS, mask=mask, other=0)
            units = units + split_columns(block, LANES, UNITS)
    if UNITS == 4:
        units = _moved(units, place & (PLACES // 2) != 0, 2, NEEDED + 1)
    if UNITS >= 2:
        units = _moved(units, place & (PLACES // UNITS) != 0, 1, NEEDED)
    if SIZE < 4:
        units = _unpacked(units, (place % (4 // SIZE)) * (8 * SIZE), row_ptr, COUNT)
    values = ()
    inside = ()
    for j in tl.static_range(COUNT):
        exists = is_below(start + j, row.limit)
        inside = inside + (exists,)
        values = values + (units[j] if OTHER is None else tl.where(exists, units[j], OTHER),)
    return values, inside


@triton.jit
def _moved(units, condition, BY: tl.constexpr, COUNT: tl.constexpr):
    """The first COUNT of a tuple or, on a condition, those BY places later."""
    moved = ()
    for j in tl.static_range(COUNT):
        if j + BY < len(units):
            moved = moved + (tl.where(condition, units[j + BY], units[j]),)
        else:
            moved = moved + (units[j],)
    return moved


@triton.jit
def _unpacked(units, bit, like, COUNT: tl.constexpr):
    """COUNT values of less than 32 bits, of which the first begins at a bit of the first unit."""
    value_type: tl.constexpr = like.dtype.element_ty
    BITS: tl.constexpr = value_type.primitive_bitwidth
    EACH: tl.constexpr = 32 // BITS
    bits_type: tl.constexpr = tl.uint8 if BITS == 8 else tl.uint16
    values = ()
    for j in tl.static_range(COUNT):
        if j % EACH == 0:
            unit = units[j // EACH].to(tl.uint64)
            if j // EACH + 1 < len(units):
                unit = unit | (units[j // EACH + 1].to(tl.uint64) << 32)
            unit = (unit >> bit).to(tl.uint32)
        value = (unit >> (j % EACH) * BITS).to(bits_type)
        values = values + (value.to(value_type, bitcast=True),)
    return values


@triton.jit
def _chunks_of(plane, row, STRIP: tl.constexpr):
    """Pointers [LANES, COLUMNS] to each lane's chunk in a row, where chunks are moved at once.

    Rows that a loop counts in 64 bits come last: the pointers to row 0 stay the same in the loop,
    and planes with the same strides share what is added to them.
    """
    COLUMNS: tl.constexpr = STRIP.columns
    own = (row.chunk * COLUMNS)[:, None] + tl.arange(0, COLUMNS)[None, :]
    if (row.number + row.chunk).dtype == tl.int64:  # the number may be the interpreter's, of Python
        pointer = plane.pointer + own + row.number * plane.row_stride * COLUMNS
    else:
        pointer = row_of(plane, row.number, STRIP) + own
    return pointer


@triton.jit
def load_columns(
    plane, row, STRIP: tl.constexpr, SHIFT: tl.constexpr, COUNT: tl.constexpr,
    PADDING: tl.constexpr, OTHER: tl.constexpr = 0,
):  # fmt: skip
    """(values, inside): COUNT columns of one row from SHIFT columns after each chunk's first.

    ``inside`` tells which of them exist; the others are OTHER, or may be anything if it is None.
    Chunks are loaded whole, one wide instruction each, where their columns are neighbours in
    memory; else, and where columns are mirrored, every column on its own.
    """
    LANES: tl.constexpr = STRIP.lanes
    COLUMNS: tl.constexpr = STRIP.columns
    row_ptr = row_of(plane, row.number, STRIP)
    values = ()
    inside = ()
    REST: tl.constexpr = 0 if OTHER is None else OTHER
    if STRIP.shifted and (PADDING == "zeros" or PADDING == "valid"):
        values, inside = shifted_columns(row_ptr, row, STRIP, SHIFT, COUNT, OTHER)
    elif STRIP.grain > 1:
        FIRST: tl.constexpr = SHIFT // COLUMNS
        SKIP: tl.constexpr = SHIFT - FIRST * COLUMNS
        CHUNKS: tl.constexpr = (SKIP + COUNT + COLUMNS - 1) // COLUMNS
        start = row.chunk * COLUMNS
        pointer = _chunks_of(plane, row, STRIP)
        for j in tl.static_range(CHUNKS):
            exists = is_below(start + (FIRST + j) * COLUMNS, row.limit)
            mask = tl.broadcast_to(exists[:, None], (LANES, COLUMNS))
            # A constant added to the pointer is part of the load instruction.
            block = tl.load(pointer + (FIRST + j) * COLUMNS, mask=mask, other=REST)
            loaded = split_columns(block, LANES, COLUMNS)
            for v in tl.static_range(COLUMNS):
                if j * COLUMNS + v >= SKIP and j * COLUMNS + v < SKIP + COUNT:
                    values = values + (loaded[v],)
                    inside = inside + (exists,)
    else:
        for j in tl.static_range(COUNT):
            source, exists = source_column(row.chunk * COLUMNS + (SHIFT + j), row.limit, PADDING)
            pointer = row_ptr + source * plane.column_stride
            values = values + (tl.load(pointer, mask=exists, other=REST),)
            inside = inside + (exists,)
    return values, inside


@triton.jit
def load_values(
    plane, row, STRIP: tl.constexpr, SHIFT: tl.constexpr, COUNT: tl.constexpr, PADDING: tl.constexpr
):
    """The values of load_columns, in the dtype of the arithmetic."""
    loaded, inside = load_columns(plane, row, STRIP, SHIFT, COUNT, PADDING)
    values = ()
    for j in tl.static_range(COUNT):
        values = values + (widened(loaded[j]),)
    return values


@triton.jit
def load_column(plane, row, column, STRIP: tl.constexpr, PADDING: tl.constexpr):
    """The values at ``column`` of each lane, in the dtype of the arithmetic; not of row.chunk."""
    source, exists = source_column(column, row.limit, PADDING)
    pointer = row_of(plane, row.number, STRIP) + source * plane.column_stride
    return widened(tl.load(pointer, mask=exists, other=0))


@triton.jit
def store_columns(plane, row, columns, STRIP: tl.constexpr):
    """Store a tuple of columns as the columns of each lane's chunk."""
    LANES: tl.constexpr = STRIP.lanes
    COLUMNS: tl.constexpr = STRIP.columns
    row_ptr = row_of(plane, row.number, STRIP)
    if STRIP.grain > 1:
        inside = row.chunk * COLUMNS < row.limit
        mask = tl.broadcast_to(inside[:, None], (LANES, COLUMNS))
        tl.store(_chunks_of(plane, row, STRIP), join_columns(columns, LANES, COLUMNS), mask=mask)
    elif STRIP.shifted:
        dealt = _dealt(columns, LANES, COLUMNS)
        first = row.chunk * COLUMNS - tl.arange(0, LANES) * (COLUMNS - 1)
        pointer = row_ptr + first
        for v in tl.static_range(COLUMNS):
            tl.store(pointer + v * LANES, dealt[v], mask=first < row.limit - v * LANES)
    else:
        for v in tl.static_range(COLUMNS):
            column = row.chunk * COLUMNS + v
            inside = column < row.limit
            pointer = row_ptr + column.to(tl.int64) * plane.column_stride
            tl.store(pointer, columns[v], mask=inside)

"""The kernels of affinity fields: entries of all pairs of neighbours, and their gradient.

Going forward every pair is seen once, from the pixel that comes first, and gives an entry of either
direction. Going back every pixel gathers what the pairs with its eight neighbours leave to it, in
both of its roles. Nothing is saved: the statistics of a softmax are found anew, in a first pass
over the classes.

Bytes per pass, with L of logits and T of labels: forward L + T, and backward 2 L + T with the
gradient, if the second passes over the classes find the logits in the cache. Arithmetic takes far
longer: some 280 instructions for every logit going forward, and 440 going back, or 760 where the
logits have 16 bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .._engine.math import LN_2, LOG2_E
from .._engine.sums import Sums, comes_last, leave, total
from .stencil import (
    Field,
    Values,
    View,
    beyond,
    divergences,
    factors_of,
    is_inside,
    label_at,
    labels_around,
    load_logits,
    log_probability,
    pairs_of_row,
    place_of_program,
    statistics_of,
    view_of,
    where_counted,
    with_row,
)

# --- forward --------------------------------------------------------------------------------------


@triton.jit
def _affinity_forward_kernel(
    logits_ptr,  # [N, C, H, W]
    target_ptr,  # [N, H, W]
    edge_table_ptr,  # [C], or None
    other_table_ptr,  # [C], or None
    loss_ptr,  # []
    scale_ptr,  # [2]: what an edge adds to the loss, and any other entry
    scratch_ptr,
    tickets_ptr,
    logits_strides,
    target_strides,
    table_strides,
    height,
    width,
    row_blocks,
    column_blocks,
    classes,
    programs,
    margin,
    edge_weight,
    other_weight,
    FIRST: tl.constexpr,
    STENCIL: tl.constexpr,
):
    """Reads labels and logits, adds up the entries; with FIRST the loss is no other size's yet."""
    LANES: tl.constexpr = STENCIL.lanes
    ROWS: tl.constexpr = STENCIL.rows
    dtype: tl.constexpr = tl.float64 if STENCIL.double else tl.float32
    place = place_of_program(height, width, row_blocks, column_blocks, STENCIL)
    view = view_of(logits_ptr, logits_strides, place, STENCIL)
    labels = labels_around(target_ptr, target_strides, place, STENCIL)

    # which pairs count, and how many entries they are
    pairs = ()
    pair_count = tl.zeros((LANES,), tl.int32)
    apart_count = tl.zeros((LANES,), tl.int32)  # pairs of different labels
    for r in tl.static_range(ROWS):
        bits = pairs_of_row(labels, r, 4, STENCIL)
        pairs = pairs + (bits,)
        for k in tl.static_range(4, 8):
            there = label_at(labels, r + (k + 1) // 3 - 1, (k + 1) % 3 - 1)
            count = ((bits >> (2 * k)) & 1) + ((bits >> (2 * k + 1)) & 1)
            pair_count += count
            apart_count += tl.where(there != label_at(labels, r, 0), count, 0)
    one = tl.full((), 1.0, dtype)
    field = Field(
        labels=labels,
        pairs=pairs,
        edge=factors_of(edge_table_ptr, table_strides[0], one, labels, STENCIL),
        other=factors_of(other_table_ptr, table_strides[1], one, labels, STENCIL),
        margin=one * margin * LOG2_E,
    )

    # the entries of all classes
    statistics = statistics_of(view, labels, classes, STENCIL)
    edges = tl.zeros((LANES,), dtype)
    others = tl.zeros((LANES,), dtype)
    pointer = view.pointer
    for channel in tl.range(0, classes):
        here = View(pointer=pointer, rows=view.rows, columns=view.columns, stride=view.stride)
        values = Values(log_p=(), log_q=(), p=(), q=(), raw=(), raw_log_q=())
        values = with_row(values, here, statistics, labels, 1, STENCIL)
        for r in tl.static_range(ROWS):
            values = with_row(values, here, statistics, labels, r + 2, STENCIL)
            for k in tl.static_range(4, 8):
                edge, other = _entries_of_pair(values, field, channel, r, k)
                edges += edge
                others += other
        pointer += view.stride

    # the means, by the program that comes last
    sums = Sums(scratch=scratch_ptr, tickets=tickets_ptr, programs=programs, rows=4)
    leave(sums, 0, tl.sum(edges))
    leave(sums, 1, tl.sum(others))
    leave(sums, 2, tl.sum(pair_count))
    leave(sums, 3, tl.sum(apart_count))
    if comes_last(sums):
        edge_count = 2 * total(sums, 3)
        other_count = classes * total(sums, 2) - edge_count
        edge_scale = tl.where(edge_count > 0, edge_weight / tl.maximum(edge_count, 1.0), 0.0)
        other_scale = tl.where(other_count > 0, other_weight / tl.maximum(other_count, 1.0), 0.0)
        loss = (edge_scale * total(sums, 0) + other_scale * total(sums, 1)) * LN_2
        if not FIRST:
            loss += tl.load(loss_ptr)
        tl.store(loss_ptr, loss)
        tl.store(scale_ptr, edge_scale)
        tl.store(scale_ptr + 1, other_scale)


@triton.jit
def _entries_of_pair(values, field, channel, ROW: tl.constexpr, K: tl.constexpr):
    """(edges, other entries) of a pixel and its neighbour K, of 4 to 7, in both directions."""
    DOWN: tl.constexpr = (K + 1) // 3 - 1
    RIGHT: tl.constexpr = (K + 1) % 3 - 1
    # The values begin with the program's first row, factors with the row above it.
    HERE: tl.constexpr = 3 * ROW + 1
    THERE: tl.constexpr = 3 * (ROW + DOWN) + 1 + RIGHT
    there, back, _, _ = divergences(values, HERE, THERE)
    is_edge = (label_at(field.labels, ROW, 0) == channel) != (
        label_at(field.labels, ROW + DOWN, RIGHT) == channel
    )
    bits = field.pairs[ROW]
    goes = (bits & (1 << (2 * K))) != 0
    comes = (bits & (2 << (2 * K))) != 0
    edge = tl.where(goes & is_edge, field.edge[HERE + 3] * beyond(there, field.margin), 0.0)
    edge += tl.where(comes & is_edge, field.edge[THERE + 3] * beyond(back, field.margin), 0.0)
    other = tl.where(goes & ~is_edge, field.other[HERE + 3] * there, 0.0)
    other += tl.where(comes & ~is_edge, field.other[THERE + 3] * back, 0.0)
    return edge, other


# --- backward -------------------------------------------------------------------------------------


class Sides(NamedTuple):
    """Sums over the classes of p dL/dp, tuples over a program's rows."""

    rest: Any  # of the classes with a probability of up to a half
    dominant: Any  # of the class above that, if there is one


@triton.jit
def _affinity_backward_kernel(
    upstream_ptr,  # []
    scale_ptr,  # [2]
    logits_ptr,  # [N, C, H, W]
    target_ptr,  # [N, H, W]
    edge_table_ptr,  # [C], or None
    other_table_ptr,  # [C], or None
    grad_ptr,  # [N, C, H, W], or None if only the tables need a gradient
    entries_ptr,  # [programs, 2, C]: sums of the entries of each centre's class; or None
    logits_strides,
    target_strides,
    table_strides,
    grad_strides,
    height,
    width,
    row_blocks,
    column_blocks,
    classes,
    margin,
    STORED: tl.constexpr,
    ADDS: tl.constexpr,
    STENCIL: tl.constexpr,
):
    """Reads labels and logits, writes the gradient, or ADDS it to what is there.

    The sum over classes of p dL/dp comes first. What it is made of is STORED where the gradient
    will be, or found once more if that has too few digits, or is the gradient of other sizes.
    """
    ROWS: tl.constexpr = STENCIL.rows
    dtype: tl.constexpr = tl.float64 if STENCIL.double else tl.float32
    place = place_of_program(height, width, row_blocks, column_blocks, STENCIL)
    view = view_of(logits_ptr, logits_strides, place, STENCIL)
    labels = labels_around(target_ptr, target_strides, place, STENCIL)
    pairs = ()
    for r in tl.static_range(ROWS):
        pairs = pairs + (pairs_of_row(labels, r, 0, STENCIL),)
    upstream = tl.load(upstream_ptr).to(dtype)
    edge_scale = upstream * tl.load(scale_ptr) * -1.0  # an edge's entry falls with the divergence
    other_scale = upstream * tl.load(scale_ptr + 1)
    field = Field(
        labels=labels,
        pairs=pairs,
        edge=factors_of(edge_table_ptr, table_strides[0], edge_scale, labels, STENCIL),
        other=factors_of(other_table_ptr, table_strides[1], other_scale, labels, STENCIL),
        margin=tl.full((), LOG2_E, dtype) * margin,
    )

    statistics = statistics_of(view, labels, classes, STENCIL)
    grad_view = view
    if grad_ptr is not None:
        grad_view = view_of(grad_ptr, grad_strides, place, STENCIL)
    STORES: tl.constexpr = STORED and grad_ptr is not None
    ADDS_UP: tl.constexpr = entries_ptr is not None
    sides, entries = _gather(
        (view, grad_view), place, statistics, field, classes, STORES, ADDS_UP, STENCIL
    )
    if grad_ptr is not None:
        tl.debug_barrier()
        _write((view, grad_view), place, statistics, field, (sides, classes), STORED, ADDS, STENCIL)
    if entries_ptr is not None:
        _store_entries(entries_ptr, entries, labels, classes, STENCIL)


@triton.jit
def _gather(
    views,
    place,
    statistics,
    field,
    classes,
    STORES: tl.constexpr,
    ADDS_UP: tl.constexpr,
    STENCIL: tl.constexpr,
):
    """(sums of p dL/dp, a program's entries), after all classes; with STORES p dL/dp is stored."""
    LANES: tl.constexpr = STENCIL.lanes
    ROWS: tl.constexpr = STENCIL.rows
    view, grad_view = views
    zeros = tl.zeros((LANES,), tl.float64 if STENCIL.double else tl.float32)
    rest = ()
    for _ in tl.static_range(ROWS):
        rest = rest + (zeros,)
    dominant = rest
    edges = rest
    others = rest
    pointer = view.pointer
    grad_pointer = grad_view.pointer
    for channel in tl.range(0, classes):
        here = View(pointer=pointer, rows=view.rows, columns=view.columns, stride=view.stride)
        values = Values(log_p=(), log_q=(), p=(), q=(), raw=(), raw_log_q=())
        values = with_row(values, here, statistics, field.labels, 0, STENCIL)
        values = with_row(values, here, statistics, field.labels, 1, STENCIL)
        new_rest = ()
        new_dominant = ()
        new_edges = ()
        new_others = ()
        for r in tl.static_range(ROWS):
            values = with_row(values, here, statistics, field.labels, r + 2, STENCIL)
            slope, edge, other = _slope(values, field, channel, r, ADDS_UP)
            if STORES:
                pointers = grad_pointer + grad_view.rows[r + 1] + grad_view.columns[1]
                tl.store(pointers, slope, mask=is_inside(place, r, 0, STENCIL))
            is_dominant = values.raw[3 * r + 4] > 0.5
            new_rest = new_rest + (rest[r] + tl.where(is_dominant, 0.0, slope),)
            new_dominant = new_dominant + (tl.where(is_dominant, slope, dominant[r]),)
            new_edges = new_edges + (edges[r] + edge,)
            new_others = new_others + (others[r] + other,)
        rest = new_rest
        dominant = new_dominant
        edges = new_edges
        others = new_others
        pointer += view.stride
        grad_pointer += grad_view.stride
    return Sides(rest=rest, dominant=dominant), (edges, others)


@triton.jit
def _slope(values, field, channel, ROW: tl.constexpr, ADDS_UP: tl.constexpr):
    """(p dL/dp, edges, other entries) of a row's pixels and one class, over all neighbours."""
    HERE: tl.constexpr = 3 * (ROW + 1) + 1
    own = label_at(field.labels, ROW, 0) == channel
    raw = values.raw[HERE]
    # sums over the neighbours j, as a centre: of dL/dD p_j and dL/dD q_j
    of_p = tl.zeros_like(raw)
    of_q = tl.zeros_like(raw)
    # and as the neighbour of their centre: of dL/dD, and times log p_j / p_i and log q_j / q_i
    weight = tl.zeros_like(raw)
    of_log_p = tl.zeros_like(raw)
    of_log_q = tl.zeros_like(raw)
    edges = tl.zeros_like(raw)
    others = tl.zeros_like(raw)
    for k in tl.static_range(8):
        factors, logs, probabilities, entries = _neighbour(values, field, channel, own, ROW, k)
        out, into = factors
        a, b = logs
        p, q = probabilities
        of_p += out * p
        of_q += out * q
        weight += into
        of_log_p += into * a
        of_log_q += into * b
        if ADDS_UP:
            edge, other = entries
            edges += edge
            others += other
    through_p = raw * (weight - of_log_p * LN_2) - of_p
    inverse_q = tl.exp2(values.log_q[HERE] * -1.0)
    through_q = raw * (of_q * inverse_q - (weight - of_log_q * LN_2))
    return where_counted(values, HERE, through_p, through_q), edges, others


@triton.jit
def _neighbour(values, field, channel, own, ROW: tl.constexpr, K: tl.constexpr):
    """((dL/dD as a centre, as the neighbour), logs, (p, q), entries) of neighbour K of a row."""
    DOWN: tl.constexpr = (K + K // 4) // 3 - 1
    RIGHT: tl.constexpr = (K + K // 4) % 3 - 1
    HERE: tl.constexpr = 3 * (ROW + 1) + 1
    THERE: tl.constexpr = HERE + 3 * DOWN + RIGHT
    goes, comes, a, b = divergences(values, HERE, THERE)
    is_edge = own != (label_at(field.labels, ROW + DOWN, RIGHT) == channel)
    does_go = (field.pairs[ROW] & (1 << (2 * K))) != 0
    does_come = (field.pairs[ROW] & (2 << (2 * K))) != 0
    edge = tl.where(goes >= field.margin, 0.0, field.edge[HERE])
    out = tl.where(does_go, tl.where(is_edge, edge, field.other[HERE]), 0.0)
    edge = tl.where(comes >= field.margin, 0.0, field.edge[THERE])
    into = tl.where(does_come, tl.where(is_edge, edge, field.other[THERE]), 0.0)
    entries = (
        tl.where(does_go & is_edge, beyond(goes, field.margin), 0.0),
        tl.where(does_go & ~is_edge, goes, 0.0),
    )
    return (out, into), (a, b), (values.p[THERE], values.q[THERE]), entries


@triton.jit
def _write(
    views,
    place,
    statistics,
    field,
    gathered,
    STORED: tl.constexpr,
    ADDS: tl.constexpr,
    STENCIL: tl.constexpr,
):
    """Store the gradient p (dL/dp - sum of p dL/dp) of all classes."""
    ROWS: tl.constexpr = STENCIL.rows
    view, grad_view = views
    sides, classes = gathered
    pointer = view.pointer
    grad_pointer = grad_view.pointer
    for channel in tl.range(0, classes):
        here = View(pointer=pointer, rows=view.rows, columns=view.columns, stride=view.stride)
        values = Values(log_p=(), log_q=(), p=(), q=(), raw=(), raw_log_q=())
        if not STORED:
            values = with_row(values, here, statistics, field.labels, 0, STENCIL)
            values = with_row(values, here, statistics, field.labels, 1, STENCIL)
        for r in tl.static_range(ROWS):
            inside = is_inside(place, r, 0, STENCIL)
            pointers = grad_pointer + grad_view.rows[r + 1] + grad_view.columns[1]
            if STORED:
                z = load_logits(here, field.labels, 3 * r + 4, STENCIL)
                p = tl.exp2(log_probability(z, statistics, 3 * r + 4, STENCIL))
                slope = tl.load(pointers, mask=inside, other=0.0)
            else:
                values = with_row(values, here, statistics, field.labels, r + 2, STENCIL)
                p = values.raw[3 * r + 4]
                slope, _, _ = _slope(values, field, channel, r, False)
            # Of the dominant class its own part is taken out of the sum: 1 - p has few digits.
            of_dominant = tl.exp2(statistics.log_rest[3 * r + 4]) * slope - p * sides.rest[r]
            of_others = slope - p * (sides.rest[r] + sides.dominant[r])
            gradient = tl.where(p > 0.5, of_dominant, of_others)
            gradient = tl.where(label_at(field.labels, r, 0) >= 0, gradient, 0.0)
            if ADDS:
                gradient += tl.load(pointers, mask=inside, other=0.0).to(p.dtype)
            tl.store(pointers, gradient, mask=inside)
        pointer += view.stride
        grad_pointer += grad_view.stride


@triton.jit
def _store_entries(entries_ptr, entries, labels, classes, STENCIL: tl.constexpr):
    """Store the sums of a program's entries over the pixels of each class."""
    ROWS: tl.constexpr = STENCIL.rows
    edges, others = entries
    pointer = entries_ptr + tl.program_id(0).to(tl.int64) * 2 * classes
    for channel in tl.range(0, classes):
        edge = tl.zeros_like(edges[0])
        other = tl.zeros_like(edges[0])
        for r in tl.static_range(ROWS):
            is_own = label_at(labels, r, 0) == channel
            edge += tl.where(is_own, edges[r], 0.0)
            other += tl.where(is_own, others[r], 0.0)
        tl.store(pointer + channel, tl.sum(edge) * LN_2)
        tl.store(pointer + classes + channel, tl.sum(other) * LN_2)

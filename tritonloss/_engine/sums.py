"""Sums over all programs of a kernel, finished by the program that comes last.

Every program leaves its partial sums and takes a ticket of its group. The program with the group's
last ticket adds up what the group has left, in the order of the programs and in float64. It then
takes a ticket of the next level for the group, and so on. The bits are the same whichever program
comes last, and no second launch is needed. The tickets only count: the program with the last one
puts the counter back to 0 for the next launch.

In a kernel, with ``sums`` for the ``Sums`` of its arguments and two rows:

    leave(sums, 0, tl.sum(values))
    leave(sums, 1, tl.sum(counts))
    if comes_last(sums):
        tl.store(mean_ptr, total(sums, 0) / total(sums, 1))

and in its launcher ``**sums_over(programs, 2, device)`` for the three arguments.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .._core import backend

# Programs of a group: two for each thread of four warps.
_GROUP = tl.constexpr(256)


class Sums(NamedTuple):
    """Where a kernel's programs leave their partial sums."""

    scratch: Any  # float64 [1 + elements of all levels, rows]: the totals, then what is added up
    tickets: Any  # int32 [groups of all levels], all 0 between launches
    programs: Any  # of the kernel
    rows: Any  # the number of sums


# --- device functions -----------------------------------------------------------------------------


@triton.jit
def leave(sums, row, partial):
    """Store this program's partial sum, a scalar, in a row."""
    tl.store(_element(sums, row, tl.program_id(0)), partial.to(tl.float64))


@triton.jit
def comes_last(sums):
    """Whether all programs have left their partial sums in all rows, so that ``total`` is known."""
    index = tl.program_id(0)  # among the ``count`` elements of this level, which begin at ``base``
    count = sums.programs
    base = 0
    first_ticket = 0  # of the groups of this level
    finished = False
    goes_on = True
    # A loop over the levels, with no loop over a level's elements inside it. Unrolled, that would
    # take more registers than the kernel around it.
    while goes_on:
        group = index // _GROUP
        groups = tl.cdiv(count, _GROUP)
        size = tl.minimum(count - group * _GROUP, _GROUP)
        goes_on = False
        if _takes_last(sums.tickets + (first_ticket + group), size):
            finished = groups == 1
            goes_on = groups > 1
            result = tl.where(finished, -1, base + count + group)
            _add_up(sums, base + group * _GROUP, size, result)
            first_ticket += groups
            base += count
            index = group
            count = groups
    if finished:
        tl.debug_barrier()
    return finished


@triton.jit
def total(sums, row):
    """The sum of a row over all programs, float64; for the program that comes last."""
    return tl.load(_element(sums, row, -1))


@triton.jit
def _add_up(sums, first, size, result):
    """Store the sum of some elements of every row, one row after the other."""
    lane = tl.arange(0, _GROUP)
    for row in tl.range(0, sums.rows):
        elements = tl.load(_element(sums, row, first + lane), mask=lane < size, other=0.0)
        tl.store(_element(sums, row, result), tl.sum(elements))


@triton.jit
def _element(sums, row, index):
    """Pointer to an element of a row, by its index; -1 is the total."""
    # 32 bits hold the index: more programs than that would have more pixels than there is memory.
    return sums.scratch + ((index + 1) * sums.rows + row)


@triton.jit
def _takes_last(ticket_ptr, count):
    """Whether this ticket is the last of ``count``; then the counter is 0 again."""
    # All threads of the program have stored before one of them takes the ticket, so that whoever
    # sees the ticket sees what they have stored. On AMD's GPUs that holds for the wave that takes
    # the ticket: scalars, which is all that is left, are stored by the same thread.
    tl.debug_barrier()
    is_last = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu") == count - 1
    if is_last:
        tl.store(ticket_ptr, 0)
    return is_last


# --- launchers ------------------------------------------------------------------------------------


class Room(NamedTuple):
    """What the kernels of one stream use for their sums, one kernel after the other."""

    scratch: torch.Tensor
    tickets: torch.Tensor


# Of every device and stream, as large as was ever needed, at most a few numbers per program. Kept
# because only the kernels themselves put the tickets back to 0, and to spare the host allocations.
_kept: dict[tuple[torch.device, int], Room] = {}


def sums_over(programs: int, rows: int, device: torch.device) -> dict[str, Any]:
    """Arguments of a kernel that has ``rows`` sums: scratch_ptr, tickets_ptr and programs."""
    elements, groups = sizes(programs)
    room = _room((1 + elements) * rows, groups, device)
    return {"scratch_ptr": room.scratch, "tickets_ptr": room.tickets, "programs": programs}


@functools.lru_cache(maxsize=4096)
def sizes(programs: int) -> tuple[int, int]:
    """(elements, groups) of all levels together, for one program or more."""
    elements, level = programs, -(-programs // _GROUP.value)
    groups = level
    while level > 1:
        elements += level
        level = -(-level // _GROUP.value)
        groups += level
    return elements, groups


def tickets(count: int, device: torch.device) -> torch.Tensor:
    """At least ``count`` zeros that no other stream's kernels count on."""
    return _room(0, count, device).tickets


def _room(elements: int, tickets: int, device: torch.device) -> Room:
    """At least so much room for the current stream."""
    # A captured graph may run on any stream: it gets room of its own, whose tickets it zeroes.
    # Where the interpreter runs a kernel may break off in the middle and leave tickets behind.
    if backend.INTERPRETED or backend.is_captured(device):
        return _new_room(elements, tickets, device)
    key = (device, backend.stream_of(device))
    room = _kept.get(key)
    if room is None:
        room = _kept[key] = _new_room(4096, 1024, device)
    most, count = room.scratch.numel(), room.tickets.numel()
    if elements > most or tickets > count:
        room = _kept[key] = _new_room(max(elements, most), max(tickets, count), device)
    return room


def _new_room(elements: int, tickets: int, device: torch.device) -> Room:
    return Room(
        torch.empty(elements, dtype=torch.float64, device=device),
        torch.zeros(tickets, dtype=torch.int32, device=device),
    )

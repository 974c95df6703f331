"""Sums over all programs of a kernel, finished by the program that comes last.

Every program leaves its partial sums and takes a ticket. The last one of a group adds up what its
group has left, the last one of all adds up the groups, each in the order of the programs and in
float64: whoever comes last, the bits are the same, and no second launch is needed. The tickets are
integers that only count; who takes the last one puts the counter back to 0 for the next launch.

In a kernel, with ``sums = Sums(scratch_ptr, tickets_ptr, programs)``:

    leave(sums, 0, tl.sum(values))
    leave(sums, 1, tl.sum(counts))
    if comes_last(sums, 2):
        tl.store(mean_ptr, total(sums, 0) / total(sums, 1))

and in its launcher ``**sums_over(programs, 2, device)`` for the three arguments.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

# Programs of a group. With 256 of them a sum over ten thousand programs is two short loops.
_GROUP = tl.constexpr(256)


class Sums(NamedTuple):
    """Where a kernel's programs leave their partial sums."""

    scratch: Any  # float64 [rows, programs + groups]
    tickets: Any  # int32 [1 + groups], all 0 between launches
    programs: Any


# --- device functions -----------------------------------------------------------------------------


@triton.jit
def leave(sums, row, partial):
    """Leave a program's partial sum, a scalar, in a row."""
    tl.store(_row(sums, row) + tl.program_id(0), partial.to(tl.float64))


@triton.jit
def comes_last(sums, ROWS: tl.constexpr):
    """Whether all programs have left their partial sums in all rows, so that ``total`` is known."""
    program = tl.program_id(0)
    groups = tl.cdiv(sums.programs, _GROUP)
    group = program // _GROUP
    first = group * _GROUP
    size = tl.minimum(sums.programs - first, _GROUP)
    finished = False
    if _takes_last(sums.tickets + 1 + group, size):
        lane = tl.arange(0, _GROUP)
        for row in tl.static_range(ROWS):
            partials = tl.load(_row(sums, row) + first + lane, mask=lane < size, other=0.0)
            tl.store(_row(sums, row) + sums.programs + group, tl.sum(partials))
        finished = _takes_last(sums.tickets, groups)
    return finished


@triton.jit
def total(sums, row):
    """The sum of a row over all programs, float64; for the program that comes last."""
    groups = tl.cdiv(sums.programs, _GROUP)
    lane = tl.arange(0, _GROUP)
    result = tl.zeros((_GROUP,), tl.float64)
    for start in tl.range(0, groups, _GROUP):
        pointers = _row(sums, row) + sums.programs + start + lane
        result += tl.load(pointers, mask=start + lane < groups, other=0.0)
    return tl.sum(result)


@triton.jit
def _row(sums, row):
    stride = sums.programs + tl.cdiv(sums.programs, _GROUP)
    return sums.scratch + stride.to(tl.int64) * row


@triton.jit
def _takes_last(ticket_ptr, count):
    """Whether ``count`` programs have been here with this one; if so the next launch may come."""
    # What the program's threads have stored is seen by whoever sees its ticket.
    tl.debug_barrier()
    is_last = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu") == count - 1
    if is_last:
        tl.store(ticket_ptr, 0)
    return is_last


# --- launchers ------------------------------------------------------------------------------------

# Tickets of every device and stream, kept because only the kernels themselves put them back to 0.
_kept: dict[tuple[torch.device, int], torch.Tensor] = {}


def sums_over(programs: int, rows: int, device: torch.device) -> dict[str, Any]:
    """The arguments scratch_ptr, tickets_ptr and programs of a kernel that has ``rows`` sums."""
    groups = -(-programs // _GROUP.value)
    return {
        "scratch_ptr": torch.empty(rows, programs + groups, dtype=torch.float64, device=device),
        "tickets_ptr": tickets(groups + 1, device),
        "programs": programs,
    }


def tickets(count: int, device: torch.device) -> torch.Tensor:
    """At least ``count`` zeros that no other stream's kernels count on."""
    # A captured graph may run on any stream: it gets tickets of its own, and zeroes them itself.
    # Where the interpreter runs a kernel may break off in the middle and leave tickets behind.
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    key = (device, triton.runtime.driver.active.get_current_stream(device.index))
    found = _kept.get(key)
    if found is None or found.numel() < count:
        found = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
        _kept[key] = found
    return found

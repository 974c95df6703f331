"""Sums over the ranks of a process group.

Operators know a group by its name, since their options are numbers and words.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.distributed import ProcessGroup, all_reduce, distributed_c10d


def check_process_group(process_group: ProcessGroup | None) -> None:
    """``process_group`` must be one, or None."""
    if process_group is not None and not isinstance(process_group, ProcessGroup):
        raise TypeError(
            "process_group must be a torch.distributed.ProcessGroup or None; "
            f"got {process_group!r} of type {type(process_group).__name__}"
        )


def name_of(process_group: ProcessGroup | None) -> str | None:
    """The name of a group, or None if there is none."""
    return None if process_group is None else str(process_group.group_name)


def add_over_ranks(sums: torch.Tensor, group: str) -> int:
    """The number of ranks, all of which must call; in place, ``sums`` become those of all ranks."""
    resolve: Callable[[str], ProcessGroup] = distributed_c10d._resolve_process_group  # type: ignore
    process_group = resolve(group)
    all_reduce(sums, group=process_group)
    return int(process_group.size())

"""Sums over the ranks of a process group.

Operators know a group by its name, since their options are numbers and words.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.distributed import ProcessGroup, all_reduce, distributed_c10d

from .checks import may_wait_for


def check_process_group(process_group: ProcessGroup | None, reduction: str = "mean") -> None:
    """``process_group`` must be one, or None, which it is where there is nothing to add up."""
    if process_group is not None and not isinstance(process_group, ProcessGroup):
        raise TypeError(
            "process_group must be a torch.distributed.ProcessGroup or None; "
            f"got {process_group!r} of type {type(process_group).__name__}"
        )
    if process_group is not None and reduction == "none":
        raise ValueError(
            'process_group must be None for reduction="none": ranks have no pixels in common; '
            'use "mean" or "sum"'
        )


def ranks_agree(
    process_group: ProcessGroup | None, values: torch.Tensor
) -> AbstractContextManager[Any]:
    """Where arguments are checked: what raises on one rank raises on all, which would wait for it.

    On a GPU a rank would have to wait for the others at every call, so there it takes
    ``TRITONLOSS_CHECK_LABELS=1``. Without, it is up to the launcher of the processes to stop them
    when one fails.
    """
    if process_group is None:  # first, since it is so nearly always, and costs next to nothing
        return _ALONE
    if not isinstance(process_group, ProcessGroup) or torch.compiler.is_compiling():
        return _ALONE
    device = values.device if isinstance(values, torch.Tensor) else torch.device("cpu")
    return _Agreement(process_group, device) if may_wait_for(device) else _ALONE


_ALONE = nullcontext()


class _Agreement(AbstractContextManager[None]):
    """A block of which all ranks learn whether it raises on one of them."""

    def __init__(self, process_group: ProcessGroup, device: torch.device) -> None:
        self.process_group, self.device = process_group, device

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        failed = torch.tensor(int(error is not None), device=self.device)
        all_reduce(failed, group=self.process_group)
        if error is None and failed.item() > 0:
            raise RuntimeError(
                "process_group has a rank whose arguments are wrong; its own error says which"
            )


def name_of(process_group: ProcessGroup | None) -> str | None:
    """The name of a group, or None if there is none."""
    return None if process_group is None else str(process_group.group_name)


def add_over_ranks(sums: torch.Tensor, group: str) -> int:
    """The number of ranks, all of which must call; in place, ``sums`` become those of all ranks.

    By that number every loss multiplies the gradient of its own pixels: DistributedDataParallel,
    which takes the mean over the ranks, divides by it.
    """
    resolve: Callable[[str], ProcessGroup] = distributed_c10d._resolve_process_group  # type: ignore
    process_group = resolve(group)
    all_reduce(sums, group=process_group)
    return int(process_group.size())

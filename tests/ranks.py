"""Processes beside the test's: the ranks of a process group."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def of_ranks(
    ranks: int, function: Callable[..., Any], directory: Path, *arguments: Any
) -> list[Any]:
    """What ``function(rank, *arguments)`` returns on the ranks of a group, in their order.

    They are forked by a process that imports PyTorch and Triton once for all tests that ask.
    """
    server: Any = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tritonloss", "tests.slices"])
    torch.multiprocessing.start_processes(
        _run,
        (ranks, function, str(directory), arguments),
        nprocs=ranks,
        start_method="forkserver",
    )
    return [torch.load(directory / f"{rank}.pt") for rank in range(ranks)]


def _run(
    rank: int, ranks: int, function: Callable[..., Any], directory: str, arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(os.path.join(directory, "store"), ranks)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    torch.save(function(rank, *arguments), os.path.join(directory, f"{rank}.pt"))
    torch.distributed.destroy_process_group()

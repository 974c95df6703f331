"""The time that a function takes the GPU, without the host's: replayed as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from triton.testing import do_bench


class Timed(NamedTuple):
    """Milliseconds, and how they were measured."""

    ms: float
    timer: str


GRAPH, LAUNCHES = "CUDA graph", "launches, with the gaps that the host leaves between them"


def median_ms(function: Callable[[], Any]) -> Timed:
    """The median time with a flushed cache; without the host's if a graph can be captured."""
    replay = replayed(function)
    ms = do_bench(replay or function, warmup=10, rep=50, return_mode="median")
    return Timed(float(ms), GRAPH if replay else LAUNCHES)


def replayed(function: Callable[[], Any]) -> Callable[[], None] | None:
    """A function that replays all launches of ``function``; None if they cannot be captured.

    ``function`` is called once before, on another stream, which capturing requires.
    """
    if not torch.cuda.is_available():  # the GPU is of another maker
        return None
    cuda: Any = torch.cuda
    current, other = cuda.current_stream(), cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    try:
        other.wait_stream(current)
        with torch.cuda.stream(other):
            function()
        current.wait_stream(other)
        with torch.cuda.graph(graph):
            function()
        torch.cuda.synchronize()
    except RuntimeError:  # it cannot be captured, because it synchronises, for example
        return None
    return graph.replay

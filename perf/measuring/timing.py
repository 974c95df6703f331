"""How long something takes on a GPU or a CPU: medians and quantiles."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton

from tritonloss._tools.timing import replayed

_QUANTILES = [0.5, 0.2, 0.8]
_SHORT_MS = 0.5  # below this a pair of events may measure the host, which takes longer
_LONG_MS = 30.0  # above this a few runs are enough


@dataclass(frozen=True)
class Timing:
    """Milliseconds: the median, and the quantiles at 20 % and 80 %."""

    p50: float
    p20: float
    p80: float
    timer: str


def time_call(function: Callable[[], object], device: torch.device) -> Timing:
    """How long a function takes; on a GPU with a flushed cache, and as a CUDA graph if short."""
    if device.type == "cpu":
        return _quantiles(_cpu_times(lambda: None, lambda _: function()), "perf_counter")
    once = _gpu_times(lambda: None, lambda _: function(), seconds=0.0)
    if statistics.median(once) > _LONG_MS:
        return _quantiles(once, "events")
    timing = Timing(*_bench(function), "do_bench")
    replay = replayed(function) if timing.p50 < _SHORT_MS else None
    if replay is None:  # long enough, or it cannot be captured: the gaps between launches stay in
        return timing
    return Timing(*_bench(replay), "do_bench of a graph")


def time_backward(
    forward: Callable[[], Any], backward: Callable[[Any], object], device: torch.device
) -> Timing:
    """How long `backward` takes, on a new result of `forward` each time.

    A graph that is kept for a second backward pass would keep torch.compile from reusing buffers.
    """
    if device.type == "cpu":
        return _quantiles(_cpu_times(forward, backward), "perf_counter")
    return _quantiles(_gpu_times(forward, backward), "events")


def copy_bandwidth(device: torch.device) -> float:
    """GB/s of a large copy on the device, bytes read plus bytes written."""
    count = 2**30 if device.type != "cpu" else 2**26
    source = torch.empty(count, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    timing = time_call(lambda: target.copy_(source), device)
    return 2 * count / timing.p50 / 1e6


def _bench(function: Callable[[], object]) -> Any:
    """The median and the quantiles of a function that has run before."""
    return triton.testing.do_bench(function, warmup=5, rep=60, quantiles=_QUANTILES)


def _gpu_times(
    forward: Callable[[], Any], backward: Callable[[Any], object], seconds: float = 0.2
) -> list[float]:
    """Milliseconds of the second function, each time with a flushed cache, warm."""
    flushed = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    times: list[float] = []
    end_of_run = time.monotonic() + seconds
    while len(times) < (4 if times and times[-1] > _LONG_MS else 10) or (
        time.monotonic() < end_of_run
    ):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        outputs = forward()
        flushed.zero_()
        begin.record()
        backward(outputs)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return times[1 if len(times) < 10 else 3 :]  # the first ones warm up


def _cpu_times(prepare: Callable[[], Any], function: Callable[[Any], object]) -> list[float]:
    times: list[float] = []
    end_of_run = time.monotonic() + 0.25
    while len(times) < 4 or (time.monotonic() < end_of_run and len(times) < 200):
        prepared = prepare()
        begin = time.perf_counter()
        function(prepared)
        times.append(1e3 * (time.perf_counter() - begin))
    return times[1:]


def _quantiles(times: list[float], timer: str) -> Timing:
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return Timing(statistics.median(times), fifths[0], fifths[3], timer)

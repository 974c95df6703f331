"""Candidates compiled before any is launched, in processes beside the tuner's.

A candidate that does not compile, spills registers or asks for more shared memory than the GPU has
is dropped. What compiles is in Triton's cache afterwards, where the launch on the GPU finds it. The
tuner's own process, for which the GPU waits, compiles nothing. The real launchers run on torch's
meta device; no process but the tuner's touches the GPU.
"""

from __future__ import annotations

import functools
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia

from .._core import configurations
from .._core.configurations import Configuration, Shape, TuningCase
from .launches import Launch, offline, recorded
from .resources import resources
from .stopping import end_with_parent
from .tuning_cases import same_case

Place = tuple[str, int, Shape | None, str]  # slice, number of the case, shape, layout
LATE = "was not compiled in time"


class Sieve:
    """A pool that compiles all candidates of all cases for one GPU, the first cases first."""

    def __init__(
        self,
        cases: Sequence[TuningCase],
        target: GPUTarget,
        shared_limit: int,
        workers: int | None = None,
    ) -> None:
        # Two cores are left to the tuner, whose launches must not wait.
        count = workers or max(1, (os.cpu_count() or 1) - 2)
        context = multiprocessing.get_context("spawn")
        self._target = target
        self._futures: dict[str, list[Future[str | None]]] = {}
        self._others: dict[str, list[Future[None]]] = {}
        with compiling_environment():
            self._pool = ProcessPoolExecutor(count, context, initializer=leave_interrupts)
            for case in cases:
                self._futures[case.key] = [
                    self._pool.submit(fault_of, place_of(case), index, target, shared_limit)
                    for index in range(len(case.candidates))
                ]

    def faults(self, case: TuningCase, until: float = math.inf) -> list[str | None] | None:
        """For each candidate why it is dropped; None if it may run, or if nothing can tell.

        The candidates are waited for until ``until``, a time of the monotonic clock. One that is
        not compiled by then is dropped. If that is the first, the heuristic's own, the whole answer
        is None.
        """
        unknown: list[str | None] = [None] * len(case.candidates)  # the launch itself will tell
        futures = self._futures.get(case.key, [])
        wait(futures, _left(until))
        if futures and not futures[0].done():
            return None
        try:
            found = [future.result() if future.done() else LATE for future in futures]
        except BrokenProcessPool:
            return unknown
        # If no candidate is left, not even the heuristic's own, the compiling itself is at fault.
        return unknown if all(found) and LATE not in found else found

    def prepare(self, key: str, cases: Sequence[TuningCase], configuration: Configuration) -> None:
        """Compile these cases too, with the heuristic's and with this configuration."""
        with compiling_environment(), suppress(BrokenProcessPool):
            self._others[key] = [
                self._pool.submit(compile_both, place_of(case), configuration, self._target)
                for case in cases
            ]

    def prepared(self, key: str, until: float = math.inf) -> bool:
        """Whether what prepare(key, ...) asked for is compiled, after waiting until ``until``."""
        return not wait(self._others.get(key, []), _left(until)).not_done

    def close(self) -> None:
        """End the pool and its processes."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()


def place_of(case: TuningCase) -> Place:
    """What another process needs to find the case."""
    return case.slice, case.number, case.shape, case.layout


def leave_interrupts() -> None:
    """Ignore Ctrl-C, which is for the parent process, and end when that one does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def fault_of(place: Place, index: int, target: GPUTarget, shared_limit: int) -> str | None:
    """Why a candidate is dropped; None if it may run. Runs in a process of the pool."""
    torch.set_num_threads(1)
    with offline(target):
        case = same_case(*place)
        launches, trouble = compiled(case, case.candidates[index])
    if trouble:
        return trouble
    moved = _moved_kernels(place, target)
    for record in launches:
        taken = resources(record.compiled)
        if taken and record.kernel in moved and (fault := taken.fault(shared_limit)):
            return f"{record.kernel} {fault}"
    return None


def compile_both(place: Place, configuration: Configuration, target: GPUTarget) -> None:
    """Compile a case with two configurations: the heuristic's and this one. Runs in the pool."""
    torch.set_num_threads(1)
    with offline(target):
        case = same_case(*place)
        for each in ({}, configuration):
            compiled(case, each)


def compiled(case: TuningCase, configuration: Configuration) -> tuple[list[Launch], str | None]:
    """(launches, why some are missing, or None) of a case on torch's meta device."""
    with recorded("compile") as launches:
        try:
            with configurations.forced(case.operator, {}):
                launch = case.run(torch.device("meta"))
        except Exception:  # the inputs cannot be made without a device: nothing is known
            return [], None
        build_launchers(launches)
        launches.clear()  # those that made the inputs
        try:
            with configurations.forced(case.operator, configuration):
                launch()
        except Exception as error:  # whatever a compiler may raise
            return launches, f"does not compile: {type(error).__name__}: {last_line(error)}"
    build_launchers(launches)
    return launches, None


def build_launchers(launches: Sequence[Launch]) -> None:
    """Compile the kernels' C launchers, of which Triton 3.6 has one for every signature."""
    if not hasattr(nvidia, "make_launcher"):
        return  # later versions have one for all kernels
    for record in launches:
        kernel = record.compiled
        if kernel.metadata.target.backend == "cuda" and kernel.hash not in _launchers:
            with suppress(Exception):  # no libcuda or no C compiler: the launch itself will tell
                nvidia.CudaLauncher(kernel.src, kernel.metadata)
            _launchers.add(kernel.hash)


_launchers: set[str] = set()  # hashes of the kernels whose launchers this process has built


@functools.cache
def _moved_kernels(place: Place, target: GPUTarget) -> frozenset[str]:
    """The kernels that change with the candidate; faults of others are not the candidate's."""
    with offline(target):
        case = same_case(*place)
        seen: list[dict[str, str]] = []
        for candidate in case.candidates:
            launches, trouble = compiled(case, candidate)
            if not trouble:
                seen.append({record.kernel: record.compiled.hash for record in launches})
            first, last = seen[:1], seen[-1:]
            if first and first[0].items() != last[0].items():
                return frozenset(kernel for kernel, _ in first[0].items() ^ last[0].items())
    return frozenset(kernel for hashes in seen for kernel in hashes)


def _left(until: float) -> float | None:
    return None if until == math.inf else max(0.0, until - time.monotonic())


def last_line(error: BaseException) -> str:
    """The last line of an error's message, where compilers say what was wrong."""
    return (str(error).strip().splitlines() or [""])[-1].strip()[:200]


@contextmanager
def compiling_environment() -> Iterator[None]:
    """Start processes inside with plain Triton, and without tuned configurations."""
    changes = {"TRITON_INTERPRET": None, "TRITONLOSS_TUNING": "off"}
    before = {name: os.environ.get(name) for name in changes}
    _set_environment(changes)
    try:
        yield
    finally:
        _set_environment(before)


def _set_environment(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value

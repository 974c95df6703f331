"""Candidates compiled before any is launched, in processes beside the tuner's.

What does not compile, spills registers or asks for more shared memory than the GPU has is dropped.
What compiles lies in Triton's cache afterwards, where the launch on the GPU finds it. The real
launchers run on torch's meta device; no process but the tuner's touches the GPU.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

import torch
from triton.backends.compiler import GPUTarget

from .._core import configurations
from .._core.configurations import Configuration, Shape, TuningCase
from .launches import Launch, offline, recorded
from .resources import resources
from .tuning_cases import same_case

Place = tuple[str, int, Shape | None, str]  # slice, number of the case, shape, layout


class Sieve:
    """A pool that compiles all candidates of all cases for one GPU, the first cases first."""

    def __init__(
        self,
        cases: Sequence[TuningCase],
        target: GPUTarget,
        shared_limit: int,
        workers: int | None = None,
    ) -> None:
        # Two cores stay with the tuner, whose launches must not wait.
        count = workers or max(1, (os.cpu_count() or 1) - 2)
        context = multiprocessing.get_context("spawn")
        self._futures: dict[str, list[Future[str | None]]] = {}
        with compiling_environment():
            self._pool = ProcessPoolExecutor(count, context, initializer=leave_interrupts)
            for case in cases:
                place = (case.slice, case.number, case.shape, case.layout)
                self._futures[case.key] = [
                    self._pool.submit(fault_of, place, index, target, shared_limit)
                    for index in range(len(case.candidates))
                ]

    def faults(self, case: TuningCase) -> list[str | None]:
        """For each candidate why it is out; None if it may run, or if nothing can tell."""
        unknown: list[str | None] = [None] * len(case.candidates)  # the launch itself will tell
        try:
            found = [future.result() for future in self._futures[case.key]]
        except (BrokenProcessPool, KeyError):
            return unknown
        # If not even the heuristic's own were to run, it would be the compiling that is at fault.
        return unknown if all(found) else found

    def close(self) -> None:
        """Compile nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()


def leave_interrupts() -> None:
    """Ctrl-C is for the process that has started this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def fault_of(place: Place, index: int, target: GPUTarget, shared_limit: int) -> str | None:
    """Why a candidate is out; None if it may run. In a process of the pool."""
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


def compiled(case: TuningCase, configuration: Configuration) -> tuple[list[Launch], str | None]:
    """(launches, why there are not all of them) of a case on torch's meta device."""
    with recorded("compile") as launches:
        try:
            with configurations.forced(case.operator, {}):
                launch = case.run(torch.device("meta"))
        except Exception:  # inputs that cannot be had without a device: nothing is known
            return [], None
        launches.clear()  # what made the inputs
        try:
            with configurations.forced(case.operator, configuration):
                launch()
        except Exception as error:  # whatever a compiler may raise
            return launches, f"does not compile: {type(error).__name__}: {last_line(error)}"
    return launches, None


@functools.cache
def _moved_kernels(place: Place, target: GPUTarget) -> frozenset[str]:
    """The kernels that the case's candidates change; what else is launched is not their fault."""
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


def last_line(error: BaseException) -> str:
    """Where compilers say what was wrong."""
    return (str(error).strip().splitlines() or [""])[-1].strip()[:200]


@contextmanager
def compiling_environment() -> Iterator[None]:
    """Processes started inside find a plain Triton, and no tuned configuration."""
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

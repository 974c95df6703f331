"""Every shipped kernel compiled for GPUs that need not be there: registers, spills, instructions.

The real launchers run on torch's meta device under a stand-in for the GPU driver, so what is
compiled is what would be launched. Triton's interpreter replaces kernels when they are imported;
hence the work is done in processes of its own, started without TRITON_INTERPRET.

`python -m perf compile-only [--targets sm_90 ...] [--ops ...] [--json FILE]`
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import triton
from triton.runtime.cache import get_cache_manager

from perf.compiling import control_flow, counting, machine_code, source_loops
from perf.compiling.baseline import Baseline, Kept
from perf.compiling.control_flow import Loop
from perf.compiling.counting import Reading, counts, from_numbers, reading
from perf.compiling.facts import (
    MAIN_TARGET,
    KernelFacts,
    made_of,
    numbered,
    once_per_target,
    pivoted,
)
from perf.compiling.machine_code import MachineCode
from perf.compiling.source_loops import Place
from perf.compiling.targets import TARGETS, Target
from perf.operations.contract import Case, Operation, operations, scheduled
from perf.text import plain
from tritonloss._core.progress import Progress
from tritonloss._core.source_hash import source_hash
from tritonloss._tools.launches import Launch, offline, recorded
from tritonloss._tools.sieve import compiling_environment, leave_interrupts

_Key = TypeVar("_Key")
_Result = TypeVar("_Result")
Job = tuple[str, int, str]  # operation, index of the case in Operation.shipped, target
Recorded = Mapping[int, tuple[str, Mapping[str, Kept]]]  # index of a case -> made of, kernels


def jobs(
    chosen: Sequence[Operation] | None = None,
    targets: Sequence[str] | None = None,
    short: bool = False,
) -> list[Job]:
    """What there is to compile, large windows first.

    The short list has the cases that are not rare for one target, and for the others only those
    marked `everywhere`.
    """
    listed = [
        (operation.name, index, target, case.options.get("window_size", 0))
        for operation in (operations() if chosen is None else chosen)
        for index, case in enumerate(operation.shipped)
        for target in targets or TARGETS
        if not short or case.everywhere or (target == MAIN_TARGET and not case.rare)
    ]
    listed.sort(key=lambda job: -job[3])  # large windows take longest
    return [job[:3] for job in listed]


def compile_cases(
    work: Sequence[Job],
    workers: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> list[KernelFacts]:
    """What every case launches, compiled in a pool of processes; in the order of the cases."""
    results = {}
    with compilers(workers) as pool:
        for job, facts in compiled(pool, work):
            results[job] = facts
            progress(f"{job[0]} for {job[2]}")
    return in_order(results)


def in_order(results: Mapping[Job, list[KernelFacts]]) -> list[KernelFacts]:
    """The facts of all cases, in the same order whichever was compiled first."""
    return [fact for job in sorted(results) for fact in results[job]]


@contextmanager
def compilers(workers: int | None = None) -> Iterator[Executor]:
    """A pool of processes for device code. Left by an exception, it is stopped at once."""
    context = multiprocessing.get_context("spawn")
    with compiling_environment():
        pool = ProcessPoolExecutor(workers or os.cpu_count(), context, leave_interrupts)
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()  # a large kernel compiles for a minute
            raise
        pool.shutdown()


def compiled(
    pool: Executor, work: Sequence[Job], end: float = math.inf
) -> Iterator[tuple[Job, list[KernelFacts]]]:
    """(a case, what it launches), compiled in the pool, as they come.

    After `end`, a time of the monotonic clock, nothing more is waited for.
    """
    futures = {pool.submit(compile_case, *job): job for job in work}
    yield from _finished(futures, end)
    for future in futures:
        future.cancel()


def recognised(
    pool: Executor, work: Sequence[Job], baseline: Baseline
) -> Iterator[tuple[str, dict[Job, list[KernelFacts]]]]:
    """(an operation, its cases that the baseline knows as they are now), as they come.

    Nothing is compiled: launchers run, and what they would launch is compared.
    """
    futures = {}
    for (name, target), jobs_of in _grouped(work).items():
        shipped = operations([name])[0].shipped
        known: dict[int, tuple[str, Mapping[str, Kept]]] = {}
        for _, index, _ in jobs_of:
            where = target, f"{name}: {shipped[index].text}"
            if where in baseline.made_of:
                known[index] = baseline.made_of[where], baseline.of_case(where)
        futures[pool.submit(recognise_cases, name, target, known)] = f"{name} for {target}"
    yield from _finished(futures)


def _grouped(work: Sequence[Job]) -> dict[tuple[str, str], list[Job]]:
    groups: dict[tuple[str, str], list[Job]] = {}
    for job in work:
        groups.setdefault((job[0], job[2]), []).append(job)
    return groups


def _finished(
    futures: Mapping[Future[_Result], _Key], end: float = math.inf
) -> Iterator[tuple[_Key, _Result]]:
    pending = set(futures)
    while pending:
        left = None if end == math.inf else max(0.0, end - time.monotonic())
        done, pending = wait(pending, left, FIRST_COMPLETED)
        yield from ((futures[future], future.result()) for future in done)
        if not done:
            return  # out of time


def recognise_cases(name: str, target_name: str, known: Recorded) -> dict[Job, list[KernelFacts]]:
    """The cases that are made of what the baseline's numbers were made of, in this process."""
    torch.set_num_threads(1)
    operation = operations([name])[0]
    found = {}
    for index, (made, kernels) in known.items():
        facts = recognise_case(operation, index, target_name, kernels)
        if facts and made_of(facts) == made:
            found[name, index, target_name] = facts
    return found


def recognise_case(
    operation: Operation, index: int, target_name: str, kernels: Mapping[str, Kept]
) -> list[KernelFacts]:
    """What a case launches, with the baseline's numbers; empty if it launches other kernels."""
    case, target = operation.shipped[index], TARGETS[target_name]
    records, error = _launched(operation, case, target, "skip")
    names = numbered(record.kernel for record in records)
    if error or set(names) != set(kernels):
        return []
    facts = []
    for name, record in zip(names, records, strict=True):
        kept = kernels[name]
        read = _reading(operation, case, target, record)
        facts.append(
            replace(
                _without_code(operation, case, target, record),
                registers=kept.registers,
                spill_bytes=kept.spill_bytes,
                shared_bytes=kept.shared_bytes,
                occupancy=target.occupancy(kept.registers, kept.shared_bytes, record.num_warps),
                instructions=kept.instructions or 0,
                counts=from_numbers(kept.counts, read),
                committed=True,
            )
        )
    return facts


def compile_case(operation_name: str, index: int, target_name: str) -> list[KernelFacts]:
    """The facts of what one case launches, compiled in this process."""
    torch.set_num_threads(1)
    operation = operations([operation_name])[0]
    case, target = operation.shipped[index], TARGETS[target_name]
    records, error = _launched(operation, case, target, "compile")
    facts = [_facts(operation, case, target, record) for record in records]
    if error:
        digest = f"{operation.name} {case.text}: {error}"
        facts.append(
            KernelFacts(
                operation.name, case.text, target_name, "?", "", {}, digest=digest, error=error
            )
        )
    return facts


def _launched(
    operation: Operation, case: Case, target: Target, mode: Literal["compile", "skip"]
) -> tuple[list[Launch], str | None]:
    """(the different launches of a case, the error that prevented the rest or None).

    Whatever a compiler throws becomes a row of the table.
    """
    error = None
    with offline(target.gpu), recorded(mode) as launches, scheduled(operation, case):
        try:
            operation.launch(case, operation.inputs(case, torch.device("meta")))
        except Exception as caught:
            error = f"{type(caught).__name__}: {' ... '.join(_ends(str(caught)))}"
    # A launcher may launch a kernel many times; it was compiled for the first of them.
    kernels = {
        launch_digest(operation, case, target, record): record for record in reversed(launches)
    }
    return [*kernels.values()][::-1], error


def launch_digest(operation: Operation, case: Case, target: Target, record: Launch) -> str:
    """A hash of all that a launch's machine code, and how it is read, depends on."""
    sources = [source_hash(name.removeprefix("tritonloss.")) for name in record.modules]
    read = [_analysis_version(), _reading(operation, case, target, record)]
    made = [triton.__version__, target.name, record.signature, sources, read]
    return hashlib.sha256(json.dumps(made).encode()).hexdigest()[:16]


def _reading(operation: Operation, case: Case, target: Target, record: Launch) -> Reading | None:
    notes = operation.kernels.get(record.kernel)
    return reading(notes, target, record, case.shape.elements)


def _ends(message: str) -> list[str]:
    """The first and the last line of a message: where a compiler stopped, and why."""
    lines = [line.strip() for line in message.splitlines() if line.strip()] or [""]
    return [lines[0][:100], lines[-1][:200]][: len(lines)]


def _without_code(operation: Operation, case: Case, target: Target, record: Launch) -> KernelFacts:
    """What is known of a launch before it is compiled."""
    return KernelFacts(
        op=operation.name,
        case=case.text,
        target=target.name,
        kernel=record.kernel,
        configuration=record.configuration,
        constants={k: v for k, v in record.constants.items() if isinstance(v, (int, str))},
        digest=launch_digest(operation, case, target, record),
        double=case.dtype == "float64",
    )


def _facts(operation: Operation, case: Case, target: Target, record: Launch) -> KernelFacts:
    code, seconds = analysis(record)
    shared = record.compiled.metadata.shared
    return replace(
        _without_code(operation, case, target, record),
        registers=code.registers,
        spill_bytes=code.spill_bytes,
        shared_bytes=shared,
        occupancy=target.occupancy(code.registers, shared, record.num_warps),
        instructions=code.instructions,
        counts=counts(_reading(operation, case, target, record), code),
        compile_seconds=seconds,
    )


def analysis(record: Launch) -> tuple[MachineCode, float | None]:
    """The machine code's facts and the compile time, kept beside the kernel in Triton's cache."""
    manager = get_cache_manager(record.compiled.hash)
    name = f"{record.kernel}.analysis.json"
    file = manager.get_file(name)
    stored: dict[str, Any] = {"seconds": record.compile_seconds}
    if file:
        stored = json.loads(Path(file).read_text())
    if stored.get("version") != _analysis_version():
        assembly = record.compiled.asm
        if "cubin" in assembly:
            code = machine_code.read_cubin(assembly["cubin"], assembly["ptx"])
        else:
            code = machine_code.parse_amdgcn(assembly["amdgcn"])
        stored |= {"version": _analysis_version(), "code": asdict(code)}
        manager.put(json.dumps(stored), name, binary=False)
    loops = tuple(_loop(**loop) for loop in stored["code"].pop("loops"))
    return MachineCode(**stored["code"], loops=loops), stored["seconds"]


def _loop(place: Sequence[Any], **numbers: Any) -> Loop:
    """A loop from JSON, which has lists for its tuples."""
    function, variable, lines, last = place
    where = tuple((file, number) for file, number in lines)
    return Loop(place=Place(function, variable, where, last), **numbers)


@cache
def _analysis_version() -> str:
    """A hash of the code that reads machine code, without its comments and docstrings."""
    files = (machine_code.__file__, control_flow.__file__, source_loops.__file__, counting.__file__)
    code = "\n".join(_code(Path(str(file)).read_text(encoding="utf-8")) for file in files)
    return hashlib.sha256(code.encode()).hexdigest()


def _code(source: str) -> str:
    """A module's statements. Those that are a text alone, docstrings, are none."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [part for part in body if not _is_text(part)]  # type: ignore[attr-defined]
    return ast.dump(tree)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status of `python -m perf compile-only`: 1 if a kernel must not ship."""
    parser = argparse.ArgumentParser(
        prog="python -m perf compile-only", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), metavar="TARGET")
    parser.add_argument("--ops", nargs="+", metavar="OP")
    parser.add_argument(
        "--short", action="store_true", help=f"all of {MAIN_TARGET}, a part of the others"
    )
    parser.add_argument("--json", type=Path, help="write the facts to this file as well")
    options = parser.parse_args(arguments)
    work = jobs(operations(options.ops), options.targets, options.short)
    bar = Progress(len(work))
    facts = once_per_target(compile_cases(work, progress=bar.step))
    bar.close()
    if options.json:
        options.json.write_text(json.dumps([asdict(fact) for fact in facts]))
    print(plain(*pivoted(facts)))
    faults = [fact for fact in facts if fact.fault]
    for fact in faults:
        print(f"{fact.target} {fact.kernel} ({fact.case}): {fact.fault}", file=sys.stderr)
    return 1 if faults else 0

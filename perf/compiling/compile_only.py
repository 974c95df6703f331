"""Every shipped kernel compiled for GPUs that need not be there: registers, spills, instructions.

The real launchers run on torch's meta device under a stand-in for the GPU driver, so what is
compiled is what would be launched. Triton's interpreter replaces kernels when they are imported;
hence the work is done in processes of its own, started without TRITON_INTERPRET.

`python -m perf compile-only [--targets sm_90 ...] [--ops ...] [--json FILE]`
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from triton.runtime.cache import get_cache_manager

from perf.compiling import control_flow, machine_code
from perf.compiling.machine_code import MachineCode
from perf.compiling.targets import TARGETS, Target
from perf.operations.contract import Case, KernelNotes, Operation, operations, scheduled
from perf.text import plain
from tritonloss._core.progress import Progress
from tritonloss._tools.launches import Launch, offline, recorded
from tritonloss._tools.resources import Resources
from tritonloss._tools.sieve import compiling_environment

MAIN_TARGET = "sm_90"
Job = tuple[str, int, str]  # operation, index of the case in Operation.shipped, target


@dataclass(frozen=True)
class LoopFacts:
    """One big loop. `per_output` is what one thread executes per output; None if code cannot tell:
    how often a loop within it runs is known at run time only.
    """

    name: str
    instructions: int
    per_output: float | None


@dataclass(frozen=True)
class KernelFacts:
    """One kernel as one case launches it, compiled for one target."""

    op: str
    case: str
    target: str
    kernel: str
    configuration: str
    constants: Mapping[str, Any]
    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    occupancy: float = 0.0
    instructions: int = 0
    loops: tuple[LoopFacts, ...] = ()
    compile_seconds: float | None = None
    digest: str = ""  # Triton's own name of the compiled kernel
    error: str | None = None  # why there are no facts

    @property
    def fault(self) -> str | None:
        """Why this kernel must not ship; None if it may."""
        taken = Resources(self.registers, self.spill_bytes, self.shared_bytes)
        return self.error or taken.fault(TARGETS[self.target].shared_per_block)

    @property
    def text(self) -> str:
        """Registers, occupancy and instructions per output in one line."""
        if self.error:
            return "FAULT: does not compile"
        if self.fault:
            return f"FAULT: {self.fault}"
        counts = [
            "nested loops" if loop.per_output is None else f"{loop.per_output:.1f}"
            for loop in self.loops
        ]
        parts = [f"{self.registers} r", f"{self.occupancy:.0%}", " / ".join(counts)]
        parts += [f"{self.shared_bytes} B shared"] if self.shared_bytes else []
        return " ".join(part for part in parts if part)


def jobs(
    chosen: Sequence[Operation] | None = None,
    targets: Sequence[str] | None = None,
    short: bool = False,
) -> list[Job]:
    """What there is to compile. The short list has everything for one target, and for the others
    only the cases marked `everywhere`.
    """
    listed = [
        (operation.name, index, target, case.options.get("window_size", 0))
        for operation in (operations() if chosen is None else chosen)
        for index, case in enumerate(operation.shipped)
        for target in targets or TARGETS
        if not short or target == MAIN_TARGET or case.everywhere
    ]
    listed.sort(key=lambda job: -job[3])  # large windows take longest: they come first
    return [job[:3] for job in listed]


def table(
    work: Sequence[Job],
    workers: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
    end: float | None = None,
) -> list[KernelFacts]:
    """Compile all of the work; the same kernel is listed once per target.

    After ``end``, a time of the monotonic clock, nothing more is begun.
    """
    unique: dict[tuple[str, str], KernelFacts] = {}
    for fact in compile_cases(work, workers, progress, end):
        unique.setdefault((fact.target, fact.digest), fact)
    return list(unique.values())


def compile_cases(
    work: Sequence[Job],
    workers: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
    end: float | None = None,
) -> list[KernelFacts]:
    """Compile all of the work in a pool of processes; what every case launches, in its order."""
    context = multiprocessing.get_context("spawn")
    with compiling_environment(), ProcessPoolExecutor(workers or os.cpu_count(), context) as pool:
        futures = {pool.submit(compile_case, *job): job for job in work}
        results: dict[Job, list[KernelFacts]] = {}
        for future in as_completed(futures):
            job = futures[future]
            results[job] = future.result()
            progress(f"{job[0]} for {job[2]}")
            if end is not None and time.monotonic() > end:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in multiprocessing.active_children():
                    process.terminate()  # a large kernel compiles for a minute
                break
    return [fact for job in sorted(results) for fact in results[job]]


def compile_case(operation_name: str, index: int, target_name: str) -> list[KernelFacts]:
    """Compile what one case launches, in this process."""
    torch.set_num_threads(1)
    operation = operations([operation_name])[0]
    case, target = operation.shipped[index], TARGETS[target_name]
    error = None
    with offline(target.gpu), recorded("compile") as launches, scheduled(operation, case):
        try:
            operation.launch(case, operation.inputs(case, torch.device("meta")))
        except Exception as caught:  # whatever a compiler throws is a row of the table
            error = f"{type(caught).__name__}: {' ... '.join(_ends(str(caught)))}"
        # A launcher may launch a kernel many times; the first time it was compiled.
        kernels = {record.compiled.hash: record for record in reversed(launches)}
        facts = [_facts(operation, case, target, record) for record in [*kernels.values()][::-1]]
    if error:
        digest = f"{operation.name} {case.text}: {error}"
        facts.append(
            KernelFacts(
                operation.name, case.text, target_name, "?", "", {}, digest=digest, error=error
            )
        )
    return facts


def _ends(message: str) -> list[str]:
    """The first and the last line: where a compiler stopped, and why."""
    lines = [line.strip() for line in message.splitlines() if line.strip()] or [""]
    return [lines[0][:100], lines[-1][:200]][: len(lines)]


def _facts(operation: Operation, case: Case, target: Target, record: Launch) -> KernelFacts:
    code, seconds = analysis(record)
    shared = record.compiled.metadata.shared
    return KernelFacts(
        op=operation.name,
        case=case.text,
        target=target.name,
        kernel=record.kernel,
        configuration=record.configuration,
        constants={k: v for k, v in record.constants.items() if isinstance(v, (int, str))},
        registers=code.registers,
        spill_bytes=code.spill_bytes,
        shared_bytes=shared,
        occupancy=target.occupancy(code.registers, shared, record.num_warps),
        instructions=code.instructions,
        loops=loop_facts(operation.kernels.get(record.kernel), code, target, record),
        compile_seconds=seconds,
        digest=record.compiled.hash,
    )


def loop_facts(
    notes: KernelNotes | None, code: MachineCode, target: Target, record: Launch
) -> tuple[LoopFacts, ...]:
    big = code.big_loops(record.constants.get("STRIP.unroll", 1))
    if notes is None:
        return ()
    names = notes.loops
    if len(names) != len(big):  # the compiler has merged or copied loops: no name would be right
        names = tuple(f"loop {number + 1} of {len(big)}" for number in range(len(big)))
    threads = record.num_warps * target.gpu.warp_size
    outputs = notes.outputs({**record.constants, "THREADS": threads})
    return tuple(
        LoopFacts(name, loop.instructions, None if loop.nests else loop.instructions / outputs)
        for name, loop in zip(names, big, strict=True)
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
            code = machine_code.read_cubin(assembly["cubin"])
        else:
            code = machine_code.parse_amdgcn(assembly["amdgcn"])
        stored |= {"version": _analysis_version(), "code": asdict(code)}
        manager.put(json.dumps(stored), name, binary=False)
    loops = tuple(control_flow.Loop(**loop) for loop in stored["code"].pop("loops"))
    return MachineCode(**stored["code"], loops=loops), stored["seconds"]


@cache
def _analysis_version() -> str:
    files = (machine_code.__file__, control_flow.__file__)
    source = b"".join(Path(str(file)).read_bytes() for file in files)
    return hashlib.sha256(source).hexdigest()


def pivoted(facts: Sequence[KernelFacts]) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of a table with one row per kernel and case, and one column per target."""
    targets = [name for name in TARGETS if any(fact.target == name for fact in facts)]
    lines: dict[tuple[str, str, str], dict[str, KernelFacts]] = {}
    for fact in facts:
        lines.setdefault((fact.op, fact.kernel, fact.case), {})[fact.target] = fact
    rows = []
    for (op, kernel, case), cells in lines.items():
        seconds = [fact.compile_seconds for fact in cells.values() if fact.compile_seconds]
        rows.append(
            [
                op,
                kernel.strip("_").removesuffix("_kernel"),
                case,
                *(cells[target].text if target in cells else "" for target in targets),
                f"{max(seconds):.1f}" if seconds else "",
            ]
        )
    return ["operation", "kernel", "case", *targets, "compile s"], rows


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of `python -m perf compile-only`; 1 if a kernel must not ship."""
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
    facts = table(work, progress=bar.step)
    bar.close()
    if options.json:
        options.json.write_text(json.dumps([asdict(fact) for fact in facts]))
    print(plain(*pivoted(facts)))
    faults = [fact for fact in facts if fact.fault]
    for fact in faults:
        print(f"{fact.target} {fact.kernel} ({fact.case}): {fact.fault}", file=sys.stderr)
    return 1 if faults else 0

"""Launch configurations ranked without a GPU, by a model of what bounds a kernel: a prediction.

A kernel of P programs with B warps per scheduler resident is taken to need

    max(instructions / (issue rate x min(1, B / 2)), bytes / bandwidth) x ceil(P / SMs) / (P / SMs)

Instructions per output are counted in its machine code. Where a kernel has two totals, for classes
absent and present, their mean is taken. Each of its tensors is read or written once. Rates are from
the GPU's data sheet. Only kernels that differ between the candidates count. Two warps keep a
scheduler busy, since window code has at least two independent chains. The last factor is the idle
time of processors in the last round of programs. Candidates that do not compile, spill or ask for
too much shared memory are out.

The heuristics follow the model for float32, with two exceptions: candidates at the edge of the
register file (what takes more than 160 registers here may spill on another target or in another
layout), and a schedule that buys time with memory.

`python -m perf predict [--target sm_90] [--op NAME] [--shapes NxCxHxW ...]`
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch

from perf.compiling.compile_only import analysis, compilers
from perf.compiling.counting import counts, reading
from perf.compiling.facts import MAIN_TARGET
from perf.compiling.targets import TARGETS, Target
from perf.operations.contract import KernelNotes, operations
from perf.text import plain
from tritonloss._core.configurations import Configuration, Shape, TuningCase
from tritonloss._core.progress import Progress
from tritonloss._tools.launches import Launch, offline
from tritonloss._tools.sieve import Place, compiled
from tritonloss._tools.tuning_cases import own_cases, same_case, shape_of, sized, slices

_WARPS_THAT_KEEP_BUSY = 2
_UNCOUNTED = "not ranked, nobody has said how often one of its loops runs"


@dataclass(frozen=True)
class Kernel:
    """What the model needs to know of one launch."""

    name: str
    registers: int
    fault: str | None
    occupancy: float
    per_output: float | None  # instructions; None where one of its loops is not counted
    outputs: int
    tensor_bytes: int
    programs: int | None
    num_warps: int

    def microseconds(self, target: Target) -> float | None:
        """How long the model says the launch takes."""
        if self.per_output is None:
            return None
        lanes = target.processors * target.lanes * target.clock_GHz * 1e3  # per microsecond
        rounds = (self.programs or target.processors) / target.processors
        resident = min(self.occupancy * target.warps, math.ceil(rounds) * self.num_warps)
        busy = min(1.0, resident / 4 / _WARPS_THAT_KEEP_BUSY)
        issue = self.per_output * self.outputs / (lanes * busy)
        moved = self.tensor_bytes / (target.memory_GBps * 1e3)
        return max(issue, moved) * math.ceil(rounds) / rounds


@dataclass(frozen=True)
class Prediction:
    """One candidate; `trouble` is why it is out or cannot be ranked."""

    configuration: Configuration
    kernels: tuple[Kernel, ...] = ()
    trouble: str | None = None

    def microseconds(self, target: Target) -> float | None:
        """The sum over its launches; None if it is out or a kernel cannot be predicted."""
        times = [kernel.microseconds(target) for kernel in self.kernels]
        if self.trouble or not times or None in times:
            return None
        return sum(time for time in times if time is not None)


@dataclass(frozen=True)
class Ranking:
    """A case's candidates, the first predicted ones first; the heuristic's own among them."""

    case: TuningCase
    target: Target
    predictions: tuple[Prediction, ...]

    @property
    def heuristic(self) -> Prediction:
        first = self.case.candidates[0]
        return next(p for p in self.predictions if p.configuration == first)

    @property
    def excess(self) -> float | None:
        """The heuristic's predicted time beyond the best one's, as a share of the best one's."""
        best = self.predictions[0].microseconds(self.target)
        mine = self.heuristic.microseconds(self.target)
        return None if best is None or mine is None else mine / best - 1


def rankings(
    target: Target,
    cases: Sequence[TuningCase],
    workers: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Iterable[Ranking]:
    """The cases' rankings, of candidates compiled for the target in a pool of processes."""
    with compilers(workers) as pool:
        futures = [
            [
                pool.submit(predict, _place(case), n, target.name)
                for n in range(len(case.candidates))
            ]
            for case in cases
        ]
        for case, mine in zip(cases, futures, strict=True):
            found = _compared([future.result() for future in mine])
            found.sort(key=lambda prediction: prediction.microseconds(target) or math.inf)
            progress(case.key)
            yield Ranking(case, target, tuple(found))


def _compared(predictions: list[Prediction]) -> list[Prediction]:
    """The predictions without kernels that are the same for all: they would blur the comparison."""
    variants: dict[str, set[tuple[Kernel, ...]]] = {}
    running = [prediction for prediction in predictions if not prediction.trouble]
    for name in {kernel.name for prediction in running for kernel in prediction.kernels}:
        variants[name] = {
            tuple(kernel for kernel in prediction.kernels if kernel.name == name)
            for prediction in running
        }
    moved = {name for name, found in variants.items() if len(found) > 1}
    if not moved:
        return predictions
    return [
        replace(p, kernels=tuple(kernel for kernel in p.kernels if kernel.name in moved))
        for p in predictions
    ]


def predict(place: Place, index: int, target_name: str) -> Prediction:
    """What the model says of one candidate, which is compiled in this process."""
    torch.set_num_threads(1)
    target = TARGETS[target_name]
    with offline(target.gpu):
        case = same_case(*place)
        configuration = case.candidates[index]
        launches, trouble = compiled(case, configuration)
        elements = math.prod(case.shape) if case.shape else None
        kernels = tuple(_kernel(record, target, elements) for record in launches)
    faults = [f"{kernel.name} {kernel.fault}" for kernel in kernels if kernel.fault]
    if not launches and not trouble:
        trouble = "its inputs cannot be made without a device"
    return Prediction(configuration, kernels, trouble or (faults[0] if faults else None))


def _kernel(record: Launch, target: Target, elements: int | None) -> Kernel:
    code, _ = analysis(record)
    shared = record.compiled.metadata.shared
    notes = _notes().get(record.kernel)
    read = reading(notes, target, record, elements or record.largest_tensor)
    counted = counts(read, code)
    per_output, outputs = None, record.largest_tensor
    if read is None:
        per_output = 0.0  # only its bytes count
    elif not counted.unaccounted:
        per_output = sum(count for _, count in counted.totals) / len(counted.totals)
        threads = record.num_warps * target.gpu.warp_size
        outputs = round(read.outputs * threads * (record.programs or 1))
    return Kernel(
        record.kernel,
        code.registers,
        code.resources(shared).fault(target.shared_per_block),
        target.occupancy(code.registers, shared, record.num_warps),
        per_output,
        outputs,
        record.tensor_bytes,
        record.programs,
        record.num_warps,
    )


@cache
def _notes() -> dict[str, KernelNotes]:
    return {name: n for operation in operations() for name, n in operation.kernels.items()}


def cases_at_full_size(
    target: Target, operator: str | None = None, shapes: Sequence[Shape] | None = None
) -> list[TuningCase]:
    """Every case as its slice states it, at the shapes given or else at a usual full size.

    Raises:
        ValueError: no slice has an operator of that name.
    """
    with offline(target.gpu):
        stated = [case for name in slices() for case in own_cases(name)]
        chosen = [case for case in stated if operator in (None, case.operator)]
        if not chosen:
            known = ", ".join(sorted({case.operator for case in stated}))
            raise ValueError(f"--op must be one of {known}; got {operator!r}")
        return [
            sized(case, shape, case.layout) or case
            for case in chosen
            for shape in shapes or [(4, 19, 1024, 2048) if case.classes == 19 else
                                    (16, case.classes, 1024, 1024)]
        ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status of `python -m perf predict`, which prints every case's ranking."""
    parser = argparse.ArgumentParser(
        prog="python -m perf predict", description=str(__doc__).split("\n")[0]
    )
    parser.add_argument("--target", choices=list(TARGETS), default=MAIN_TARGET)
    parser.add_argument("--op", metavar="NAME", help="one operator only")
    parser.add_argument(
        "--shapes", nargs="+", type=shape_of, metavar="NxCxHxW", help="for logits of these sizes"
    )
    options = parser.parse_args(arguments)
    target = TARGETS[options.target]
    try:
        cases = cases_at_full_size(target, options.op, options.shapes)
    except ValueError as error:
        print(error)
        return 1
    print(
        f"PREDICTION, not a measurement: nothing is run. Candidates compiled for {target.name} "
        f"({target.gpus}) and ranked by instructions per output, occupancy and the bytes they must "
        "move. No tuned file is written."
    )
    bar = Progress(len(cases))
    for ranking in rankings(target, cases, progress=bar.step):
        bar.clear()
        print("\n".join(described(ranking)), flush=True)
    bar.close()
    return 0


def described(ranking: Ranking) -> list[str]:
    """The lines that are printed of a case: a title, a table, and what is out."""
    case, target = ranking.case, ranking.target
    size = f" at {'x'.join(map(str, case.shape))}" if case.shape else ""
    ranked = [p for p in ranking.predictions if p.microseconds(target) is not None]
    lines = [f"\n{case.key}{size}, predicted for {target.name}"]
    if ranked:
        best = ranked[0].microseconds(target) or math.nan
        header = [
            "configuration",
            "predicted us",
            "x best",
            "instructions",
            "registers",
            "occupancy",
        ]
        rows = [_cells(prediction, target, best, case) for prediction in ranked]
        lines.append(plain(header, rows))
    out = [prediction for prediction in ranking.predictions if prediction not in ranked]
    lines += [f"  out: {_text(p.configuration)}: {p.trouble or _UNCOUNTED}" for p in out]
    return lines


def _cells(prediction: Prediction, target: Target, best: float, case: TuningCase) -> list[str]:
    time = prediction.microseconds(target) or math.nan
    kernels = _counted(prediction.kernels)
    mark = "  (heuristic)" if prediction.configuration == case.candidates[0] else ""
    return [
        _text(prediction.configuration) + mark,
        f"{time:.0f}",
        f"{time / best:.2f}",
        " + ".join(f"{kernel.per_output:.0f}" for kernel in kernels),
        " + ".join(f"{kernel.registers}" for kernel in kernels),
        " + ".join(f"{kernel.occupancy:.0%}" for kernel in kernels),
    ]


def _counted(kernels: Sequence[Kernel]) -> list[Kernel]:
    """The kernels whose instructions count, each once however often it is launched."""
    return list({kernel.name: kernel for kernel in kernels if kernel.per_output}.values())


def _text(configuration: Configuration) -> str:
    return " ".join(f"{name}={value}" for name, value in configuration.items())


def _place(case: TuningCase) -> Place:
    return case.slice, case.number, case.shape, case.layout

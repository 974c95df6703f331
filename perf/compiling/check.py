"""Have the kernels become worse? Their machine code against a committed baseline, on any machine.

Compiles what `compile-only` compiles and compares registers, spilled bytes, shared memory and
instructions with `perf/baseline/triton-<major.minor>.json`, kernel by kernel, case by case and
target by target. Compilers are part of Triton, so the numbers are the same on every machine.

`python -m perf check [--targets sm_90 ...] [--ops ...] [--short] [--update]`
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import triton

from perf.compiling.compile_only import MAIN_TARGET, Job, KernelFacts, compile_cases, jobs
from perf.compiling.targets import TARGETS
from perf.operations.contract import operations
from tritonloss._core.progress import Progress

FOLDER = Path(__file__).parents[1] / "baseline"
ALLOWED = 0.05
COLUMNS = ("registers", "spill_bytes", "shared_bytes", "instructions")
_ABOUT = (
    "target > operation: case > kernel > [registers, spill bytes, shared bytes, instructions per "
    "output of each main loop, or of the whole kernel where those do not tell]; "
    "written by python -m perf check --update"
)

Place = tuple[str, str, str]  # target, operation and case, kernel
Numbers = tuple[float, ...]
Baseline = dict[Place, Numbers]


@dataclass(frozen=True)
class Comparison:
    """What is worse, new, gone or better than the baseline; each a line that names the kernel."""

    worse: tuple[str, ...]
    new: tuple[str, ...]
    gone: tuple[str, ...]
    better: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing is worse and the baseline covers what there is."""
        return not (self.worse or self.new or self.gone)


def measured(facts: Sequence[KernelFacts]) -> Baseline:
    """The facts as a baseline has them; a kernel that a case launches in several ways is numbered.

    What does not compile has no numbers: it is a fault, which the command reports by itself.
    """
    found: Baseline = {}
    for fact in facts:
        if fact.error:
            continue
        where = (fact.target, f"{fact.op}: {fact.case}")
        name, count = fact.kernel, 1
        while (*where, name) in found:
            count += 1
            name = f"{fact.kernel} {count}"
        found[(*where, name)] = (
            fact.registers, fact.spill_bytes, fact.shared_bytes, *_instructions(fact),
        )  # fmt: skip
    return found


def _instructions(fact: KernelFacts) -> tuple[float, ...]:
    counts = [loop.per_output for loop in fact.loops]
    if not counts or None in counts:
        return (fact.instructions,)
    return tuple(round(count, 2) for count in counts if count is not None)


def compare(before: Baseline, now: Baseline) -> Comparison:
    """Hold the numbers against the baseline's, both of the same cases."""
    worse, better = [], []
    for place in before:
        if place in now:
            changes = _changes(before[place], now[place])
            worse += [f"{_named(place)}: {text}" for text, share in changes if share > ALLOWED]
            better += [f"{_named(place)}: {text}" for text, share in changes if share < -ALLOWED]
    return Comparison(
        tuple(worse),
        tuple(_named(place) for place in now if place not in before),
        tuple(_named(place) for place in before if place not in now),
        tuple(better),
    )


def _changes(before: Numbers, now: Numbers) -> list[tuple[str, float]]:
    """(what has changed, by which share) of one kernel."""
    # Loops that the compiler has merged or split can only be compared all together.
    if len(before) != len(now):
        before, now = (*before[:3], sum(before[3:])), (*now[:3], sum(now[3:]))
    found = []
    for index, (old, new) in enumerate(zip(before, now, strict=True)):
        if new != old:
            name = COLUMNS[min(index, 3)].replace("_", " ")
            share = (new - old) / old if old else float("inf")
            percent = f"{share:+.0%}" if old else "from nothing"
            found.append((f"{name} {old:g} -> {new:g} ({percent})", share))
    return found


def _named(place: Place) -> str:
    target, case, kernel = place
    return f"{target} {kernel} ({case})"


def path_of(version: str, folder: Path = FOLDER) -> Path:
    """The baseline of a Triton version: minor versions bring another compiler."""
    return folder / f"triton-{'.'.join(version.split('.')[:2])}.json"


def read(path: Path) -> Baseline:
    """A baseline file's numbers.

    Raises:
        FileNotFoundError: there is none for this Triton.
    """
    document = json.loads(path.read_text(encoding="utf-8"))
    return {
        (target, case, kernel): tuple(numbers)
        for target, cases in document["targets"].items()
        for case, kernels in cases.items()
        for kernel, numbers in kernels.items()
    }


def write(path: Path, baseline: Baseline) -> None:
    """Write a baseline, a line per kernel, in an order that does not depend on anything."""
    lines = ["{", f' "about": {json.dumps(_ABOUT)},', ' "targets": {']
    for target, cases in _nested(baseline).items():
        lines.append(f"  {json.dumps(target)}: {{")
        for case, kernels in cases.items():
            inner = [f"    {json.dumps(k)}: {json.dumps(list(v))}" for k, v in kernels.items()]
            lines += [f"   {json.dumps(case)}: {{", ",\n".join(inner), "   },"]
        lines[-1] = "   }"
        lines.append("  },")
    lines[-1] = lines[-1].rstrip(",")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*lines, " }", "}"]) + "\n", encoding="utf-8")


def _nested(baseline: Baseline) -> dict[str, dict[str, dict[str, Numbers]]]:
    nested: dict[str, dict[str, dict[str, Numbers]]] = {}
    for (target, case, kernel), numbers in sorted(baseline.items()):
        nested.setdefault(target, {}).setdefault(case, {})[kernel] = numbers
    return nested


def of_the_work(baseline: Baseline, work: Sequence[Job]) -> Baseline:
    """The part of a baseline that is about these cases, or about cases that are no more."""
    asked = {(target, _case(op, index)) for op, index, target in work}
    known = {_case(op, index) for op, index, _ in jobs(targets=[MAIN_TARGET])}
    chosen = {(target, op) for op, _, target in work}
    return {
        place: numbers
        for place, numbers in baseline.items()
        if place[:2] in asked or (place[1] not in known and _is_of(place, chosen))
    }


def _is_of(place: Place, chosen: Collection[tuple[str, str]]) -> bool:
    """Whether an unknown case is of a chosen operation, or of one that is no more."""
    operation = place[1].split(":")[0]
    known = {operation.name for operation in operations()}
    targets = {target for target, _ in chosen}
    return (place[0], operation) in chosen or (place[0] in targets and operation not in known)


def _case(operation_name: str, index: int) -> str:
    return f"{operation_name}: {operations([operation_name])[0].shipped[index].text}"


def report(comparison: Comparison, total: int, path: Path) -> list[str]:
    """What is printed."""
    titles: Mapping[str, Sequence[str]] = {
        f"worse by more than {ALLOWED:.0%}": comparison.worse,
        "not in the baseline": comparison.new,
        "in the baseline only": comparison.gone,
        f"better by more than {ALLOWED:.0%}": comparison.better,
    }
    lines = [f"{total} kernels compared with {path.name}"]
    for title, found in titles.items():
        if found:
            lines += [f"{title}: {len(found)}", *(f"  {line}" for line in found)]
    if comparison.worse or comparison.new or comparison.gone or comparison.better:
        lines.append("check --update makes this the baseline; the commit should say why.")
    else:
        lines.append("nothing has moved by more than that")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of `python -m perf check`; 1 if something is worse or must not ship."""
    parser = argparse.ArgumentParser(
        prog="python -m perf check", description=str(__doc__).split("\n")[0]
    )
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), metavar="TARGET")
    parser.add_argument("--ops", nargs="+", metavar="OP")
    parser.add_argument(
        "--short", action="store_true", help=f"all of {MAIN_TARGET}, a part of the others"
    )
    parser.add_argument("--update", action="store_true", help="make this the baseline")
    options = parser.parse_args(arguments)
    work = jobs(operations(options.ops), options.targets, options.short)
    path = path_of(triton.__version__)
    if not path.exists() and not options.update:
        print(f"there is no baseline for triton {triton.__version__}; --update writes {path}")
        return 1
    bar = Progress(len(work))
    facts = compile_cases(work, progress=bar.step)
    bar.close()
    faults = dict.fromkeys(f"{_fault(fact)}" for fact in facts if fact.fault)
    print("".join(f"{fault}\n" for fault in faults), end="", file=sys.stderr)
    before = read(path) if path.exists() else {}
    mine = of_the_work(before, work)
    now = measured(facts)
    if options.update:
        kept = {place: numbers for place, numbers in before.items() if place not in mine}
        write(path, kept | now)
        print(f"{len(now)} kernels written to {path}")
        return 1 if faults else 0
    comparison = compare(mine, now)
    print("\n".join(report(comparison, len(now), path)))
    return 1 if faults or not comparison.passed else 0


def _fault(fact: KernelFacts) -> str:
    return f"must not ship: {fact.target} {fact.kernel} ({fact.case}): {fact.fault}"

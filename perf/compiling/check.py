"""Have the kernels become worse? Their machine code against a committed baseline, on any machine.

Compiles what `compile-only` compiles and compares registers, spilled bytes, shared memory and
instructions with `perf/baseline/triton-<major.minor>.json`, kernel by kernel, case by case and
target by target. Compilers are part of Triton, so the numbers are the same on every machine. The
kernels that each loss launches are counted, too, and held against `perf/baseline/launches.json`.

`python -m perf check [--targets ...] [--ops ...] [--short] [--changed | --drawn N] [--update]`
`python -m perf check --launches [--update]`
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import triton

from perf.compiling import baseline
from perf.compiling.baseline import WHOLE, Baseline, Numbers, Place
from perf.compiling.compile_only import Job, compiled, compilers, in_order, jobs, recognised
from perf.compiling.counting import TOTAL
from perf.compiling.facts import MAIN_TARGET, KernelFacts
from perf.compiling.targets import TARGETS
from perf.measuring import launches
from perf.operations.contract import operations
from tritonloss._core.progress import Progress

ALLOWED = 0.05
_ROOT = Path(__file__).parents[2]
_FILES = (_ROOT / "tritonloss", _ROOT / "perf")


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


def compare(before: Mapping[Place, Numbers], now: Mapping[Place, Numbers]) -> Comparison:
    """How today's numbers differ from the baseline's, both of the same cases."""
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
    """(what has changed, by which share), for each changed number of one kernel."""
    names = [name for name in before if name in now]
    # Where the executed instructions are counted, the size of the kernel does not matter.
    if any(name.startswith(TOTAL) for name in names):
        names.remove(WHOLE)
    found = []
    for name in names:
        old, new = before[name], now[name]
        if new != old:
            share = (new - old) / old if old else float("inf")
            percent = f"{share:+.0%}" if old else "from nothing"
            found.append((f"{name} {old:g} -> {new:g} ({percent})", share))
    return found


def _named(place: Place) -> str:
    target, case, kernel = place
    return f"{target} {kernel} ({case})"


def of_the_work(places: Iterable[Place], work: Sequence[Job]) -> list[Place]:
    """The places of a baseline that are about these cases, or about cases that are gone."""
    asked = {(target, _case(op, index)) for op, index, target in work}
    known = {_case(op, index) for op, index, _ in jobs(targets=[MAIN_TARGET])}
    chosen = {(target, op) for op, _, target in work}
    return [
        place
        for place in places
        if place[:2] in asked or (place[1] not in known and _is_of(place, chosen))
    ]


def _is_of(place: Place, chosen: Collection[tuple[str, str]]) -> bool:
    """Whether an unknown case is of a chosen operation, or of one that is gone."""
    operation = place[1].split(":")[0]
    known = {operation.name for operation in operations()}
    targets = {target for target, _ in chosen}
    return (place[0], operation) in chosen or (place[0] in targets and operation not in known)


def _case(operation_name: str, index: int) -> str:
    return f"{operation_name}: {operations([operation_name])[0].shipped[index].text}"


def report(comparison: Comparison, total: int, path: Path) -> list[str]:
    """The lines that are printed of a comparison of so many kernels."""
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


def stale(before: Baseline, now: Baseline) -> str:
    """A sentence on how many cases are not made of what the baseline's were."""
    moved = [where for where in now.made_of if before.made_of.get(where) != now.made_of[where]]
    unknown = sum(where not in before.made_of for where in moved)
    if not moved:
        return "every case is made of what its numbers were made of: a report compiles nothing"
    return (
        f"{len(moved)} of {len(now.made_of)} cases have other device code, launches or another "
        f"Triton than the baseline's ({unknown} of them are new to it): a report compiles them"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status of `python -m perf check`: 1 if something is worse or must not ship."""
    options = _parser().parse_args(arguments)
    status = 0
    if not options.launches:
        status = _check_code(options)
    return max(status, _check_launches(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m perf check", description=str(__doc__).split("\n")[0]
    )
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), metavar="TARGET")
    parser.add_argument("--ops", nargs="+", metavar="OP")
    parser.add_argument(
        "--short", action="store_true", help=f"all of {MAIN_TARGET}, a part of the others"
    )
    parser.add_argument(
        "--changed", action="store_true", help="compile only what the baseline does not know"
    )
    parser.add_argument(
        "--drawn",
        type=int,
        metavar="N",
        help="the same, and one of N cases whatever is known of it: which ones follows from the "
        "contents of all files, so that a wrong baseline is found",
    )
    parser.add_argument(
        "--launches", action="store_true", help="launches per pass only; nothing is compiled"
    )
    parser.add_argument("--update", action="store_true", help="make this the baseline")
    return parser


def _check_code(options: argparse.Namespace) -> int:
    work = jobs(operations(options.ops), options.targets, options.short)
    path = baseline.path_of(triton.__version__)
    if not path.exists() and not options.update:
        print(f"there is no baseline for triton {triton.__version__}; --update writes {path}")
        return 1
    before = baseline.read(path) if path.exists() else Baseline()
    looked_up = options.changed or options.drawn
    facts = facts_of(work, before if looked_up else Baseline(), options.drawn)
    faults = dict.fromkeys(f"{_fault(fact)}" for fact in facts if fact.fault)
    print("".join(f"{fault}\n" for fault in faults), end="", file=sys.stderr)
    mine = of_the_work(before.kernels, work)
    now = baseline.of_facts(facts)
    if options.update:
        baseline.write(path, before.without(mine).joined(now))
        print(f"{len(now.kernels)} kernels written to {path}")
        return 1 if faults else 0
    numbers = before.numbers()
    comparison = compare({place: numbers[place] for place in mine}, now.numbers())
    print("\n".join([*report(comparison, len(now.kernels), path), stale(before, now)]))
    return 1 if faults or not comparison.passed else 0


def facts_of(work: Sequence[Job], known: Baseline, every: int | None = None) -> list[KernelFacts]:
    """What every case launches: from the baseline where that knows it, else compiled.

    So is one of `every` so many cases, whatever is known of it.
    """
    results: dict[Job, list[KernelFacts]] = {}
    drawn = draw(work, every, contents()) if every else set()
    with compilers() as pool:
        for _, found in recognised(pool, [job for job in work if job not in drawn], known):
            results |= found
        rest = [job for job in work if job not in results]
        if every:
            print(f"{len(rest)} of {len(work)} cases are compiled, of which {len(drawn)} are drawn")
        bar = Progress(len(rest))
        for job, facts in compiled(pool, rest):
            results[job] = facts
            bar.step(f"{job[0]} for {job[2]}")
        bar.close()
    return in_order(results)


def draw(work: Sequence[Job], every: int, contents: str) -> set[Job]:
    """One of so many cases, other ones for other contents of the files."""

    def lot(job: Job) -> str:
        return hashlib.sha256(f"{contents} {job}".encode()).hexdigest()

    return set(sorted(work, key=lot)[: math.ceil(len(work) / every)])


def contents() -> str:
    """A hash of all files of the package, of what measures it, and of the baselines."""
    files = [path for folder in _FILES for path in sorted(folder.rglob("*")) if path.is_file()]
    read = [path.read_bytes() for path in files if path.suffix in (".py", ".json")]
    return hashlib.sha256(b"\n".join(read)).hexdigest()


def _check_launches(options: argparse.Namespace) -> int:
    now = launches.collect(options.ops)
    if options.update:
        launches.write(now)
        print(f"launches of {len(now)} calls written to {launches.PATH}")
        return 0
    moved = launches.differences(launches.read(), now)
    print("\n".join(moved or [f"{len(now)} calls launch as many kernels as committed"]))
    return 1 if moved else 0


def _fault(fact: KernelFacts) -> str:
    return f"must not ship: {fact.target} {fact.kernel} ({fact.case}): {fact.fault}"

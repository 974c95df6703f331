"""The committed numbers of every kernel's machine code, and what they were made of.

Each minor version of Triton is another compiler and has a file of its own in `perf/baseline`. What
a case is "made of" is its device code, its launches, the Triton, and what reads machine code here.
While that is the same, its machine code is the same, and its numbers are known without compiling.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from perf.compiling.counting import TOTAL
from perf.compiling.facts import KernelFacts, made_of, numbered

FOLDER = Path(__file__).parents[1] / "baseline"
WHOLE = "instructions of the whole kernel"
_MADE_OF = "made of"
_ABOUT = (
    "target > operation: case > kernel > [registers, spill bytes, shared bytes, instructions, "
    "{instructions executed per output: in all, by name of a case where the kernel tells cases "
    "apart, then once and in each loop}]; 'made of' is a hash of the device code, the launches and "
    "the Triton of a case; written by python -m perf check --update"
)

Place = tuple[str, str, str]  # target, operation and case, kernel
CasePlace = tuple[str, str]  # target, operation and case
Numbers = Mapping[str, float]


class Kept(NamedTuple):
    """What is kept of one kernel.

    `counts` are its `Counts.numbers`. An older file has `loops` instead, instructions per output of
    some of the loops, and perhaps no `instructions`.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions: int | None
    counts: dict[str, float] = {}
    loops: tuple[float | None, ...] = ()

    @property
    def numbers(self) -> Numbers:
        """What is compared, by its name."""
        numbers: dict[str, float] = {
            "registers": self.registers,
            "spill bytes": self.spill_bytes,
            "shared bytes": self.shared_bytes,
        }
        if self.instructions is not None:
            numbers[WHOLE] = self.instructions
        totals = {name: count for name, count in self.counts.items() if name.startswith(TOTAL)}
        return numbers | totals


@dataclass
class Baseline:
    """Every kernel's numbers, and of every case what it was made of, if the file says so."""

    kernels: dict[Place, Kept] = field(default_factory=dict)
    made_of: dict[CasePlace, str] = field(default_factory=dict)

    def numbers(self) -> dict[Place, Numbers]:
        """What is compared."""
        return {place: kept.numbers for place, kept in self.kernels.items()}

    def of_case(self, where: CasePlace) -> dict[str, Kept]:
        """One case's kernels by their names."""
        return {place[2]: kept for place, kept in self.kernels.items() if place[:2] == where}

    def without(self, places: Iterable[Place]) -> Baseline:
        """All but these kernels; what their cases were made of goes with them."""
        gone = set(places)
        kernels = {place: kept for place, kept in self.kernels.items() if place not in gone}
        cases = {place[:2] for place in gone}
        known = {where: text for where, text in self.made_of.items() if where not in cases}
        return Baseline(kernels, known)

    def joined(self, other: Baseline) -> Baseline:
        """Both baselines in one; the other's numbers are taken where both have some."""
        return Baseline(self.kernels | other.kernels, self.made_of | other.made_of)


def case_place(fact: KernelFacts) -> CasePlace:
    """The place of a fact's case in a baseline."""
    return fact.target, f"{fact.op}: {fact.case}"


def of_facts(facts: Iterable[KernelFacts]) -> Baseline:
    """The facts as a baseline.

    What does not compile has no numbers: it is a fault, which the command reports by itself.
    """
    found = Baseline()
    for where, group in groupby(sorted(facts, key=case_place), key=case_place):
        of_case = list(group)
        compiled = [fact for fact in of_case if not fact.error]
        for name, fact in zip(numbered(fact.kernel for fact in compiled), compiled, strict=True):
            found.kernels[(*where, name)] = _kept(fact)
        if len(compiled) == len(of_case):
            found.made_of[where] = made_of(of_case)
    return found


def _kept(fact: KernelFacts) -> Kept:
    code = fact.registers, fact.spill_bytes, fact.shared_bytes, fact.instructions
    return Kept(*code, fact.counts.numbers)


def path_of(version: str, folder: Path = FOLDER) -> Path:
    """The baseline of a Triton version: minor versions bring another compiler."""
    return folder / f"triton-{'.'.join(version.split('.')[:2])}.json"


def read(path: Path) -> Baseline:
    """A baseline file's numbers.

    Raises:
        FileNotFoundError: there is none for this Triton.
    """
    document = json.loads(path.read_text(encoding="utf-8"))
    found = Baseline()
    for target, cases in document["targets"].items():
        for case, kernels in cases.items():
            for name, value in kernels.items():
                if name == _MADE_OF:
                    found.made_of[target, case] = value
                else:
                    found.kernels[target, case, name] = _parsed(value)
    return found


def _parsed(value: Sequence[Any]) -> Kept:
    registers, spilled, shared, *others = value
    if isinstance(others[-1], dict):
        return Kept(registers, spilled, shared, others[0], others[-1])
    if isinstance(others[-1], list):
        return Kept(registers, spilled, shared, others[0], loops=tuple(others[-1]))
    if len(others) == 1 and isinstance(others[0], int):
        return Kept(registers, spilled, shared, others[0])
    return Kept(registers, spilled, shared, None, loops=tuple(others))


def _printed(kept: Kept) -> str:
    numbers: list[Any] = [*kept[:3]]
    if kept.instructions is None:
        numbers += kept.loops
    else:
        read = dict(kept.counts) or list(kept.loops)
        numbers += [kept.instructions, read] if read else [kept.instructions]
    return json.dumps(numbers)


def write(path: Path, baseline: Baseline) -> None:
    """Write a baseline, a line per kernel, in sorted order."""
    lines = ["{", f' "about": {json.dumps(_ABOUT)},', ' "targets": {']
    for target, cases in _nested(baseline).items():
        lines.append(f"  {json.dumps(target)}: {{")
        for case, entries in cases.items():
            inner = [f"    {json.dumps(name)}: {text}" for name, text in entries.items()]
            lines += [f"   {json.dumps(case)}: {{", ",\n".join(inner), "   },"]
        lines[-1] = "   }"
        lines.append("  },")
    lines[-1] = lines[-1].rstrip(",")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*lines, " }", "}"]) + "\n", encoding="utf-8")


def _nested(baseline: Baseline) -> Mapping[str, Mapping[str, Mapping[str, str]]]:
    nested: dict[str, dict[str, dict[str, str]]] = {}
    for (target, case, kernel), kept in sorted(baseline.kernels.items()):
        entries = nested.setdefault(target, {}).setdefault(case, {})
        if not entries and (target, case) in baseline.made_of:
            entries[_MADE_OF] = json.dumps(baseline.made_of[target, case])
        entries[kernel] = _printed(kept)
    return nested

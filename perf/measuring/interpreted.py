"""Every kernel's parity on tiny maps in Triton's interpreter: it needs no GPU and tells no speed.

The interpreter has to be asked for before Triton is imported, so this runs as a process of its
own: `Interpreter` starts one, and its `main` prints one line of JSON per case.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from perf.measuring.parity import Gate
from perf.operations.contract import Case, Operation, operations, scheduled
from tritonloss._core.configurations import forced
from tritonloss._tools.interpreter import hasten_interpreter

_WINDOW = 7
_KINDS = 4


@dataclass(frozen=True)
class Parity:
    """How far the kernels were from the float64 reference, and how far they may be."""

    op: str
    case: str
    error: float
    allowed: float
    passed: bool


def cases(operation: Operation, quick: bool = False) -> list[int]:
    """The indices of the operation's cases that are checked: a few kinds of question, each once.

    The tests ask all of them. Large windows, which would take minutes, are left out.
    """
    kinds: dict[str, int] = {}
    for index, case in enumerate(operation.cases):
        if case.options.get("window_size", 3) <= _WINDOW:
            kinds.setdefault(_question(case), index)
    return list(kinds.values())[: 1 if quick else _KINDS]


def _question(case: Case) -> str:
    """What is left of a case on a tiny map: many shapes become the same."""
    tiny = case.tiny()
    return f"{tiny.shape.size} {tiny.dtype} {tiny.layout} {tiny.parameters}"


class Interpreter:
    """A process that checks cases, given by their operations' names and their indices.

    Ctrl-C does not reach it: whoever has started it decides what becomes of it.
    """

    def __init__(self, work: Sequence[tuple[str, int]]) -> None:
        command = [sys.executable, "-m", "perf.measuring.interpreted", json.dumps(work)]
        environment = {**os.environ, "TRITON_INTERPRET": "1", "TRITONLOSS_TUNING": "off"}
        self.stopped = False
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            command, cwd=Path(__file__).parents[2], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=self._errors, start_new_session=True,
        )  # fmt: skip

    def results(self) -> Iterator[Parity]:
        """The results, as they come."""
        for line in self._process.stdout or ():
            yield Parity(**json.loads(line))
        self._process.wait()

    def stop(self) -> None:
        """Check nothing more."""
        self.stopped = True
        self._process.kill()

    @property
    def trouble(self) -> str | None:
        """What went wrong, if it ended by itself before all was checked."""
        if self.stopped or not self._process.wait():
            return None
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return lines[-1] if lines else f"exit status {self._process.returncode}"


def judge(operation: Operation, case: Case) -> Parity:
    """The parity of one case, checked in this process."""
    with _small_launches(operation), scheduled(operation, case):
        verdict = Gate(operation, case, torch.device("cpu")).judge(operation.function)
    return Parity(operation.name, case.text, verdict.error, verdict.allowed, verdict.passed)


@contextmanager
def _small_launches(operation: Operation) -> Iterator[None]:
    with ExitStack() as stack:
        for operator in operation.operators:
            stack.enter_context(forced(operator, dict(operation.small_launch)))
        yield


def main(work: Sequence[tuple[str, int]]) -> int:
    """Print one line per case, given by its operation's name and its index."""
    hasten_interpreter()
    for name, index in work:
        operation = operations([name])[0]
        print(json.dumps(asdict(judge(operation, operation.cases[index].tiny()))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))

"""Every kernel's parity on tiny maps in Triton's interpreter: proof without a GPU, no speed.

The interpreter has to be asked for before Triton is imported, so this runs as a process of its
own: `check` starts one, and its `main` prints one line of JSON per case.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from perf.measuring.parity import Gate
from perf.operations.contract import Case, Operation, operations, scheduled
from tritonloss._core.configurations import forced

_WINDOW = 7
_KINDS = 4
# Several programs even on a tiny map, of little work each: the interpreter takes 30 us a step.
_SMALL_LAUNCH = {"LANES": 8, "ROWS": 8, "num_warps": 1}


@dataclass(frozen=True)
class Parity:
    """How far the kernels were from the float64 reference, and how far they may be."""

    op: str
    case: str
    error: float
    allowed: float
    passed: bool


def cases(operation: Operation, quick: bool = False) -> list[int]:
    """Which of the operation's cases are checked: a few kinds of question, each once.

    The tests ask all of them. Large windows are left out, which would take minutes.
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


def check(
    work: Sequence[tuple[str, int]],
    progress: Callable[[str], None] = lambda _: None,
    end: float | None = None,
) -> tuple[list[Parity], str | None]:
    """(results, what went wrong if not all were reached) of a process with the interpreter.

    At ``end``, a time of the monotonic clock, it is stopped, and what was not reached is left out.
    """
    command = [sys.executable, "-m", "perf.measuring.interpreted", json.dumps(work)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "TRITONLOSS_TUNING": "off"}
    root = Path(__file__).parents[2]
    results = []
    with subprocess.Popen(
        command, cwd=root, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        stop = threading.Timer((end or math.inf) - time.monotonic(), process.kill)
        if end is not None:
            stop.start()
        for line in process.stdout or ():
            results.append(Parity(**json.loads(line)))
            progress(f"{results[-1].op} in the interpreter")
        errors = process.stderr.read().strip() if process.stderr else ""
        stop.cancel()
    if process.returncode and end is not None and time.monotonic() >= end:
        return results, None
    return results, errors.splitlines()[-1] if process.returncode and errors else None


def judge(operation: Operation, case: Case) -> Parity:
    """One case, in this process."""
    with _small_launches(operation), scheduled(operation, case):
        verdict = Gate(operation, case, torch.device("cpu")).judge(operation.function)
    return Parity(operation.name, case.text, verdict.error, verdict.allowed, verdict.passed)


@contextmanager
def _small_launches(operation: Operation) -> Iterator[None]:
    with ExitStack() as stack:
        for operator in operation.operators:
            stack.enter_context(forced(operator, dict(_SMALL_LAUNCH)))
        yield


def main(work: Sequence[tuple[str, int]]) -> int:
    """Print one line per case, given by its operation's name and its index."""
    for name, index in work:
        operation = operations([name])[0]
        print(json.dumps(asdict(judge(operation, operation.cases[index].tiny()))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))

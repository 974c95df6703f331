"""`python -m perf COMMAND`: each command is a module with a `main`."""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType

# PyTorch's profiler, which counts memory here, would write two lines for everything that it counts.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

# The module with the command's `main`, and what the command does.
COMMANDS = {
    "report": (
        "report.make",
        "measure on this machine and write rows.csv, report.md and report.html",
    ),
    "compile-only": (
        "compiling.compile_only",
        "compile every shipped kernel for GPUs that need not be there",
    ),
    "check": (
        "compiling.check",
        "every kernel's machine code and every loss's launches against the baseline",
    ),
    "code-table": ("report.code_table", "write the table of machine code into the README"),
    "host-time": (
        "measuring.host_time",
        "the host's time and the launches of every loss, on a stand-in for the driver",
    ),
    "gpu": (
        "gpu",
        "nine minutes on a machine with a GPU: tests, rows, tuning, report",
    ),
    "gpu-cache": (
        "measuring.warm_cache",
        "compile, without a GPU, what make gpu launches: an archive of Triton's cache",
    ),
    "predict": (
        "compiling.predict",
        "rank launch configurations without a GPU, by a model: a prediction",
    ),
    "picture": ("report.picture", "count the losses' memory and draw the picture of the README"),
    "compare": ("report.compare", "the rows that moved between two reports"),
    "record": ("report.record", "add a report's GPU rows to perf/results"),
    "summary": ("report.summary", "what a report's rows come to, as a table"),
    "surrogate": (
        "training.surrogate",
        "fit the network that NeuroIoU is trained with, on the photographs",
    ),
    "train": ("training.train", "train a small network on photographs with each loss"),
}


def module_of(command: str) -> ModuleType:
    """The module with the command's `main`."""
    return importlib.import_module(f"perf.{COMMANDS[command][0]}")


def main(arguments: list[str]) -> int:
    """The exit status of the command's module; 2 if there is no such command."""
    if not arguments or arguments[0] not in COMMANDS:
        width = max(map(len, COMMANDS))
        listed = "\n".join(f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items())
        print(f"usage: python -m perf COMMAND [options]\n\n{listed}", file=sys.stderr)
        return 0 if arguments in (["-h"], ["--help"]) else 2
    return int(module_of(arguments[0]).main(arguments[1:]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

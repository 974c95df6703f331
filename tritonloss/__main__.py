"""The command line: ``python -m tritonloss doctor | tune``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from . import _doctor, _tune


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    options = _parser().parse_args(arguments)
    if options.command == "tune":
        return _tune.tune(options.op, options.budget, options.out, _say)
    if options.self_test:
        return _doctor.self_test(torch.device("cpu"), _say)
    return _doctor.doctor(_say)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tritonloss")
    commands = parser.add_subparsers(dest="command", required=True)

    doctor = commands.add_parser("doctor", help="report the installation and test every operator")
    doctor.add_argument("--self-test", action="store_true", help=argparse.SUPPRESS)

    tune = commands.add_parser("tune", help="measure launch configurations on this GPU")
    tune.add_argument("--op", metavar="NAME", help="one operator only")
    tune.add_argument("--budget", type=float, metavar="SECONDS", help="stop after about this long")
    tune.add_argument(
        "--out", type=Path, metavar="FILE", help="where to write (default: the user's cache)"
    )
    return parser


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())

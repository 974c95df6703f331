"""The command line: ``python -m tritonloss doctor | tune``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ._tools import doctor, tuner
from ._tools.tuning_cases import shape_of


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status of one command, which is run."""
    options = _parser().parse_args(arguments)
    if options.command == "tune":
        return _run_tune(options)
    if options.self_test:
        return doctor.interpreted_self_test(_say)
    return doctor.doctor(_say, options.brief)


def _run_tune(options: argparse.Namespace) -> int:
    if options.export is not None:
        return tuner.export(Path(options.export) if options.export else None, _say)
    request = tuner.Request(
        options.op, options.shapes, options.budget, options.resume, options.out, options.first
    )
    return tuner.tune(request, _say)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tritonloss")
    commands = parser.add_subparsers(dest="command", required=True)

    doctor = commands.add_parser("doctor", help="report the installation and test every operator")
    doctor.add_argument("--brief", action="store_true", help="test nothing")
    doctor.add_argument("--self-test", action="store_true", help=argparse.SUPPRESS)

    tune = commands.add_parser("tune", help="measure launch configurations on this GPU")
    tune.add_argument("--op", metavar="NAME", help="one operator only")
    tune.add_argument("--budget", type=float, metavar="SECONDS", help="stop after about this long")
    tune.add_argument(
        "--shapes", nargs="+", type=shape_of, metavar="NxCxHxW",
        help="tune for logits of these sizes",
    )  # fmt: skip
    tune.add_argument(
        "--first", action="store_true", help="each operator's first case only: a start in minutes"
    )
    tune.add_argument(
        "--resume", action="store_true", help="leave out what the file already has for this version"
    )
    tune.add_argument(
        "--out", type=Path, metavar="FILE", help="where to write (default: the user's cache)"
    )
    tune.add_argument(
        "--export", nargs="?", const="", metavar="FILE",
        help="tune nothing; check a tuned file (default: this GPU's) and put it with those that "
        "the package ships",
    )  # fmt: skip
    return parser


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())

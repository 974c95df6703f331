"""Reports, tuning and GPU runs that are stopped by real signals: what was measured stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from perf.measuring import rows
from tests.perf.made import ROOT, row

# Ctrl-C, what a time limit sends, and what leaves no time for anything.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
signals = pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)


def stopped(command: list[str], number: signal.Signals, ready: Callable[[], bool]) -> int:
    """The exit status of a process that gets the signal as soon as it is ready."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while not ready():
            assert process.poll() is None, "it ended by itself"
            time.sleep(0.02)
        process.send_signal(number)
        return process.wait(300)
    finally:
        process.kill()


def has_rows(folder: Path) -> bool:
    path = folder / "rows.csv"
    return path.exists() and len(path.read_text().splitlines()) > 1


REPORT = ["-m", "perf", "report", "--rows-only", "--ops", "focal_loss", "cholesky_ex", "--out"]


@signals
def test_a_stopped_report_keeps_its_rows(number: signal.Signals, tmp_path: Path) -> None:
    status = stopped([*REPORT, str(tmp_path)], number, lambda: has_rows(tmp_path))
    found = rows.read(tmp_path)
    assert found and all(each["ms_p50"] > 0 for each in found)
    if number == signal.SIGKILL:
        assert status == -signal.SIGKILL
    else:
        assert status == 130
        assert "the report was interrupted" in (tmp_path / "report.md").read_text()


def test_rows_are_in_the_file_when_they_are_added(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    with rows.Appender(path) as file:
        assert rows.read(path) == []
        file.add(row())
        assert rows.read(path) == [row()]
    with path.open("a") as stream:
        stream.write("loss,triton,fu")  # whoever wrote this was killed
    assert rows.read(path) == [row()]
    with rows.Appender(path) as file:
        file.add(row(provider="eager"))
    assert rows.read(path) == [row(), row(provider="eager")]
    assert path.read_text().count("ms_p50") == 1

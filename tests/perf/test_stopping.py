"""Reports, tuning and GPU runs that are stopped by real signals: what was measured stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from perf import gpu
from perf.measuring import rows
from tests.perf.made import ROOT, row

# Ctrl-C's signal, that of a time limit, and one that leaves no time for anything.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
signals = pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)


def stopped(command: list[str], number: signal.Signals, ready: Callable[[], bool]) -> int:
    """The exit status of a process that gets the signal as soon as it is ready."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        # In the background of a shell these tests ignore interrupts, and so would the process.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
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


GPU = ["-m", "perf", "gpu", "--steps", "rows", "report", "--ops", "focal_loss", "cholesky_ex"]


@signals
@pytest.mark.thorough
def test_a_stopped_run_on_a_gpu_machine_keeps_its_rows(
    number: signal.Signals, tmp_path: Path
) -> None:
    """Without a GPU the rows are the reference's; processes and signals are the same."""
    status = stopped([*GPU, "--out", str(tmp_path)], number, lambda: has_rows(tmp_path))
    assert rows.read(tmp_path)
    assert "== rows" in (tmp_path / "log.txt").read_text()
    if number == signal.SIGKILL:
        assert status == -signal.SIGKILL
        end = time.monotonic() + 200
        while processes_about(tmp_path) and time.monotonic() < end:
            time.sleep(0.1)
        assert not processes_about(tmp_path)
        return
    assert status == 130
    assert "the report was interrupted" in (tmp_path / "report.md").read_text()
    assert "stopped before the end" in (tmp_path / "log.txt").read_text()
    assert len(list(tmp_path.iterdir())) <= 7


def processes_about(folder: Path) -> list[str]:
    """The command lines of processes that name the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        found += [command] if str(folder) in command else []
    return found


@pytest.mark.thorough
def test_a_step_that_does_not_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When its time is over it is asked to end, and killed if it does not. The run goes on."""
    monkeypatch.setattr(gpu, "GRACE_S", 0.2)
    (tmp_path / "stubborn.py").write_text(
        "import signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('begun', flush=True)\n"
        "time.sleep(1000)\n"
    )
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    run = gpu.Run(tmp_path / "out", 530.0, [])
    assert run.step("stubborn", [["stubborn"], ["platform"]], run.passed_s + 5) == [-9, 0]
    run.close()
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "begun" in log and "its time is over" in log


def test_measuring_goes_on_in_a_new_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does when the GPU is lost. When the process died or hung, its last case is given up."""
    commands: list[list[str]] = []
    statuses = iter([gpu.GPU_LOST, -signal.SIGSEGV, -signal.SIGKILL, 0])

    def step(
        self: gpu.Run, name: str, given: list[list[str]], end: float, growing: Path
    ) -> list[int]:
        commands.extend(given)
        status = next(statuses)
        self.stalled = status == -signal.SIGKILL
        return [status]

    monkeypatch.setattr(gpu.Run, "step", step)
    run = gpu.Run(tmp_path, 530.0, [])
    gpu.rows(run)
    assert not run.failed
    assert ["--resume" in command for command in commands] == [False, True, True, True]
    assert ["--give-up-one" in command for command in commands] == [False, False, True, True]
    run.close()


@pytest.mark.thorough
def test_a_step_that_writes_no_more_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "STALL_S", 1.0)
    (tmp_path / "hanging.py").write_text(
        "import time\n"
        "for _ in range(4):\n"
        "    open('rows', 'a').write('row')\n"
        "    time.sleep(0.4)\n"
        "time.sleep(1000)\n"
    )
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    run = gpu.Run(tmp_path / "out", 530.0, [])
    (status,) = run.step("hanging", [["hanging"]], 500.0, growing=tmp_path / "rows")
    assert status == -signal.SIGTERM and run.stalled
    assert "nothing more comes" in (tmp_path / "out" / "log.txt").read_text()
    run.close()


TUNE = """
import sys, time
from dataclasses import replace
from tests.tools import tuned
from tritonloss import __main__
from tritonloss._tools import tuner

def slow(launch):
    time.sleep(0.05)
    return tuned.rows_as_time(launch)

cases = [tuned.case_of({"ROWS": 8, "num_warps": 1}) for _ in range(500)]
cases = [replace(case, window=window) for window, case in enumerate(cases)]
tuner._gpu = lambda: tuned.CPU
tuner._median_ms = slow
tuner.tuning_cases = lambda *_: cases
sys.exit(__main__.main(["tune", "--out", sys.argv[1]]))
"""


@signals
@pytest.mark.thorough
def test_stopped_tuning_keeps_its_configurations(number: signal.Signals, tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"

    def entries() -> dict[str, Any]:
        document = json.loads(path.read_text()) if path.exists() else {"entries": {}}
        return dict(document["entries"])

    script = tmp_path / "tune.py"
    script.write_text(TUNE)
    status = stopped([str(script), str(path)], number, lambda: len(entries()) > 1)
    assert status == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    found = entries()
    assert 1 < len(found) < 500
    assert all(entry["configuration"]["ROWS"] == 8 for entry in found.values())


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

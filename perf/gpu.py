"""Nine minutes on a machine with a GPU, the most wanted first: `make gpu`.

The steps, in order: the environment and a warm cache of kernels; the tests that need a GPU, with
the examples of every loss, in many processes; the kernels' rows, then what they are compared with;
tuning of each operator's first case; the report, with the rows for which there is still time. Each
step runs in processes of its own and has a time at which it ends, so that a step that hangs or
crashes does not end the others. Whatever ends the run, and whenever: rows, configurations and the
log are in the folder by then. The folder holds at most seven files.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[1]
ARCHIVE = ROOT / "build" / "gpu-cache.tar.xz"
CACHE = ROOT / "build" / "gpu-triton"  # Triton's cache, which all steps share
LIMIT_S = 530.0
# When a step ends at the latest, as a share of all the time.
ENDS = {"environment": 0.12, "parity": 0.32, "rows": 0.62, "tune": 0.82, "report": 0.97}
PARITY_S = 90.0
GRACE_S = 12.0  # a step that was asked to end has so long to write what it has
RESTARTS = 4  # of the measurements, when a kernel has broken the GPU or its process
STALL_S = 120.0  # after so long without a new row, what is being measured will not end
GPU_LOST = 3  # the exit status of python -m perf report when a kernel has broken the GPU
NO_TESTS = 5  # the exit status of pytest when it has found no tests
_LIBC, _PR_SET_PDEATHSIG = ctypes.CDLL(None), 1  # for Linux's prctl


@dataclass
class Run:
    """One run: its log, the steps that have failed, and whether it was asked to stop."""

    out: Path
    limit_s: float
    ops: Sequence[str]
    started: float = field(default_factory=time.monotonic)
    failed: list[str] = field(default_factory=list)
    stopped: bool = False
    stalled: bool = False  # whether the last step did
    complete_cache: bool = False  # nothing is left to compile
    scratch: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="gpu-run-")))

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        self._log = (self.out / "log.txt").open("w", encoding="utf-8")
        self._lock = threading.Lock()

    @property
    def passed_s(self) -> float:
        return time.monotonic() - self.started

    def end_of(self, step: str) -> float:
        """When a step ends at the latest, in seconds from the start."""
        return ENDS[step] * self.limit_s

    def say(self, line: str) -> None:
        """Print a line on the terminal, and write it to the log, which is never behind."""
        with self._lock:
            with suppress(OSError):  # the terminal may be gone; the log still gets the line
                print(line, flush=True)
            self._log.write(f"{line}\n")
            self._log.flush()

    def ask_to_stop(self, number: int, frame: object) -> None:
        """What Ctrl-C and a time limit's signal do."""
        self.stopped = True

    def step(
        self,
        name: str,
        commands: Sequence[Sequence[str]],
        end_s: float,
        growing: Path | None = None,
    ) -> list[int]:
        """The exit statuses of processes that run beside each other until they end or are ended.

        They are ended when their time is over, when the run is asked to stop, or when `growing`,
        the file that they write, grows no more.
        """
        self.say(f"\n== {name} (after {self.passed_s:.0f} s, until {end_s:.0f} s at most)")
        children = [self._start(command) for command in commands]
        size, grown_s, self.stalled = -1, self.passed_s, False
        while any(child.poll() is None for child in children):
            if growing and growing.exists() and growing.stat().st_size != size:
                size, grown_s = growing.stat().st_size, self.passed_s
            self.stalled = growing is not None and self.passed_s > grown_s + STALL_S
            if self.stopped or self.stalled or self.passed_s > end_s:
                self._end(children)
                break
            time.sleep(0.05)
        for child in children:
            child.pump.join(5)
        return [int(child.process.returncode) for child in children]

    def close(self) -> None:
        """Pack what is left of the steps, and end the log."""
        with tarfile.open(self.out / "rest.tar.gz", "w:gz") as file:
            file.add(self.scratch, "rest")
        shutil.rmtree(self.scratch, ignore_errors=True)
        self._log.close()

    def _start(self, command: Sequence[str]) -> Child:
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "TRITON_CACHE_DIR": str(CACHE),
            "TRITONLOSS_CACHE_DIR": str(self.out),  # where tuned configurations are written
        }
        if "tune" not in command:  # rows are those of the configurations that ship
            environment["TRITONLOSS_TUNING"] = "off"
        process = subprocess.Popen(
            [sys.executable, "-m", *command], cwd=ROOT, env=environment,
            text=True, errors="replace", stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            preexec_fn=_on_its_own,
        )  # fmt: skip
        pump = threading.Thread(target=self._pump, args=(process.stdout,), daemon=True)
        pump.start()
        return Child(process, pump)

    def _pump(self, stream: IO[str]) -> None:
        for line in stream:
            self.say(line.rstrip("\n"))

    def _end(self, children: Sequence[Child]) -> None:
        stalled = "nothing more comes" if self.stalled else "its time is over"
        self.say("stopped" if self.stopped else stalled)
        for child in children:
            child.process.terminate()
        end = time.monotonic() + GRACE_S
        while any(child.poll() is None for child in children) and time.monotonic() < end:
            time.sleep(0.05)
        for child in children:
            if child.poll() is None:
                child.process.kill()
                child.process.wait()


@dataclass(frozen=True)
class Child:
    """A process, and the thread that passes on what it says."""

    process: subprocess.Popen[str]
    pump: threading.Thread

    def poll(self) -> int | None:
        return self.process.poll()


def _on_its_own() -> None:
    """Keep a terminal's Ctrl-C from a step, and let the step end with the run.

    Ctrl-C is meant for the run, which decides what becomes of its steps. (`stopping.py` has the
    same for pools, but it imports torch, which this file does without.)
    """
    os.setpgid(0, 0)
    with suppress(AttributeError):  # not Linux
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def environment(run: Run) -> None:
    """Say what is installed, and unpack the kernels that were compiled elsewhere."""
    run.step("environment", [["tritonloss", "doctor", "--brief"]], run.end_of("environment"))
    if ARCHIVE.exists():
        command = ["perf", "gpu-cache", "unpack", "--archive", str(ARCHIVE)]
        (status,) = run.step("warm cache", [command], run.end_of("environment"))
        run.complete_cache = status == 0
    else:
        run.say(f"no warm cache ({ARCHIVE.name}, by make gpu-cache): kernels are compiled here")


def parity(run: Run) -> None:
    """Run the tests that need a GPU, and compile beside them what the cache lacks.

    Every loss's examples are among the tests.
    """
    cores = os.cpu_count() or 1
    count = max(1, min(10, cores - 4))
    tests = [
        [
            "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "gpu",
            "--share", f"{index}/{count}", "--junitxml", str(run.scratch / f"tests-{index}.xml"),
        ]
        for index in range(count)
    ]  # fmt: skip
    end = min(run.end_of("parity"), run.passed_s + PARITY_S)
    fill = ["perf", "gpu-cache", "fill", "--seconds", f"{end - run.passed_s - 5:.0f}"]
    fill += ["--workers", str(max(1, cores // 2))]
    beside = [] if run.complete_cache else [fill]
    statuses = run.step(f"tests in {count} processes", [*tests, *beside], end)
    if any(status not in (0, NO_TESTS) for status in statuses[:count]):
        run.failed.append("parity")


def rows(run: Run) -> None:
    """Measure the kernels' rows, then what they are compared with, and report what there is."""
    if _report(run, "rows", fresh=True):
        run.failed.append("rows")


def tune(run: Run) -> None:
    """Tune each operator's first case."""
    left = run.end_of("tune") - run.passed_s - GRACE_S
    command = ["tritonloss", "tune", "--first", "--budget", f"{max(1.0, left):.0f}"]
    (status,) = run.step("tune", [command], run.end_of("tune"))
    if status:
        run.failed.append("tune")


def report(run: Run) -> None:
    """Measure the rows for which there is still time, and report all rows."""
    if _report(run, "report", fresh=False) and "rows" not in run.failed:
        run.failed.append("report")


def _report(run: Run, step: str, fresh: bool) -> bool:
    """Whether something was wrong with the rows.

    Measuring begins again, in a new process, where a kernel has broken the GPU or its process.
    """
    more = [] if fresh else ["--resume"]
    for _ in range(RESTARTS + 1):
        left = run.end_of(step) - run.passed_s - GRACE_S
        command = ["perf", "report", "--rows-only", "--budget", f"{max(0.0, left):.0f}"]
        command += ["--out", str(run.out), *more]
        command += ["--ops", *run.ops] if run.ops else []
        (status,) = run.step(step, [command], run.end_of(step), growing=run.out / "rows.csv")
        # A process that died has left no rows of the case that it was at: the next one gives it up.
        died = run.stalled or status in (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS)
        if run.stopped or not (died or status == GPU_LOST):
            return status not in (0, 130, -signal.SIGTERM)
        more = ["--resume", *(["--give-up-one"] if died else [])]
    return True


STEPS: dict[str, Any] = {
    "environment": environment, "parity": parity, "rows": rows, "tune": tune, "report": report,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status of `python -m perf gpu`: 1 if a step failed, 130 if it was stopped."""
    parser = argparse.ArgumentParser(
        prog="python -m perf gpu", description=str(__doc__).split("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), metavar="FOLDER")
    parser.add_argument("--limit", type=float, default=LIMIT_S, metavar="SECONDS")
    parser.add_argument("--steps", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--ops", nargs="+", metavar="OP", default=[])
    options = parser.parse_args(arguments)
    run = Run(options.out.absolute(), options.limit, options.ops)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, run.ask_to_stop)
    for name in options.steps:
        if not run.stopped:
            STEPS[name](run)
    interrupted, run.stopped = run.stopped, False
    run.step("summary", [["perf", "summary", str(run.out)]], run.passed_s + 20)
    failed = f"FAILED: {' '.join(run.failed)}" if run.failed else "all steps passed"
    run.say("stopped before the end" if interrupted else failed)
    run.close()
    return 130 if interrupted else int(bool(run.failed))

"""A report in the making: its parts, its progress, its end."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from perf.compiling import compile_only
from perf.compiling.compile_only import Job
from perf.measuring import measure, rows
from perf.measuring.counted import CountedMemory
from perf.measuring.machine import Machine
from perf.measuring.measure import DeviceLostError
from perf.measuring.timing import Timing
from perf.operations.contract import PASSES, Case, Operation, operations
from perf.report import make, parts
from perf.report.choice import Choice
from perf.report.make import _measurements, main, plan
from perf.report.parts import Making
from tests.perf.made import ROOT, fact, offline_report, row
from tritonloss._core.progress import Progress


def making(**changes: Any) -> Making:
    report = offline_report(rows=[], memory=[], parity=[], facts=[], notes=[])
    made = Making(report, Choice(), operations(["ssim"]), Progress(1, io.StringIO()))
    return replace(made, **changes)


class Silent:
    """An interpreter that says nothing until it is stopped."""

    trouble = None

    def __init__(self, work: object) -> None:
        self.end = threading.Event()

    def results(self) -> Iterator[Any]:
        assert self.end.wait(300), "it was waited for"
        yield from ()

    def stop(self) -> None:
        self.end.set()

    @property
    def stopped(self) -> bool:
        return self.end.is_set()


def test_a_quick_report_begins_nothing_after_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    over = making(choice=Choice(quick=True), end=time.monotonic() - 1)
    operation = operations(["ssim"])[0]
    over.plan(parts.CASES, 1)
    over.plan(parts.PARITY, 1)
    monkeypatch.setattr(parts, "Interpreter", Silent)
    began = time.monotonic()
    with parts.interpreting(over, [("ssim", 0)]):
        parts.measure(over, parts.CASES, [(operation, operation.cases[0])])
    assert time.monotonic() - began < 100
    over.finish(interrupted=False)
    assert over.report.rows == [] == over.report.parity and over.report.parity_left_out == 1
    (note,) = over.report.notes
    assert "the time allowed was over" in note
    assert f"1 {parts.CASES}, 1 {parts.PARITY}" in note


def test_the_interpreter_is_waited_for_until_a_time() -> None:
    made = making(chosen=operations())
    work = parts.parity_work(made)
    assert [name for name, _ in work[: len(made.chosen)]] == [op.name for op in made.chosen]
    made.plan(parts.PARITY, len(work))
    with parts.interpreting(made, work, end=time.monotonic() + 0.1):
        pass
    made.finish(interrupted=False)
    assert 0 < made.report.parity_left_out <= len(work)
    assert parts.PARITY in made.report.notes[0]


def test_memory_is_counted_for_every_number_of_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quick report does so, too: where nothing is computed, the size of a map costs nothing."""

    def count(operation: Operation, case: Case) -> CountedMemory:
        return CountedMemory(operation.name, case.text, 1, 17, 1, case.shape.classes)

    monkeypatch.setattr(parts, "count", count)
    chosen = operations(["structural_similarity_loss"])
    quick, full = (making(chosen=chosen, choice=Choice(quick=quick)) for quick in (True, False))
    for made in (quick, full):
        made.plan(parts.MEMORY, 1)
        parts.count_memory(made)
        made.finish(interrupted=False)
        assert not made.report.notes
    assert {entry.classes for entry in quick.report.memory} == {1, 19, 21, 150, 171}
    assert len(full.report.memory) > len(quick.report.memory)


def test_interrupted_interpreting_keeps_what_was_checked() -> None:
    made = making()
    work = [("focal_loss", 0), *[("ssim", index % 2) for index in range(50)]]
    made.plan(parts.PARITY, len(work))
    with pytest.raises(KeyboardInterrupt):
        with parts.interpreting(made, work):
            for _ in range(6000):  # far longer than it takes where all processors are busy
                if made.report.parity:
                    raise KeyboardInterrupt
                time.sleep(0.1)
    assert 1 <= len(made.report.parity) < len(work)
    assert all(parity.passed for parity in made.report.parity)
    made.finish(interrupted=True)
    assert made.report.parity_left_out == len(work) - len(made.report.parity)
    assert "the report was interrupted" in made.report.notes[0]


def test_interrupted_compiling_keeps_what_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    work = [("ssim", index, "sm_90") for index in range(4)]

    def interrupted(pool: object, rest: list[Job], end: float) -> Iterator[Any]:
        assert rest == work[1:]
        yield rest[0], [fact(digest="compiled")]
        raise KeyboardInterrupt

    looked_up = {work[0]: [fact(digest="known", committed=True)]}
    monkeypatch.setattr(compile_only, "compilers", lambda: nullcontext())
    monkeypatch.setattr(compile_only, "recognised", lambda *_: iter([("ssim", looked_up)]))
    monkeypatch.setattr(compile_only, "compiled", interrupted)
    made = making()
    made.plan(parts.CODE, len(work))
    with pytest.raises(KeyboardInterrupt):
        parts.look_up_code(made, work)
    assert [entry.digest for entry in made.report.facts] == ["known", "compiled"]
    assert made.left[parts.CODE] == 2


def test_interrupted_compilers_stop_at_once() -> None:
    """What they were busy with is not waited for, and none of them is left."""
    script = (
        "import multiprocessing, signal, time\n"
        "from perf.compiling.compile_only import compilers\n"
        "if __name__ == '__main__':\n"
        # A job in the background ignores interrupts, and so do its children.
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "    began = time.monotonic()\n"
        "    try:\n"
        "        with compilers(2) as pool:\n"
        "            pool.submit(time.sleep, 0).result()\n"
        "            futures = [pool.submit(time.sleep, 1000) for _ in range(4)]\n"
        "            signal.raise_signal(signal.SIGINT)\n"
        "            futures[0].result()\n"
        "    except KeyboardInterrupt:\n"
        "        for process in multiprocessing.active_children():\n"
        "            process.join(20)\n"
        "        assert not multiprocessing.active_children()\n"
        "        print('stopped')\n"
        "    assert time.monotonic() - began < 500\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "interrupted.py"
        path.write_text(script)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, path], cwd=ROOT, env=environment, capture_output=True, text=True
        )
    assert (done.returncode, done.stdout) == (0, "stopped\n"), done.stderr[-2000:]


PARTS = ("copy", "count_memory", "measure_host", "look_up_code", "measure")


@pytest.mark.parametrize("part", PARTS)
def test_an_interrupted_report_is_written(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever part it was at. The report names all that is missing."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    for name in PARTS:
        monkeypatch.setattr(parts, name, interrupt if name == part else lambda *_: None)
    monkeypatch.setattr(parts, "interpreting", lambda *_: nullcontext())
    assert main(["--ops", "ssim", "--out", str(tmp_path)]) == 130
    page = (tmp_path / "report.md").read_text()
    assert "Left out, since the report was interrupted" in page
    missing = (parts.CASES, parts.MEMORY, parts.PARITY, parts.HOST, parts.CODE)
    assert all(what in page for what in missing)
    assert (tmp_path / "report.html").exists() and (tmp_path / "rows.csv").exists()
    assert str(tmp_path) in capsys.readouterr().out


def test_progress_in_a_log_file() -> None:
    stream = io.StringIO()
    bar = Progress(2, stream)
    bar.step("first")
    bar.more(1)
    bar.step("second", steps=2)
    bar.close()
    assert "3/3" in stream.getvalue() and "\r" not in stream.getvalue()


def test_progress_tells_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    bar = Progress(4, stream, budget_s=70.0)
    bar.announce("first")
    for seconds in (20.0, 40.0, 60.0, 80.0):
        clock[0] = seconds
        bar.step("next")
    lines = stream.getvalue().splitlines()
    left = [re.search(r", (\d+) s left", line) for line in lines]
    assert [match and match[1] for match in left] == ["50", "30", "10", None]


def test_heavy_steps_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    bar = Progress(0, stream)
    bar.more(2, weight=1.0)
    bar.more(1, weight=8.0)
    clock[0] = 20.0
    bar.step("light", steps=2)
    assert "2/3   20 s, 80 s left" in stream.getvalue()


class Terminal(io.StringIO):
    """A terminal, whose last line can be read."""

    def isatty(self) -> bool:
        return True

    def line(self) -> str:
        return self.getvalue().rpartition("\r")[2].rstrip()


def test_while_a_part_runs_the_bar_says_what_it_is_and_how_long_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The parts are memory, measuring, looking up and compiling, each seen from within."""
    terminal, clock, seen = Terminal(), [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    made = making(chosen=operations(["ssim", "rmi_loss"]), bar=Progress(0, terminal))

    def look(*_: Any) -> Any:
        seen.append(terminal.line())
        clock[0] += 10.0

    def looking_up(*_: Any) -> Iterator[tuple[str, Any]]:
        look()
        yield "ssim", {work[0]: [fact()]}

    def compiling(*_: Any) -> Iterator[tuple[Any, Any]]:
        look()
        yield work[1], [fact()]

    work = [("ssim", index, "sm_90") for index in range(2)]
    monkeypatch.setattr(parts, "count", look)
    monkeypatch.setattr(parts.Bench, "rows", lambda *_: look() or [])
    monkeypatch.setattr(compile_only, "compilers", lambda: nullcontext())
    monkeypatch.setattr(compile_only, "recognised", looking_up)
    monkeypatch.setattr(compile_only, "compiled", compiling)
    made.plan(parts.MEMORY, 2)
    made.plan(parts.CASES, 1)
    made.plan(parts.CODE, 2)
    parts.count_memory(made)
    first = made.chosen[0]
    parts.measure(made, parts.CASES, [(first, first.cases[0])])
    parts.look_up_code(made, work)
    told = [line.rpartition("  ")[2] for line in seen]
    assert list(dict.fromkeys(told)) == [
        "memory of ssim", "memory of rmi_loss", f"ssim: {first.cases[0].text}"[: len(told[-3])],
        "looking machine code up in the baseline", "compiling 1 cases that have changed",
    ]  # fmt: skip
    after_the_first = [line for line, what in zip(seen, told, strict=True) if what != told[0]]
    assert all(re.search(r"/\d+ +\d+ s, \d+ s left  ", line) for line in after_the_first)


def test_quick_report_end_to_end(tmp_path: Path) -> None:
    """The real command on this machine, without the interpreter that the tests run in.

    It has time enough for all it begins, however busy the processors are.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = (
        "import sys; from perf.report import make; make.QUICK_S = 1000.0; sys.exit(make.main("
        f"['--quick', '--ops', 'gaussian_statistics', '--out', {str(tmp_path)!r}]))"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = rows.read(tmp_path)
    provider = "triton" if torch.cuda.is_available() else "eager"
    timed = [r for r in found if r["provider"] == provider]
    assert {r["pass"] for r in timed} == {"forward", "backward", "full"}
    assert all(r["ms_p50"] > 0 and r["max_error"] < 1e-5 for r in timed)
    page = (tmp_path / "report.html").read_text()
    assert "gaussian statistics" in page and "sm_90" in page
    assert (tmp_path / "report.md").read_text().startswith("# tritonloss")


def test_on_a_gpu_the_kernels_come_first_and_then_what_compares_the_headlines() -> None:
    cases = plan(operations(), Choice(), on_gpu=True)
    found = _measurements(cases, Choice(), gpu=True)
    kinds = [what for what, _ in found]
    assert kinds == [parts.CASES, parts.OTHERS, parts.COMPILED, parts.OTHERS, parts.COMPILED]
    kernels, eager, compiled, more_eager, more_compiled = (work for _, work in found)
    assert list(kernels) == cases
    names = [operation.name for operation in operations()]
    assert [operation.name for operation, _ in eager] == names
    assert all(case == operation.cases[0] for operation, case in eager)
    assert len(eager) + len(more_eager) == len(cases)
    told = [operation.name for operation, _ in compiled]
    assert len(set(told)) == len(told) and all(case.against_compile for _, case in compiled)
    assert not [pair for pair in more_compiled if pair in compiled]
    quick = dict(_measurements(cases, Choice(quick=True), gpu=True))
    assert not quick[parts.COMPILED]


def test_on_a_gpu_rows_are_written_in_that_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels run in the interpreter, on tiny maps, with a stand-in for the clock."""
    timing = Timing(1.0, 0.9, 1.1, "no clock")

    def tiny(chosen: Any, choice: Choice, on_gpu: bool) -> list[tuple[Operation, Case]]:
        found = plan(chosen, choice, on_gpu)
        return [(operation, replace(case.tiny(), schedule=None)) for operation, case in found[:4]]

    monkeypatch.setattr(Machine, "has_gpu", property(lambda self: True))
    monkeypatch.setattr(make, "plan", tiny)
    monkeypatch.setattr(parts, "copy_bandwidth", lambda device: 100.0)
    monkeypatch.setattr(
        parts, "compiled", lambda operation: {"compile": lambda *args: operation.reference(*args)}
    )
    for name in ("time_call", "time_backward"):
        monkeypatch.setattr(measure, name, lambda *_: timing)
    monkeypatch.setattr(measure, "peak_bytes", lambda *_: 2**20)
    asked = ["--ops", "focal_loss", "binary_cross_entropy", "--rows-only", "--out", str(tmp_path)]
    assert main(asked) == 0
    found = rows.read(tmp_path)
    assert all(each["ms_p50"] == 1.0 for each in found)
    order = list(dict.fromkeys((each["provider"], each["op"]) for each in found))
    both = ["focal_loss", "binary_cross_entropy"]
    assert order[:2] == [("triton", op) for op in both]
    assert order.index(("eager", "binary_cross_entropy")) < order.index(
        ("compile", "binary_cross_entropy")
    )
    full = [each for each in found if (each["provider"], each["pass"]) == ("triton", "full")]
    assert len(full) == 4 and all(each["speedup_vs_eager"] == 1.0 for each in full)


def test_a_report_goes_on_with_the_rows_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["--ops", "cholesky_ex", "--rows-only", "--out", str(tmp_path)]
    main(asked)
    first = rows.read(tmp_path)
    assert first
    partial, other = first[:-1], {**first[0], "torch": "1.0"}
    rows.write(tmp_path / "rows.csv", [*partial, other])
    measured: list[Any] = []
    add = Making.add
    monkeypatch.setattr(Making, "add", lambda self, row: (measured.append(row), add(self, row)))
    main([*asked, "--resume"])
    assert {rows.asked(row) for row in measured} == {rows.asked(first[-1])}
    assert len(rows.read(tmp_path)) == len(first)
    assert "1 rows of another machine" in (tmp_path / "report.md").read_text()


def test_what_has_ended_a_process_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["--ops", "cholesky_ex", "--rows-only", "--resume", "--out", str(tmp_path)]
    main([*asked, "--give-up-one"])
    found = rows.read(tmp_path)
    given_up = [each for each in found if each["timer"] == parts.ENDED]
    assert found[:3] == given_up and {each["pass"] for each in given_up} == set(PASSES)
    assert len(found) > 3 and all(each["ms_p50"] for each in found[3:])
    measured: list[Any] = []
    monkeypatch.setattr(Making, "add", lambda self, row: measured.append(row))
    main(asked)
    assert not measured


def test_a_lost_gpu_ends_the_process_and_not_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(made: Making, what: str, work: object) -> None:
        made.add(row(ms_p50=None))
        raise DeviceLostError("illegal memory access")

    monkeypatch.setattr(parts, "measure", lost)
    assert main(["--ops", "cholesky_ex", "--rows-only", "--out", str(tmp_path)]) == 3
    assert "The GPU answered nothing any more" in (tmp_path / "report.md").read_text()
    assert len(rows.read(tmp_path)) == 1

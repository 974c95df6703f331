"""The tuner: what it measures, keeps, drops and says."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from tests.tools.tuned import (
    CPU,
    ENTRY,
    HEURISTIC,
    ROOT,
    RUN,
    SLICE,
    TUNED,
    ask,
    case_of,
    interrupted,
    named,
    offer,
    rows_as_time,
)
from tritonloss import __main__
from tritonloss._core import configurations
from tritonloss._core.source_hash import source_hash
from tritonloss._tools import tuner
from tritonloss._tools.sieve import LATE, Sieve


def test_tuner_keeps_the_fastest_that_is_right(cache: Path) -> None:
    case = case_of({"ROWS": 13}, {"ROWS": 16}, {"ROWS": 7}, {"ROWS": 8}, {"ROWS": 9})
    outcome = tuner.tune_case(case, CPU, float("inf"), rows_as_time)
    assert outcome.best == (8.0, {"ROWS": 8})
    assert [ms for ms, _ in outcome.measured] == [16.0, 8.0, 9.0]
    crashed, wrong = outcome.dropped
    assert "out of resources" in crashed and "long story" not in crashed
    assert "wrong: differs from the heuristic by nan" in wrong


def test_tuner_always_measures_one_candidate(cache: Path) -> None:
    outcome = tuner.tune_case(
        case_of({"ROWS": 13}, {"ROWS": 8}, {"ROWS": 4}), CPU, -1, rows_as_time
    )
    assert outcome.measured == [(8.0, {"ROWS": 8})]


def test_tuner_survives_inputs_that_do_not_fit(cache: Path) -> None:
    def run(device: torch.device) -> Callable[[], Any]:
        raise torch.OutOfMemoryError("too large")

    case = configurations.TuningCase(
        "some_forward", 19, 3, torch.float32, "contiguous", run, [TUNED]
    )
    outcome = tuner.tune_case(case, CPU, 1, rows_as_time)
    assert outcome.measured == [] and "too large" in outcome.dropped[0]


def test_tuner_leaves_out_what_compiling_has_filtered(cache: Path) -> None:
    case = case_of({"ROWS": 8}, {"ROWS": 4})
    faults = [None, "some_kernel spills 8 B"]
    outcome = tuner.tune_case(case, CPU, float("inf"), rows_as_time, faults)
    assert outcome.best == (8.0, {"ROWS": 8})
    assert outcome.dropped == ["{'ROWS': 4}: some_kernel spills 8 B"]


def test_a_sieve_that_lets_nothing_pass_is_not_believed() -> None:
    def answered(*faults: str | None) -> list[Future[str | None]]:
        found: list[Future[str | None]] = [Future() for _ in faults]
        for future, fault in zip(found, faults, strict=True):
            if fault != "late":
                future.set_result(fault)
        return found

    sieve = object.__new__(Sieve)
    case = case_of({"ROWS": 8}, {"ROWS": 4})
    for faults, believed in (
        (("spills", None), ["spills", None]),
        (("no compiler", "no compiler"), [None, None]),
        ((None, "late"), [None, LATE]),
        (("late", None), None),  # not even the heuristic's: there is no time for this case
    ):
        sieve._futures = {case.key: answered(*faults)}
        assert sieve.faults(case, until=time.monotonic()) == believed
    sieve._futures = {}
    assert sieve.faults(case) == [None, None]


def test_winners_are_checked_for_other_numbers_of_classes(cache: Path) -> None:
    def sized(shape: configurations.Shape, layout: str, device: torch.device) -> Callable[[], Any]:
        if shape[1] > 200:
            raise torch.OutOfMemoryError("too large")
        return lambda: torch.full(shape, 1.0)

    case = case_of(HEURISTIC)
    assert tuner.reach(case, TUNED, CPU) == [32]  # its code may depend on the classes
    assert tuner.reach(replace(case, sized=sized), TUNED, CPU) == [1, 32]
    wrong = replace(case, sized=lambda shape, layout, device: case_of(HEURISTIC).run(device))
    assert tuner.reach(wrong, {"ROWS": 7}, CPU) == [32]


def test_interrupted_tuning_keeps_what_is_done_and_resumes(
    cache: Path, monkeypatch: pytest.MonkeyPatch, stub_gpu: None
) -> None:
    second = replace(case_of(HEURISTIC), classes=2, run=interrupted)
    offer(monkeypatch, case_of(HEURISTIC, TUNED), second)
    said: list[str] = []
    assert tuner.tune(tuner.Request(), said.append) == 130
    assert "interrupted" in said[-1] and "--resume" in said[-1]
    assert ask() == TUNED
    assert os.listdir(cache) == ["cpu.json"]

    offer(monkeypatch, replace(case_of(HEURISTIC), run=interrupted), replace(second, run=RUN))
    assert tuner.tune(tuner.Request(resume=True), said.append) == 0
    assert "tuning 1 cases" in "\n".join(said)
    assert set(configurations.read_document(cache / "cpu.json", "cpu")["entries"]) == {
        ENTRY,
        named(2),
    }
    assert tuner.tune(tuner.Request(), said.append) == 130  # without --resume: all over again


def test_winners_that_were_not_checked_are_when_tuning_resumes(
    cache: Path, monkeypatch: pytest.MonkeyPatch, stub_gpu: None
) -> None:
    def sized(shape: configurations.Shape, layout: str, device: torch.device) -> Callable[[], Any]:
        return lambda: torch.full(shape, 1.0)

    offer(monkeypatch, replace(case_of(HEURISTIC), sized=sized))
    checked = tuner.reach
    monkeypatch.setattr(tuner, "reach", lambda *_: interrupted(CPU))
    assert tuner.tune(tuner.Request(), lambda line: None) == 130
    entries = configurations.read_document(cache / "cpu.json", "cpu")["entries"]
    assert entries[ENTRY]["checked"] == [32]
    monkeypatch.setattr(tuner, "reach", checked)
    assert tuner.tune(tuner.Request(resume=True), lambda line: None) == 0
    entries = configurations.read_document(cache / "cpu.json", "cpu")["entries"]
    assert entries[ENTRY]["checked"] == [1, 32, 256]


def test_a_tuned_file_tells_how_it_came_about(
    cache: Path, monkeypatch: pytest.MonkeyPatch, stub_gpu: None
) -> None:
    offer(monkeypatch, case_of(HEURISTIC, {"ROWS": 7}, TUNED, {**TUNED, "ROWS": 9}))
    assert tuner.tune(tuner.Request(), lambda line: None) == 0
    document = configurations.read_document(cache / "cpu.json", "cpu")
    assert document["schema"] == 2 and document["triton"] == triton.__version__
    assert document["date"].startswith("20")
    made = document["entries"][ENTRY]
    assert made["configuration"] == TUNED and made["ms"] == 8.0 and made["checked"] == [32]
    assert made["source"] == source_hash(SLICE) and made["slice"] == SLICE
    assert [timing["ms"] for timing in made["timings"]] == [8.0, 9.0, 16.0]
    assert "wrong" in made["dropped"][0]


def test_a_spent_budget_leaves_cases_out(
    cache: Path, monkeypatch: pytest.MonkeyPatch, stub_gpu: None
) -> None:
    offer(monkeypatch, case_of(HEURISTIC))
    said: list[str] = []
    assert tuner.tune(tuner.Request(budget=0.0), said.append) == 0
    assert "1 cases are left out" in "\n".join(said) and ask() == HEURISTIC


@pytest.mark.thorough
@pytest.mark.compile_only
def test_candidates_are_compiled_and_filtered_in_a_pool() -> None:
    """The process runs without the interpreter, as on a machine with a GPU."""
    script = (
        "from dataclasses import replace\n"
        "from triton.backends.compiler import GPUTarget\n"
        "from tritonloss._tools.launches import offline\n"
        "from tritonloss._tools.sieve import Sieve\n"
        "from tritonloss._tools.tuning_cases import tuning_cases\n"
        "if __name__ == '__main__':\n"
        "    target = GPUTarget('cuda', 90, 32)\n"
        "    with offline(target):\n"
        "        cases = tuning_cases('ssim_backward')\n"
        "    case = next(c for c in cases if c.window == 11)\n"
        "    wide = case.candidates.index({**case.candidates[0], 'COLUMNS': 4})\n"
        "    case = replace(case, candidates=case.candidates[: wide + 1])\n"
        "    sieve = Sieve([case], target, 227 * 1024, workers=2)\n"
        "    faults = sieve.faults(case)\n"
        "    sieve.close()\n"
        "    assert faults[0] is None and len(faults) == len(case.candidates)\n"
        "    assert 'spills' in faults[wide], faults\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    path = Path(tempfile.mkdtemp()) / "sift.py"
    path.write_text(script)
    subprocess.run([sys.executable, path], cwd=ROOT, env=environment, check=True)


@pytest.mark.thorough
@pytest.mark.compile_only
def test_the_tuner_compiles_nothing_in_its_own_process(tmp_path: Path) -> None:
    """It compiles neither kernels nor the C launchers of Triton 3.6; the driver is a stand-in."""
    script = tmp_path / "tune.py"
    script.write_text(
        "import sys\n"
        "from dataclasses import replace\n"
        "if __name__ == '__main__':\n"
        "    from perf.measuring import stand_in\n"
        "    stand_in.install()\n"
        "    stand_in.adopt()\n"
        "    import torch\n"
        "    from triton.backends.compiler import GPUTarget\n"
        "    from triton.backends.nvidia.compiler import CUDABackend\n"
        "    from triton.runtime import build\n"
        "    from tritonloss._tools import tuner\n"
        "    from tritonloss._tools.timing import Timed\n"
        "    compiled = []\n"
        "    def counting(original):\n"
        "        return lambda *a, **k: (compiled.append(original), original(*a, **k))[1]\n"
        "    CUDABackend.make_cubin = counting(CUDABackend.make_cubin)\n"
        "    build._build = counting(build._build)\n"
        "    torch.zeros(1).data_ptr()\n"
        "    driver = tuner.triton.runtime.driver.active.utils\n"  # its own C code, once
        "    compiled.clear()\n"
        "    (case,) = tuner.tuning_cases('focal_backward', None, True)\n"
        "    case = replace(case, candidates=case.candidates[:2])\n"
        "    tuner.tuning_cases = lambda *_: [case]\n"
        "    tuner._gpu = lambda: torch.device('cpu')\n"
        "    tuner.disagreement = lambda result, expected: None\n"  # nothing is computed
        "    tuner._median_ms = lambda launch: Timed(1.0, 'no time')\n"
        "    tuner._sieve = lambda cases, device: tuner.Sieve(\n"
        "        cases, GPUTarget('cuda', 90, 32), 227 * 1024, workers=2)\n"
        "    assert tuner.tune(tuner.Request(), print) == 0\n"
        "    print('compiled', len(compiled))\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {
        "PYTHONPATH": str(ROOT),
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
        "TRITONLOSS_CACHE_DIR": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, script], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert "compiled 0\n" in done.stdout, done.stdout + done.stderr[-3000:]
    (entry,) = configurations.read_document(tmp_path / "cpu.json", "cpu")["entries"].values()
    assert len(entry["checked"]) > 1  # the winner was launched at other sizes, too
    assert list((tmp_path / "cache").rglob("*.cubin"))


def test_tuner_names_a_place_it_cannot_write(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (cache / "file").write_text("")
    monkeypatch.setenv("TRITONLOSS_CACHE_DIR", str(cache / "file" / "below"))
    monkeypatch.setattr(tuner, "_gpu", lambda: CPU)
    offer(monkeypatch)
    assert __main__.main(["tune"]) == 1
    assert "TRITONLOSS_CACHE_DIR" in capsys.readouterr().out


def test_tuner_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tuner, "_gpu", lambda: None)
    assert __main__.main(["tune"]) == 1
    assert "tune needs a GPU" in capsys.readouterr().out


def test_tuner_refuses_an_unknown_operator(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tuner, "_gpu", lambda: CPU)
    assert __main__.main(["tune", "--op", "nonsense"]) == 1
    assert "gaussian_statistics_forward" in capsys.readouterr().out

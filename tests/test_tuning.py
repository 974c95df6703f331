"""Launch configurations: looked up without error at every launch, and measured by the tuner."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tritonloss
from tritonloss import __main__, _doctor, _tune, _tuning

CPU = torch.device("cpu")
HEURISTIC: _tuning.Configuration = {"LANES": 32, "ROWS": 16, "num_warps": 4}
TUNED: _tuning.Configuration = {"LANES": 64, "ROWS": 8, "num_warps": 2}
ENTRY = _tuning.key("some_forward", 19, 3, torch.float32, "contiguous")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory, and a process that has read no tuned file."""
    monkeypatch.setenv("TRITONLOSS_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITONLOSS_TUNING", raising=False)
    monkeypatch.setattr(_tuning, "_tables", {})
    monkeypatch.setattr(_tuning, "_resolved", {})
    return tmp_path


def ask(classes: int = 19, window: int = 3, operator: str = "some_forward") -> Any:
    return _tuning.launch_configuration(
        operator,
        device=CPU,
        dtype=torch.float32,
        classes=classes,
        window=window,
        layout="contiguous",
        heuristic=dict(HEURISTIC),
    )


def write(path: Path, **changes: Any) -> None:
    document = {
        "schema": _tuning.SCHEMA,
        "gpu": "cpu",
        "triton": "3.6.0",
        "tritonloss": tritonloss.__version__,
        "date": "2026-01-01T00:00:00Z",
        "entries": {ENTRY: {"configuration": TUNED, "ms": 0.1}},
    }
    path.write_text(json.dumps({**document, **changes}))


def test_order_of_precedence(
    cache: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = tmp_path_factory.mktemp("shipped")
    monkeypatch.setattr(_tuning, "SHIPPED_DIRECTORY", shipped)
    assert ask() == HEURISTIC

    shipped_only = {**TUNED, "ROWS": 2}
    entries = {
        _tuning.key("some_forward", 19, window, torch.float32, "contiguous"): {
            "configuration": shipped_only
        }
        for window in (3, 5)
    }
    write(shipped / "cpu.json", entries=entries)
    write(cache / "cpu.json")
    _tuning.forget()
    assert ask() == TUNED  # the user's file before the shipped one
    assert ask(classes=32) == TUNED  # the same bucket
    assert ask(window=5) == shipped_only
    assert ask(classes=33) == HEURISTIC
    assert ask(operator="another_forward") == HEURISTIC
    with _tuning.forced("some_forward", {"ROWS": 4}):
        assert ask() == {**HEURISTIC, "ROWS": 4}
    assert ask() == TUNED

    monkeypatch.setenv("TRITONLOSS_TUNING", "off")
    assert ask() == HEURISTIC


def test_an_answer_may_be_changed_by_its_caller(cache: Path) -> None:
    write(cache / "cpu.json")
    ask().clear()
    assert ask() == TUNED


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: path.write_text('{"schema": 1, "entr'), "cannot be read"),
        (lambda path: path.write_bytes(b"\xff\xfe\x00"), "cannot be read"),
        (lambda path: path.mkdir(), "cannot be read"),
        (lambda path: path.write_text("[]"), "not a tuned file"),
        (lambda path: write(path, entries=[]), "not a tuned file"),
        (lambda path: write(path, schema=0), "schema is 0, not 1"),
        (lambda path: write(path, gpu="NVIDIA_H100"), "tuned on 'NVIDIA_H100', not on 'cpu'"),
        (lambda path: write(path, tritonloss="0.0.1"), "tuned with tritonloss '0.0.1'"),
        (lambda path: write(path, entries={ENTRY: None}), "no valid configuration"),
        (
            lambda path: write(path, entries={ENTRY: {"configuration": {**TUNED, "ROWS": 0}}}),
            "no valid configuration",
        ),
        (
            lambda path: write(path, entries={ENTRY: {"configuration": {**TUNED, "num_warps": 3}}}),
            "no valid configuration",
        ),
        (
            lambda path: write(path, entries={ENTRY: {"configuration": {"num_warps": 2}}}),
            r"sets \['num_warps'\]",
        ),
    ],
)
def test_an_unusable_file_is_ignored_with_one_warning(
    cache: Path, spoil: Callable[[Path], Any], reason: str
) -> None:
    spoil(cache / "cpu.json")
    with pytest.warns(UserWarning, match=reason) as warned:
        assert ask() == HEURISTIC
        assert ask() == HEURISTIC
        assert ask(classes=1) == HEURISTIC
    assert len(warned) == 1


def test_look_up_is_quick(cache: Path) -> None:
    write(cache / "cpu.json")
    ask()
    started = time.perf_counter()
    for _ in range(2000):
        ask()
    assert (
        time.perf_counter() - started
    ) / 2000 < 50e-6  # about 1 µs; the slack is for busy machines


def test_device_names_are_file_names() -> None:
    assert _tuning.sanitised("NVIDIA H200") == "NVIDIA_H200"
    assert _tuning.sanitised("../../etc/x") == "etc_x"
    assert _tuning.sanitised("Œ™/\\:*") == "unnamed"
    assert len(_tuning.sanitised("x" * 500)) == 100


def test_shipped_files_are_usable() -> None:
    for path in _tuning.SHIPPED_DIRECTORY.glob("*.json"):
        _tuning.read_document(path, path.stem)


def test_doctor_names_an_unusable_file(cache: Path) -> None:
    assert _doctor._configurations_in_use("cpu") == "heuristic, no tuned file"
    write(cache / "cpu.json", schema=0)
    assert "is ignored: its schema is 0" in _doctor._configurations_in_use("cpu")
    write(cache / "cpu.json")
    assert "cpu.json (1 entries, triton 3.6.0" in _doctor._configurations_in_use("cpu")


def case_of(*candidates: _tuning.Configuration) -> _tuning.TuningCase:
    """A case whose launch takes ROWS milliseconds; 13 does not compile and 7 is wrong."""

    def run(device: torch.device) -> Callable[[], Any]:
        def launch() -> tuple[torch.Tensor, None]:
            rows = int(ask()["ROWS"])
            if rows == 13:
                raise RuntimeError("out of resources\nand a long story")
            return torch.full((2,), float("nan") if rows == 7 else 1.0), None

        return launch

    return _tuning.TuningCase(
        "some_forward", 19, 3, torch.float32, "contiguous", run, list(candidates)
    )


def rows_as_time(launch: Callable[[], Any]) -> float:
    launch()
    return float(ask()["ROWS"])


def test_tuner_keeps_the_fastest_that_is_right(cache: Path) -> None:
    case = case_of({"ROWS": 13}, {"ROWS": 16}, {"ROWS": 7}, {"ROWS": 8}, {"ROWS": 9})
    outcome = _tune.tune_case(case, CPU, float("inf"), rows_as_time)
    assert outcome.best == (8.0, {"ROWS": 8})
    assert [ms for ms, _ in outcome.measured] == [16.0, 8.0, 9.0]
    crashed, wrong = outcome.dropped
    assert "out of resources" in crashed and "long story" not in crashed
    assert "wrong: differs from the first candidate by nan" in wrong


def test_tuner_always_measures_one_candidate(cache: Path) -> None:
    outcome = _tune.tune_case(
        case_of({"ROWS": 13}, {"ROWS": 8}, {"ROWS": 4}), CPU, -1, rows_as_time
    )
    assert outcome.measured == [(8.0, {"ROWS": 8})]


def test_tuner_survives_inputs_that_do_not_fit(cache: Path) -> None:
    def run(device: torch.device) -> Callable[[], Any]:
        raise torch.OutOfMemoryError("too large")

    case = _tuning.TuningCase("some_forward", 19, 3, torch.float32, "contiguous", run, [TUNED])
    outcome = _tune.tune_case(case, CPU, 1, rows_as_time)
    assert outcome.measured == [] and "too large" in outcome.dropped[0]


def test_interrupted_tuning_keeps_what_is_done(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(device: torch.device) -> Callable[[], Any]:
        raise KeyboardInterrupt

    second = _tuning.TuningCase(
        "some_forward", 2, 3, torch.float32, "contiguous", interrupted, [TUNED]
    )
    monkeypatch.setattr(_tune, "_gpu", lambda: CPU)
    monkeypatch.setattr(_tune, "_median_ms", rows_as_time)
    monkeypatch.setattr(_tune, "tuning_cases", lambda operator: [case_of(HEURISTIC, TUNED), second])
    said: list[str] = []
    assert _tune.tune(None, None, None, said.append) == 130
    assert "interrupted" in said[-1]
    assert ask() == TUNED
    assert os.listdir(cache) == ["cpu.json"]


def test_tuning_adds_to_the_file(cache: Path) -> None:
    write(cache / "cpu.json")
    other = _tuning.key("other", 2, 3, torch.float32, "contiguous")
    _tune.write_entries(cache / "cpu.json", "cpu", {other: {"configuration": HEURISTIC, "ms": 1.0}})
    assert set(_tuning.read_document(cache / "cpu.json", "cpu")["entries"]) == {ENTRY, other}


def test_a_failed_write_leaves_the_old_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(cache / "cpu.json")
    before = (cache / "cpu.json").read_text()
    with pytest.raises(TypeError):
        _tune.write_entries(cache / "cpu.json", "cpu", {"some": object()})
    assert (cache / "cpu.json").read_text() == before
    assert os.listdir(cache) == ["cpu.json"]


def test_tuner_names_a_place_it_cannot_write(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (cache / "file").write_text("")
    monkeypatch.setenv("TRITONLOSS_CACHE_DIR", str(cache / "file" / "below"))
    monkeypatch.setattr(_tune, "_gpu", lambda: CPU)
    monkeypatch.setattr(_tune, "tuning_cases", lambda operator: [])
    assert __main__.main(["tune"]) == 1
    assert "TRITONLOSS_CACHE_DIR" in capsys.readouterr().out


def test_tuner_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_tune, "_gpu", lambda: None)
    assert __main__.main(["tune"]) == 1
    assert "tune needs a GPU" in capsys.readouterr().out


def test_tuner_refuses_an_unknown_operator(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_tune, "_gpu", lambda: CPU)
    assert __main__.main(["tune", "--op", "nonsense"]) == 1
    assert "gaussian_statistics_forward" in capsys.readouterr().out


def test_every_tuning_case_has_distinct_candidates() -> None:
    cases = _tune.tuning_cases()
    assert cases
    for case in cases:
        assert case.candidates
        for candidate in case.candidates:
            assert _tuning._is_configuration(candidate), (case.key, candidate)
            assert case.candidates.count(candidate) == 1, (case.key, candidate)

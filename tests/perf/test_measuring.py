"""Times, memory and rows: no time without parity, and rows that stay comparable."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from perf.measuring import interpreted, rows
from perf.measuring.measure import PARITY_FAILED, Bench
from perf.measuring.memory import counted_peak
from perf.operations.contract import (
    operations,
)
from perf.report import compare, record
from tests.perf.made import machine, row, small


def test_no_time_without_parity() -> None:
    operation = operations(["gaussian_statistics"])[0]
    providers: dict[str, Callable[..., Any]] = {
        "eager": operation.reference,
        "wrong": lambda x, **_: (x, x * x),
        "broken": lambda x, **_: 1 / 0,
    }
    found = list(Bench(machine(), 10.0).rows(operation, small(operation), providers))
    by_provider = {r["provider"]: r for r in rows.with_comparisons(found) if r["pass"] == "full"}
    eager, wrong, broken = (by_provider[name] for name in providers)
    assert len(found) == 9
    assert eager["ms_p20"] <= eager["ms_p50"] <= eager["ms_p80"]
    assert eager["share_of_copy"] == pytest.approx(eager["GBps"] / 10)
    assert eager["speedup_vs_eager"] == 1 and eager["peak_delta_MiB"] > 0
    assert wrong["ms_p50"] is None and wrong["timer"] == PARITY_FAILED and wrong["max_error"] > 0.1
    assert broken["ms_p50"] is None and "ZeroDivisionError" in broken["timer"]


def test_counted_peak_sees_what_lives_at_the_same_time() -> None:
    x = torch.zeros(1000)

    def three_at_once() -> Tensor:
        y = x + 1
        z = y.view(10, 100) + 1  # a view takes nothing
        del y
        for _ in range(5):
            z = z + 1  # the old one is freed after the new one is there
        return z.add_(x.view(10, 100))

    assert counted_peak(three_at_once) == 2 * 4000
    assert counted_peak(lambda: x.mul_(1)) == 0
    on_meta = torch.empty(1 << 40, device="meta")
    assert counted_peak(lambda: on_meta + 1) == 4 << 40


def test_counted_peak_follows_autograd() -> None:
    x = torch.zeros(1000, requires_grad=True)
    # exp keeps its result for the gradient; the gradient comes beside it.
    assert counted_peak(lambda: torch.autograd.grad(x.exp().sum(), x)) >= 2 * 4000


def test_rows_survive_a_file(tmp_path: Path) -> None:
    written = [row(), row(provider="eager", ms_p50=10.0, peak_delta_MiB=None)]
    rows.write(tmp_path / "rows.csv", written[:1])
    rows.append(tmp_path / "rows.csv", written[1:])
    assert rows.read(tmp_path) == written
    (tmp_path / "rows.csv").write_text("op,ms\na,1\n")
    with pytest.raises(ValueError, match="must have the columns"):
        rows.read(tmp_path)


def test_comparisons_are_within_one_case() -> None:
    ours, eager, compiled, other = rows.with_comparisons(
        [
            row(),
            row(provider="eager", ms_p50=12.0, peak_delta_MiB=1700.0),
            row(provider="compile", ms_p50=0.5),
            row(parameters="window_size=5"),
        ]
    )
    assert ours["speedup_vs_eager"] == 12 and ours["speedup_vs_compile"] == 0.5
    assert ours["memory_vs_eager"] == pytest.approx(1 / 17)
    assert eager["speedup_vs_eager"] == 1
    assert other["speedup_vs_eager"] is None


def test_compare_prints_only_what_moved() -> None:
    before = [row(), row(**{"pass": "forward"}), row(provider="eager")]
    after = [
        row(ms_p50=2.0, ms_p20=1.9, ms_p80=2.1, torch="9"),
        row(**{"pass": "forward"}, ms_p50=1.05, ms_p20=1.0, ms_p80=1.2, torch="9"),
        row(provider="library"),
    ]
    text = compare.compare(before, after)
    assert "1 of 2 rows moved" in text and "1 only before, 1 only after" in text
    assert "+100.0%" in text and "torch: None -> 9" in text
    assert len(re.findall("window_size=3", text)) == 1
    newer = row(ms_p50=5.0, ms_p20=5.0, ms_p80=5.0, utc="2026-02-01T00:00:00Z")
    assert compare.newest([newer, row()])[rows.identity(row())]["ms_p50"] == 5.0


def test_record_appends_gpu_rows_once(tmp_path: Path) -> None:
    measured = [row(gpu="NVIDIA H200"), row(gpu="no GPU (a processor)", capability=None)]
    path = tmp_path / "NVIDIA_H200.csv"
    assert record.record(measured, tmp_path) == {path: 1}
    assert record.record(measured, tmp_path) == {path: 0}
    later = [row(gpu="NVIDIA H200", utc="2026-02-01T00:00:00Z")]
    assert record.record(later, tmp_path) == {path: 1}
    assert len(rows.read(path)) == 2 and not (tmp_path / "no_GPU_a_processor.csv").exists()


def test_interpreted_cases_are_kinds_of_questions() -> None:
    for operation in operations():
        chosen = [operation.cases[index] for index in interpreted.cases(operation)]
        assert 2 <= len(chosen) <= len(operation.cases)
        assert len(interpreted.cases(operation, quick=True)) == 1

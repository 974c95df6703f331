"""The pages of a report: what they claim, and what they must not."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from perf.measuring import rows
from perf.measuring.measure import PARITY_FAILED
from perf.operations.contract import (
    Goal,
    operations,
)
from perf.report import content, goals, html, markdown, plots, summary
from perf.report.page import Bars, Lines, number
from perf.report.report import Report
from tests.perf.made import fact, gpu_report, offline_report, row


def test_goals_are_met_missed_or_not_measured() -> None:
    operation = operations(["structural_similarity_loss"])[0]
    share = next(g for g in operation.goals if isinstance(g, Goal) and g.column == "share_of_copy")

    def verdict(found: list[rows.Row]) -> str:
        only = replace(operation, goals=(share,))
        return goals.findings([only], found, [])[0].verdict

    asked = row(op=operation.name, **share.case.columns())
    assert verdict([]) == "not measured"
    assert verdict([asked]) == "met"
    assert verdict([{**asked, "share_of_copy": 0.1}]) == "missed"
    assert verdict([{**asked, "provider": "eager"}]) == "not measured"
    gaussian = operations(["gaussian_statistics"])[0]
    counted = goals.findings([gaussian], [], [fact(), fact(target="sm_80"), fact(case="other")])
    assert [goal.verdict for goal in counted if goal.value == 25.0] == ["met"]


def test_without_a_gpu_the_page_says_so_and_claims_no_speed() -> None:
    for page in (html.page(offline_report()), markdown.page(offline_report())):
        assert "Not measured on a GPU yet" in page and "No GPU was at hand" in page
        assert "as fast as" not in page
        assert "17.0x less" in page and "1 of 1" in page


def test_with_a_gpu_losing_and_failed_rows_stay_in() -> None:
    for page in (html.page(gpu_report()), markdown.page(gpu_report())):
        assert "as fast as eager PyTorch" in page and "Not measured" not in page
        assert "window_size=9" in page and PARITY_FAILED in page
        assert "slower than eager in 1" in page and "2 of 3" in page
    assert content.page(gpu_report()).headline == "6.3x as fast as eager PyTorch"
    alone = replace(gpu_report(), rows=rows.with_comparisons([row()]))
    assert content.page(alone).headline == "1 cases timed, and compared with nothing yet"


@pytest.mark.parametrize("make", [offline_report, gpu_report])
def test_the_first_screen_answers_in_four_figures_and_two_plots(
    make: Callable[[], Report],
) -> None:
    report = make()
    made = content.page(report)
    assert len(made.cards) == 4 and len(made.plots) == 2
    assert all(isinstance(plot, Bars) and plot.groups for plot in made.plots)
    titles = [section.title for section in made.sections]
    assert titles == ["loss", "gaussian statistics", "Compiled, not run", "Environment"]
    page = html.page(report)
    places = [page.index(f"<h2>{title}</h2>") for title in titles]
    assert places == sorted(places) and page.index('class="plots"') < places[0]
    assert ("Extra memory against classes" in page) and ("<th>error</th>" in page)


def test_offline_sections_name_what_was_not_measured() -> None:
    made = content.page(offline_report(absent=["kornia", "MONAI"]))
    text = html.page(offline_report(absent=["kornia", "MONAI"]))
    assert made.cards[0].value == "not measured" and made.cards[2].value == "no GPU"
    assert "counted" in made.cards[1].label and "Counted at full size" in made.cards[1].detail
    assert "kornia, MONAI" in text
    for plot in made.plots:
        assert isinstance(plot, Bars)
        assert "counted" in plot.title or "not run" in plot.unit
    assert "of the reference on this CPU" in text


def test_rows_that_cannot_be_trusted_colour_the_figure() -> None:
    assert content.page(gpu_report()).cards[3].good is False  # one case failed its parity
    spilled = offline_report(facts=[fact(spill_bytes=4)])
    assert content.page(spilled).cards[3].good is False
    assert content.page(offline_report()).cards[3].good is True
    assert content.page(offline_report(parity=[])).cards[3].good is False


def test_spills_in_float64_are_listed_and_no_fault() -> None:
    spilling = fact(spill_bytes=88, double=True, case="ade20k float64 contiguous")
    made = content.page(offline_report(facts=[fact(), spilling]))
    page = html.page(offline_report(facts=[fact(), spilling]))
    assert made.cards[3].good is True and "0 of 2 compiled kernels spill or fail" in page
    assert "ade20k float64 contiguous) 88 B on sm_90" in page and "nothing spills" not in page
    assert "nothing spills registers" in html.page(offline_report())


def test_a_page_is_readable_on_paper_and_in_the_dark() -> None:
    page = html.page(offline_report())
    assert "@media screen and (prefers-color-scheme: dark)" in page and "@media print" in page
    assert "beforeprint" in page  # folded tables open


def test_summary_is_a_line_per_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows.write(tmp_path / "rows.csv", gpu_report().rows)
    assert summary.main([str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "2 of 3 cases right, then timed, on GPU" in text and PARITY_FAILED in text
    assert "6.3x eager PyTorch's speed, median of 2 cases" in text
    with rows.Appender(tmp_path / "stopped.csv") as file:  # before any rows were compared
        file.add(row())
        file.add(row(provider="eager", ms_p50=12.0))
    assert summary.main([str(tmp_path / "stopped.csv")]) == 0
    assert "12x eager PyTorch's speed" in capsys.readouterr().out
    assert "no kernel was measured" in summary.summary(offline_report().rows)
    assert summary.main([str(tmp_path / "none")]) == 1


def test_html_is_self_contained_and_well_formed(tmp_path: Path) -> None:
    (tmp_path / "train.md").write_text("| loss | mIoU |\n|---|---|\n| SSL | 1 ± 2 |\n\nSeeds.\n")
    (tmp_path / "train.png").write_bytes(b"\x89PNG")
    page = html.page(offline_report(training=tmp_path))
    assert "1 ± 2" in page and "data:image/png;base64" in page
    assert "&lt;odd&gt;" in page and "<odd>" not in page
    assert not re.search(r'(src|href)="(?!#|data:)', page) and "@import" not in page
    for tag in ("table", "figure", "section", "details", "svg", "div"):
        assert page.count(f"<{tag}") == page.count(f"</{tag}>"), tag


def test_plots_take_anything() -> None:
    assert plots.lines(Lines("t", "x", "y", {})) == plots.bars(Bars("t", "ms", {})) == ""
    one = plots.lines(Lines("t", "x", "y", {"a": [(3.0, 5.0)]}))
    assert "<circle" in one and "nan" not in one
    log = plots.lines(Lines("t", "x", "y", {"a": [(1.0, 0.01), (1e3, 50.0)], "b": []}, log=True))
    assert log.count("<circle") == 2 and ">10</text>" in log
    drawn = plots.bars(Bars("t", "ms", {"case": {"triton": 1.0, "eager": 100.0}}))
    assert drawn.count('class="bar"') == 2 and "width:78.0%" in drawn


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (0.0, "0.00"), (0.01234, "0.0123"), (17.01, "17.0"), (1e-6, "1.0e-06")],
)
def test_numbers(value: float | None, text: str) -> None:
    assert number(value) == text

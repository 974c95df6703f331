"""The benchmarks themselves: a report that cannot be wrong unnoticed."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from perf import __main__
from perf.compiling import check, predict
from perf.compiling.compile_only import KernelFacts, LoopFacts, pivoted
from perf.compiling.control_flow import Instruction, Loop, loops
from perf.compiling.machine_code import MachineCode, parse_amdgcn, parse_sass
from perf.compiling.targets import TARGETS
from perf.measuring import interpreted, rows
from perf.measuring.counted import CountedMemory
from perf.measuring.interpreted import Parity
from perf.measuring.machine import Machine
from perf.measuring.measure import PARITY_FAILED, Bench
from perf.measuring.memory import counted_peak
from perf.measuring.parity import Gate
from perf.measuring.trial import Trial
from perf.operations import contract, peers
from perf.operations.contract import (
    SHAPES,
    Case,
    Goal,
    Operation,
    Shape,
    UnknownCaseError,
    operations,
)
from perf.report import compare, content, goals, html, markdown, plots, record, summary
from perf.report.goals import Finding
from perf.report.make import Choice, _count_memory, _measure, _plan
from perf.report.page import Bars, Lines, number
from perf.report.report import Report
from tritonloss import functional
from tritonloss._core.configurations import TuningCase
from tritonloss._core.progress import Progress

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
NAMES = [operation.name for operation in operations()]


def small(operation: Operation) -> Case:
    case = operation.cases[0]
    if type(case.shape) is not Shape:
        return case.tiny()
    return replace(case, shape=replace(case.shape, batch=1, classes=3, height=9, width=13))


def row(**values: Any) -> rows.Row:
    measured = {
        "op": "loss", "provider": "triton", "pass": "full", "dtype": "float32",
        "layout": "contiguous", "batch": 4, "classes": 19, "height": 1024, "width": 2048,
        "parameters": "window_size=3", "ms_p50": 1.0, "ms_p20": 0.9, "ms_p80": 1.1,
        "timer": "do_bench", "peak_delta_MiB": 100.0, "bytes_floor": 10, "GBps": 2000.0,
        "share_of_copy": 0.5, "max_error": 1e-7, "gpu": "GPU", "capability": "9.0",
        "utc": "2026-01-01T00:00:00Z",
    }  # fmt: skip
    return {**dict.fromkeys(rows.FIELDS), **measured, **values}


# --- contract -------------------------------------------------------------------------------------


def test_every_command_has_a_module_with_a_main() -> None:
    for command in __main__.COMMANDS:
        assert callable(__main__.module_of(command).main), command


def test_every_module_with_operations_is_a_slice() -> None:
    stating = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "perf").rglob("*.py")
        if re.search(r"^OPERATIONS\b", path.read_text(), re.MULTILINE)
    }
    assert stating == set(contract.slices())


def test_every_public_function_has_an_operation() -> None:
    assert set(NAMES) >= set(functional.__all__) | {"gaussian_statistics"}


@pytest.mark.parametrize("name", NAMES)
def test_cases_are_told_apart_by_their_rows(name: str) -> None:
    operation = operations([name])[0]
    for group in (operation.cases, operation.shipped):
        assert len({case.text for case in group}) == len(group)
    columns = [tuple(case.columns().values()) for case in operation.cases]
    assert len(set(columns)) == len(columns)
    for goal in operation.goals:
        assert goal.case in (operation.cases if isinstance(goal, Goal) else operation.shipped)


@pytest.mark.parametrize("name", NAMES)
def test_floor_is_no_more_than_what_the_tensors_take(name: str) -> None:
    """A floor above what inputs, outputs and gradients hold would flatter a slow kernel."""
    operation = operations([name])[0]
    case = small(operation)
    inputs = operation.inputs(case, CPU)
    results = Trial(operation.reference, case, inputs).results()
    held = sum(x.numel() * x.element_size() for x in (*inputs, *results))
    upstream = sum(x.numel() * x.element_size() for x in results[: -len(inputs)] or results[:1])
    floor = operation.floor(case)
    assert 0 < floor.forward < floor.forward + floor.backward == floor.of("full")
    assert floor.of("full") <= 2 * held + upstream


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_inputs_are_repeatable_and_have_the_layout(layout: str) -> None:
    operation = operations(["structural_similarity_loss"])[0]
    case = replace(small(operation), layout=layout)
    (logits, target), (again, _) = operation.inputs(case, CPU), operation.inputs(case, CPU)
    assert torch.equal(logits, again) and logits.std() > 1
    assert logits.is_contiguous() == (layout == "contiguous")
    assert logits.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")
    assert target.dtype == torch.uint8 and target.shape == (1, 9, 13)


def test_unknown_operation_is_named() -> None:
    with pytest.raises(ValueError, match="'no_such_loss'"):
        operations(["no_such_loss"])


def test_most_telling_cases_come_first_across_operations() -> None:
    chosen = operations()
    plan = _plan(chosen, Choice(), on_gpu=True)
    assert [operation.name for operation, _ in plan[: len(chosen)]] == NAMES
    assert len(plan) == sum(len(operation.cases) for operation in chosen)
    assert len(_plan(chosen, Choice(quick=True), on_gpu=False)) == len(chosen)
    only = _plan(chosen, Choice(shapes=["voc"], dtypes=["float32"]), on_gpu=False)
    assert {case.shape.name for _, case in only} == {"voc"}


# --- parity gate ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_gate_passes_the_reference_and_stops_a_wrong_border(name: str) -> None:
    operation = operations([name])[0]
    gate = Gate(operation, small(operation), CPU)

    def wrong_in_one_place(*inputs: Tensor, **options: Any) -> Any:
        first, *others = inputs
        corner = torch.zeros_like(first)
        corner[0, :, 0, 0] = 1e-2
        corner[0, 1::2, 0, 0] *= -1  # a softmax does not see a shift of all classes
        return operation.reference(first + corner, *others, **options)

    assert gate.judge(operation.reference).passed
    assert not gate.judge(wrong_in_one_place).passed


def test_gate_stops_nan() -> None:
    operation = operations(["gaussian_statistics"])[0]
    gate = Gate(operation, small(operation), CPU)
    verdict = gate.judge(lambda x, **_: (x * float("nan"), x))
    assert not verdict.passed


def test_excused_pixels_are_few_and_lie_at_the_threshold() -> None:
    operation = operations(["structural_similarity_loss"])[0]
    assert operation.excused is not None
    case = replace(operation.cases[0], shape=SHAPES["cityscapes"].reduced(), dtype="float64")
    for padding in ("zeros", "valid"):
        asked = replace(case, options={**case.options, "padding": padding})
        excused = operation.excused(asked, operation.inputs(asked, CPU))
        assert excused.shape == case.shape.size
        assert 0 < excused.float().mean() < 1e-3


# --- measuring ------------------------------------------------------------------------------------


def machine(device: torch.device = CPU) -> Machine:
    gpu = device.type != "cpu"
    return Machine(
        device=device, gpu="Some GPU" if gpu else "no GPU (a processor)",
        capability="9.0" if gpu else None, driver="1" if gpu else None,
        cuda="13" if gpu else None, torch="2", triton="3", tritonloss="0.1", commit=None,
        utc="2026-01-01T00:00:00Z",
    )  # fmt: skip


def test_no_time_without_parity() -> None:
    operation = operations(["gaussian_statistics"])[0]
    providers: dict[str, Callable[..., Any]] = {
        "eager": operation.reference,
        "wrong": lambda x, **_: (x, x * x),
        "broken": lambda x, **_: 1 / 0,
    }
    found = Bench(machine(), copy_GBps=10.0).rows(operation, small(operation), providers)
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


# --- rows -----------------------------------------------------------------------------------------


def test_rows_survive_a_file(tmp_path: Path) -> None:
    written = [row(), row(provider="eager", ms_p50=10.0, peak_delta_MiB=None)]
    rows.write(tmp_path / "rows.csv", written[:1])
    rows.write(tmp_path / "rows.csv", written[1:], append=True)
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


# --- machine code ---------------------------------------------------------------------------------


def test_loops_are_found_by_dominance() -> None:
    step = Instruction("FADD")
    program = [
        step,
        step,  # outer loop
        Instruction("BRA", jump=6),
        step,  # inner loop
        Instruction("BRA", jump=3),
        Instruction("BRA", jump=1),
        Instruction("EXIT", falls_through=False),
        step,  # rare code behind the end, reached by nobody, jumping back into the middle
        Instruction("BRA", jump=3, falls_through=False),
    ]
    assert loops(program) == (Loop(1, 5, nests=True),)
    assert loops([]) == () and loops([step]) == ()


def test_rare_code_behind_the_end_is_no_loop() -> None:
    step = Instruction("FADD")
    program = [
        Instruction("BRA", jump=4),
        step,
        step,
        Instruction("EXIT", falls_through=False),
        step,  # rare
        Instruction("BRA", jump=1, falls_through=False),
    ]
    assert loops(program) == ()


SASS = """
        code for sm_90
        /*0000*/                   LDC R1, c[0x0][0x28] ;      /* 0x00000a00ff017b82 */
                                                               /* 0x000fe20000000800 */
        /*0010*/                   FADD R0, R1, R2 ;           /* 0x000fe20000000800 */
        /*0020*/                   BRA.U UP0, 0x50 ;           /* 0x000fe20000000800 */
        /*0030*/                   FMUL R0, R1, R2 ;           /* 0x000fe20000000800 */
        /*0040*/              @!P0 BRA 0x10 ;                  /* 0x000fe20000000800 */
        /*0050*/                   EXIT ;                      /* 0x000fe20000000800 */
        /*0060*/                   BRA 0x60;                   /* 0x000fe20000000800 */
        /*0070*/                   NOP;                        /* 0x000fe20000000800 */
"""


def test_sass() -> None:
    resources = "Function kernel:\n  REG:40 STACK:16 SHARED:0 LOCAL:0 CONSTANT[0]:584"
    code = parse_sass(SASS, resources)
    assert code == MachineCode(40, 16, instructions=7, loops=(Loop(1, 4),))
    with pytest.raises(ValueError, match="register"):
        parse_sass(SASS, "nothing")


def test_amdgcn() -> None:
    assembly = """
    .text
kernel:
\ts_branch .LBB0_0
.LBB0_0:
\tv_add_f32 v0, v1, v2
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
\tv_fma_f32 v0, v1, v2, v0
\ts_cbranch_scc1 .LBB0_1
\ts_endpgm
.Lfunc_end0:
\tv_not_code v0
    .private_segment_fixed_size: 0
    .sgpr_spill_count: 0
    .vgpr_count:     47
    .vgpr_spill_count: 3
"""
    assert parse_amdgcn(assembly) == MachineCode(47, 12, instructions=5, loops=(Loop(2, 2),))


def test_big_loops_leave_out_scans_and_remainders() -> None:
    counts = (7, 100, 130, 52, 66)
    code = MachineCode(1, 0, 400, tuple(Loop(10 * i, n) for i, n in enumerate(counts)))
    assert [loop.instructions for loop in code.big_loops(unroll=2)] == [100, 130]
    assert [loop.instructions for loop in code.big_loops(unroll=1)] == [52, 66, 100, 130]
    assert MachineCode(1, 0, 5, ()).big_loops() == ()


def test_occupancy() -> None:
    hopper, mi300 = TARGETS["sm_90"], TARGETS["gfx942"]
    assert hopper.occupancy(32, 0, num_warps=4) == 1
    assert hopper.occupancy(72, 0, num_warps=4) == 28 / 64
    assert hopper.occupancy(255, 0, num_warps=8) == 8 / 64
    assert hopper.occupancy(32, 100 * 1024, num_warps=4) == 8 / 64
    assert mi300.occupancy(128, 0, num_warps=4) == 16 / 32


def fact(**values: Any) -> KernelFacts:
    common: dict[str, Any] = {
        "op": "gaussian_statistics", "case": "cityscapes float32 contiguous window_size=3",
        "target": "sm_90", "kernel": "_gaussian_statistics_forward_kernel",
        "configuration": "COLUMNS=4", "constants": {"WINDOW.size": 3}, "registers": 40,
        "occupancy": 0.5, "instructions": 300, "loops": (LoopFacts("rows", 200, 25.0),),
    }  # fmt: skip
    return KernelFacts(**{**common, **values})


def test_faults() -> None:
    assert fact().fault is None
    assert fact(spill_bytes=8).fault == "spills 8 B"
    assert fact(shared_bytes=227 * 1024).fault is None
    assert "shared" in str(fact(shared_bytes=227 * 1024 + 1).fault)
    header, cells = pivoted([fact(), fact(target="gfx942", spill_bytes=4, compile_seconds=2.0)])
    assert header == ["operation", "kernel", "case", "sm_90", "gfx942", "compile s"]
    assert cells[0][3:] == ["40 r 50% 25.0", "FAULT: spills 4 B", "2.0"]


# --- report ---------------------------------------------------------------------------------------


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


def offline_report(**changes: Any) -> Report:
    made = Report(
        machine(), 10.0,
        parity=[Parity("loss", "float32 <odd>", 1e-7, 1e-5, True)],
        memory=[
            CountedMemory("loss", "cityscapes float32", 100, 1700, 100, 19, 10),
            CountedMemory("loss", "ade20k float32", 400, 6800, 400, 150, 5),
        ],
        facts=[fact(), fact(constants={"WINDOW.size": 5}, case="cityscapes float32 contiguous b")],
        goals=[Finding("a goal", "at least 1", None, None, "loss")],
        rows=rows.with_comparisons([row(provider="eager", gpu="no GPU", capability=None)]),
    )  # fmt: skip
    return replace(made, **changes)


def gpu_report() -> Report:
    eager = row(provider="eager", ms_p50=12.0, peak_delta_MiB=1700.0)
    losing = row(parameters="window_size=9", ms_p50=3.0, max_error=2e-7)
    fast = row(parameters="window_size=9", provider="eager", ms_p50=2.0)
    failed = row(parameters="window_size=7", ms_p50=None, timer=PARITY_FAILED, share_of_copy=None)
    measured = rows.with_comparisons([row(), eager, losing, fast, failed])
    return replace(offline_report(), machine=machine(torch.device("cuda")), rows=measured)


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
    assert "no kernel was measured" in summary.summary(offline_report().rows)
    assert summary.main([str(tmp_path / "none")]) == 1


def test_a_quick_report_begins_nothing_after_its_time() -> None:
    over = time.monotonic() - 1
    assert interpreted.check([("ssim", 0)], end=over) == ([], None)
    report = offline_report(rows=[])
    case = operations(["ssim"])[0].cases[0]
    bar = Progress(1, io.StringIO())
    choice = Choice(quick=True)
    _measure(report, [(operations(["ssim"])[0], case)], choice, bar, over)
    assert report.rows == [] and "1 cases were left out" in report.notes[0]


def test_memory_is_counted_for_every_number_of_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a quick report: without a computation the size of a map costs nothing."""

    def count(operation: Operation, case: Case) -> CountedMemory:
        return CountedMemory(operation.name, case.text, 1, 17, 1, case.shape.classes)

    monkeypatch.setattr("perf.report.make.count", count)
    report = offline_report(memory=[], notes=[])
    chosen = operations(["structural_similarity_loss"])
    _count_memory(report, chosen, Choice(quick=True))
    assert {entry.classes for entry in report.memory} == {1, 19, 21, 150, 171}
    few = len(report.memory)
    _count_memory(report, chosen, Choice())
    assert len(report.memory) > 2 * few and not report.notes


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


def test_interpreted_cases_are_kinds_of_questions() -> None:
    for operation in operations():
        chosen = [operation.cases[index] for index in interpreted.cases(operation)]
        assert 2 <= len(chosen) <= len(operation.cases)
        assert len(interpreted.cases(operation, quick=True)) == 1


def test_quick_report_end_to_end(tmp_path: Path) -> None:
    """The real command on this machine, without the interpreter that the tests run in."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [
        sys.executable, "-m", "perf", "report", "--quick",
        "--ops", "gaussian_statistics", "--out", str(tmp_path),
    ]  # fmt: skip
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


# --- baseline, predictions, other libraries -------------------------------------------------------


def test_check_names_what_is_worse(tmp_path: Path) -> None:
    before = check.measured([fact(), fact(target="sm_80"), fact(case="gone")])
    path = tmp_path / "baseline" / "triton-3.9.json"
    check.write(path, before)
    assert check.read(path) == before
    first = path.read_text()
    check.write(path, dict(reversed(before.items())))
    assert path.read_text() == first  # nothing depends on the order

    slower = fact(loops=(LoopFacts("rows", 220, 27.0),), registers=42)
    now = check.measured([slower, fact(target="sm_80", spill_bytes=8), fact(case="new")])
    found = check.compare(before, now)
    assert not found.passed and len(found.worse) == 2
    assert "instructions 25 -> 27 (+8%)" in found.worse[0] and "sm_90" in found.worse[0]
    assert "_gaussian_statistics_forward_kernel" in found.worse[0]
    assert "spill bytes 0 -> 8 (from nothing)" in found.worse[1] and "sm_80" in found.worse[1]
    assert found.new[0].endswith(": new)") and found.gone[0].endswith(": gone)")
    lines = check.report(found, len(now), path)
    assert "worse by more than 5%: 2" in lines and "check --update" in lines[-1]


def test_check_lets_small_changes_and_improvements_pass() -> None:
    before = check.measured([fact(registers=100)])
    assert check.compare(before, check.measured([fact(registers=105)])).passed
    assert not check.compare(before, check.measured([fact(registers=106)])).passed
    better = check.compare(before, check.measured([fact(registers=80)]))
    assert better.passed and "100 -> 80 (-20%)" in better.better[0]
    loops = (LoopFacts("a", 90, 10.0), LoopFacts("b", 90, 15.5))
    assert check.compare(before, check.measured([fact(registers=100, loops=loops)])).passed


def test_check_knows_kernels_whose_loops_do_not_tell_and_repeated_launches() -> None:
    nested = fact(loops=(LoopFacts("rows", 200, None),), instructions=321)
    numbers = check.measured([nested, fact(), fact(error="does not compile", case="x")])
    where = ("sm_90", "gaussian_statistics: cityscapes float32 contiguous window_size=3")
    assert numbers == {
        (*where, "_gaussian_statistics_forward_kernel"): (40, 0, 0, 321),
        (*where, "_gaussian_statistics_forward_kernel 2"): (40, 0, 0, 25.0),
    }


def test_check_of_a_part_leaves_the_rest_of_the_baseline_alone() -> None:
    case = operations(["gaussian_statistics"])[0].shipped[0].text
    mine = ("sm_90", f"gaussian_statistics: {case}", "kernel")
    renamed = ("sm_90", "gaussian_statistics: a case that is no more", "kernel")
    dropped = ("sm_90", "no_such_operation: case", "kernel")
    others = [("sm_80", *mine[1:]), ("sm_90", "ssim: case", "kernel")]
    baseline = dict.fromkeys([mine, renamed, dropped, *others], (1.0,))
    part = check.of_the_work(baseline, [("gaussian_statistics", 0, "sm_90")])
    assert set(part) == {mine, renamed, dropped}


def test_a_triton_without_a_baseline_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check.triton, "__version__", "9.1.2")
    assert check.main(["--ops", "ssim"]) == 1
    assert "no baseline for triton 9.1.2" in capsys.readouterr().out
    assert check.path_of("9.1.2").name == "triton-9.1.json"


@pytest.mark.parametrize("path", sorted(check.FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_committed_baselines_are_about_what_is_here(path: Path) -> None:
    """A case that was renamed or dropped leaves no entry behind, and nothing in them spills."""
    baseline = check.read(path)
    known = {f"{op.name}: {case.text}" for op in operations() for case in op.shipped}
    assert {case for _, case, _ in baseline} <= known
    assert {target for target, _, _ in baseline} == set(TARGETS)
    assert not [place for place, numbers in baseline.items() if numbers[1]]
    copy = path.with_name("copy.json")
    try:
        check.write(copy, baseline)
        assert copy.read_text() == path.read_text()
    finally:
        copy.unlink()


def modelled(**values: Any) -> predict.Kernel:
    common: dict[str, Any] = {
        "name": "kernel", "registers": 40, "fault": None, "occupancy": 0.5, "per_output": 100.0,
        "outputs": 10**8, "tensor_bytes": 8 * 10**8, "programs": 132 * 40, "num_warps": 4,
    }  # fmt: skip
    return predict.Kernel(**{**common, **values})


def test_the_model_takes_the_larger_of_issue_and_bytes() -> None:
    hopper = TARGETS["sm_90"]
    issue = 100 * 1e8 / (132 * 128 * 1.98e3)
    assert modelled().microseconds(hopper) == pytest.approx(issue)
    assert modelled(per_output=1.0).microseconds(hopper) == pytest.approx(8e8 / 4.8e6)
    # One warp per scheduler issues half the time; the last of 1.5 rounds is half idle.
    assert modelled(occupancy=1 / 16).microseconds(hopper) == pytest.approx(2 * issue)
    assert modelled(programs=198).microseconds(hopper) == pytest.approx(issue * 2 / 1.5)
    assert modelled(programs=100).microseconds(hopper) == pytest.approx(2 * issue * 1.32)
    assert modelled(per_output=None).microseconds(hopper) is None


def test_predictions_say_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    hopper = TARGETS["sm_90"]
    case = TuningCase(
        "some_forward", 19, 3, torch.float32, "contiguous", lambda device: lambda: None,
        [{"ROWS": 64, "num_warps": 4}, {"ROWS": 32, "num_warps": 4}, {"ROWS": 16, "num_warps": 4}],
    )  # fmt: skip
    first, second, third = case.candidates
    predictions = (
        predict.Prediction(second, (modelled(),)),
        predict.Prediction(first, (modelled(per_output=120.0),)),
        predict.Prediction(third, (modelled(),), trouble="kernel spills 8 B"),
    )
    ranking = predict.Ranking(case, hopper, predictions)
    assert ranking.excess == pytest.approx(0.2)
    monkeypatch.setattr(predict, "cases_at_full_size", lambda *_: [case])
    monkeypatch.setattr(predict, "rankings", lambda *_, **__: [ranking])
    said: list[str] = []
    assert predict.run("sm_90", None, None, said.append) == 0
    text = "\n".join(said)
    assert text.startswith("PREDICTION, not a measurement") and "predicted us" in text
    assert re.search(r"ROWS=32 num_warps=4 +\d+ +1.00", text)
    assert re.search(r"ROWS=64 num_warps=4  \(heuristic\) +\d+ +1.20", text)
    assert "out: ROWS=16 num_warps=4: kernel spills 8 B" in text
    assert " ms" not in text
    assert predict.run("sm_1", None, None, said.append) == 1 and "--target" in said[-1]


@pytest.mark.compile_only
def test_heuristics_are_what_the_model_prefers() -> None:
    """No candidate with the same schedule and registers to spare is predicted 10 % faster."""
    script = (
        "from perf.compiling import predict\n"
        "from perf.compiling.targets import TARGETS\n"
        "if __name__ == '__main__':\n"
        "    target = TARGETS['sm_90']\n"
        "    cases = [case for case in predict.cases_at_full_size(target)\n"
        "             if case.key in ('gaussian_statistics_forward|c32|w11|float32|contiguous',\n"
        "                             'ssim_coefficients|c4|w11|float32|contiguous')]\n"
        "    assert len(cases) == 2\n"
        "    for ranking in predict.rankings(target, cases):\n"
        "        mine = ranking.heuristic\n"
        "        time = mine.microseconds(target)\n"
        "        for other in ranking.predictions:\n"
        "            spare = all(kernel.registers <= 160 for kernel in other.kernels)\n"
        "            predicted = other.microseconds(target)\n"
        "            assert not (spare and predicted and predicted < time / 1.1), (\n"
        "                ranking.case.key, other)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.py").write_text(script)
        command = [sys.executable, f"{folder}/model.py"]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)


@pytest.mark.parametrize("name", sorted(peers.SSIM))
def test_installed_libraries_have_the_same_formula(name: str) -> None:
    try:
        function = peers.SSIM[name]()
    except ImportError:
        pytest.skip(f"{name} is not installed")
    operation = operations(["ssim"])[0]
    answered = 0
    for case in operation.cases:
        reduced = replace(case, shape=replace(case.shape, batch=2, height=24, width=29))
        try:
            verdict = Gate(operation, reduced, CPU).judge(function)
        except UnknownCaseError:
            continue
        answered += 1
        assert verdict.passed, (case.text, verdict)
    assert answered


def test_libraries_refuse_what_they_do_not_have() -> None:
    refused: list[dict[str, Any]] = [
        {"window_size": 3, "padding": "valid"},
        {"window_size": 11},
        {"padding": "valid", "reduction": "none"},
        {"padding": "valid", "sigma": 2.0},
    ]
    for options in refused:
        with pytest.raises(UnknownCaseError):
            peers._only(options, window_size=(11,), padding=("valid",), reduction=("mean",))
    peers._only({"padding": "valid"}, window_size=(11,), padding=("valid",), reduction=("mean",))


def test_absent_libraries_are_named() -> None:
    def missing() -> Callable[..., Any]:
        raise ImportError("No module named 'some_library'")

    operation = replace(
        operations(["ssim"])[0],
        libraries={"some library": missing, "other": lambda: lambda *tensors: tensors[0]},
    )
    assert peers.absent([operation, operation]) == ["some library"]

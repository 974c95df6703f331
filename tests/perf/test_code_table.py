"""The README's table of machine code: what is committed is what it says."""

from __future__ import annotations

from perf.compiling import baseline
from perf.compiling.baseline import Baseline, Kept
from perf.operations.contract import operations
from perf.report import code_table
from perf.report.readme import README

SSL, *_ = code_table.ROWS
WHERE = "sm_90", f"{SSL.operation}: {SSL.case}"
STRIPS = {"total, class present": 121.2, "total, class absent": 99.84, "once": 2.0}
COMMITTED = Baseline(
    {
        (*WHERE, "_structural_similarity_forward_kernel"): Kept(95, 0, 32, 3072, STRIPS),
        (*WHERE, "_structural_similarity_backward_kernel"): Kept(91, 8, 0, 99, {"total": 23.0}),
        (*WHERE, "_structural_similarity_helper_kernel"): Kept(9, 0, 0, 99, {"total": 0.1}),
    }
)


def test_a_row_has_all_kernels_that_count() -> None:
    header, _, row, *_ = code_table.table("9.9", COMMITTED)
    assert header.endswith("Triton 9.9 | registers | spills | instructions per pixel and class |")
    assert row == (
        "| SSL, window 3 | forward 95, backward 91 | 8 | "
        "forward 99.8 absent, 121 present; backward 23.0 |"
    )


def test_its_rows_are_shipped_cases() -> None:
    shipped = {(op.name, case.text) for op in operations() for case in op.shipped}
    assert {(row.operation, row.case) for row in code_table.ROWS} <= shipped


def test_the_readme_says_what_is_committed() -> None:
    """Where this fails, run `python -m perf code-table`."""
    path = code_table.newest()
    committed = baseline.read(path)
    lines = code_table.table(path.stem.removeprefix("triton-"), committed)
    assert "\n".join(lines) in README.read_text(encoding="utf-8")

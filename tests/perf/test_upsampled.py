"""Memory of the losses of upsampled logits: the README's table, and the report's section."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from perf.measuring import interpreted
from perf.measuring.compiled_memory import CompiledMemory
from perf.measuring.counted import CountedMemory
from perf.operations.contract import operations
from perf.report import content, readme, upsampled
from perf.report.page import Bars, Table
from perf.report.picture import share_of_compiled
from tests.perf.made import ROOT, offline_report

OPERATION, CASE = upsampled.asked()[0]
ENTRY = CountedMemory(OPERATION.name, CASE.text, 2**20, 40 * 2**20, 2 * 2**20, 19, 10)
KEY = upsampled.key(ENTRY.op, ENTRY.case)
MEMORY = upsampled.Memory([ENTRY], CompiledMemory({KEY: 30.0}, {"other": "why"}))


def test_every_loss_of_upsampled_logits_is_committed_in_both_sizes() -> None:
    """Where this fails, run `python -m perf picture`, for a new loss with --compile."""
    losses = {op.name for op in operations() if op.cases[0].ratio and op.differentiable}
    committed = upsampled.read()
    asked = [(op.name, case.text) for op, case in upsampled.asked()]
    assert [(entry.op, entry.case) for entry in committed.counted] == asked
    assert losses == {name for name, _ in asked} and len(asked) == 2 * len(losses)
    keys = {upsampled.key(*pair) for pair in asked}
    assert {*committed.compiled.shares, *committed.compiled.left_out} == keys


@pytest.mark.parametrize("name", dict.fromkeys(op.name for op, _ in upsampled.asked()))
def test_the_report_checks_them_in_the_interpreter(name: str) -> None:
    operation = operations([name])[0]
    parity = interpreted.judge(operation, operation.cases[0].tiny())
    assert parity.passed, parity


def test_upsampled_losses_take_a_twelfth_of_the_memory_at_the_most() -> None:
    committed = upsampled.read()
    for entry in committed.counted:
        assert 12 * entry.kernels <= entry.eager
        share = committed.compiled.shares[upsampled.key(entry.op, entry.case)]
        assert 10 * entry.kernels <= share * entry.input_bytes


def test_the_readme_says_what_is_committed() -> None:
    """Where this fails, run `python -m perf picture`."""
    lines = upsampled.table(upsampled.read())
    assert "\n".join(lines) in readme.README.read_text(encoding="utf-8")


def test_a_row_has_sizes_and_mebibytes() -> None:
    row = upsampled.table(MEMORY)[2]
    sizes = "4 x 19 x 256 x 512 | 1024 x 2048"
    assert row == f"| cross entropy | {sizes} | 2 MiB | 30 MiB | 40 MiB | 20.0x |"


def test_a_table_takes_the_place_of_the_one_that_is_there() -> None:
    new = upsampled.table(MEMORY)
    text = "\n".join(["before", "", new[0], "| old |", "", "after", ""])
    start = new[0][:20]
    assert readme.replaced(text, start, new) == "\n".join(["before", "", *new, "", "after", ""])
    with pytest.raises(ValueError, match="README has no line"):
        readme.replaced("text", start, new)


def test_numbers_survive_a_file(tmp_path: Path) -> None:
    upsampled.write(MEMORY, tmp_path / "upsampled.json")
    assert upsampled.read(tmp_path / "upsampled.json") == MEMORY


def test_the_report_has_a_section_that_begins_with_memory() -> None:
    """Bars of other losses are in units of the logits, and are not drawn beside them."""
    report = offline_report(memory=[*offline_report().memory, ENTRY])
    page = content.page(report)
    first = page.sections[0]
    assert first.title == upsampled.TITLE
    _, bars, table = first.blocks
    assert isinstance(bars, Bars) and isinstance(table, Table)
    (held,) = bars.groups.values()
    assert held == {
        "kernels": 2.0, "compile": share_of_compiled(ENTRY)["compile"], "eager": 40.0,
    }  # fmt: skip
    assert table.rows[0][-1] == "20.0x"
    (memory,) = [plot for plot in page.plots if plot.title == "Extra memory, counted"]
    assert isinstance(memory, Bars) and list(memory.groups) == ["loss"]
    without = content.page(offline_report())
    assert all(section.title != upsampled.TITLE for section in without.sections)


@pytest.mark.compile_only
def test_the_committed_numbers_are_what_a_step_allocates() -> None:
    """Where this fails, run `python -m perf picture`. Eager's depend on PyTorch's version."""
    script = (
        "from perf.measuring.counted import of_kernels\n"
        "from perf.report import upsampled\n"
        "for (op, case), entry in zip(upsampled.asked(), upsampled.read().counted):\n"
        "    now = of_kernels(op, case)\n"
        "    assert abs(now - entry.kernels) <= 1e-4 * entry.kernels, (entry, now)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, check=True)

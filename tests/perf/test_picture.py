"""The picture of the README: what is committed is what is drawn, and counted honestly."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from perf.measuring.counted import CountedMemory
from perf.operations.contract import operations
from perf.report import picture
from tests.perf.made import ROOT

ENTRY = CountedMemory("some_loss", "case", 100, 1700, 101, 19, 10)


def test_the_committed_picture_is_drawn_from_the_committed_numbers() -> None:
    """Drawn anew by `python -m perf picture` where this fails."""
    assert picture.PICTURE.read_text(encoding="utf-8") == picture.drawn(picture.read())


def test_it_shows_every_loss_of_logits_and_labels_at_full_size() -> None:
    losses = {op.name for op in operations() if any(case.labels for case in op.cases)}
    memory = picture.read()
    assert {entry.op for entry in memory} == losses
    assert {entry.pixels for entry in memory} == {4 * 1024 * 2048}
    known = {(op.name, case.text) for op in operations() if (case := picture.question(op))}
    assert {(entry.op, entry.case) for entry in memory} == known


@pytest.mark.compile_only
def test_the_committed_numbers_are_what_a_step_allocates() -> None:
    """`python -m perf picture` where this fails. Eager's are those of one PyTorch."""
    script = (
        "from perf.measuring.counted import of_kernels\n"
        "from perf.operations.contract import operations\n"
        "from perf.report import picture\n"
        "committed = {entry.op: entry.kernels for entry in picture.read()}\n"
        "asked = [(op, case) for op in operations() if (case := picture.question(op))]\n"
        "now = {op.name: of_kernels(op, case) for op, case in asked}\n"
        "moved = {op: (committed[op], now[op]) for op in now\n"
        "         if abs(now[op] - committed[op]) > 1e-4 * committed[op]}\n"
        "assert not moved and set(now) == set(committed), moved\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, check=True)


def test_numbers_survive_a_file(tmp_path: Path) -> None:
    picture.write([ENTRY], tmp_path / "memory.json")
    assert picture.read(tmp_path / "memory.json") == [ENTRY]


def test_it_is_well_formed_and_readable_in_light_and_dark() -> None:
    text = picture.drawn([ENTRY])
    ElementTree.fromstring(text)
    assert "@media (prefers-color-scheme: dark)" in text and "torch.compile is not shown" in text
    assert ">1.01</text>" in text and ">17.0</text>" in text
    assert "some loss 1.01, eager PyTorch 17.0" in text  # for those who do not see it
    light, dark = text.split("@media")[0], text.split("@media")[1].split("</style>")[0]
    coloured = re.findall(r"^ *([\w.]+) \{[^}]*(?:fill|stroke): #", dark, re.MULTILINE)
    assert coloured == re.findall(r"^([\w.]+) \{[^}]*(?:fill|stroke): #", light, re.MULTILINE)


def test_the_readme_shows_it() -> None:
    assert picture.PICTURE.relative_to(ROOT).as_posix() in (ROOT / "README.md").read_text()

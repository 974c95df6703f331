"""The picture of the README: what is committed is what is drawn, and counted honestly."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from perf.measuring.compiled_memory import CompiledMemory, compiled, share
from perf.measuring.counted import CountedMemory
from perf.operations.contract import SHAPES, Case, operations
from perf.report import picture
from tests.perf.made import ROOT

ENTRY = CountedMemory("some_loss", "case", 100, 1700, 101, 19, 10)
COMPILED = CompiledMemory({"some_loss": 4.25}, {"other_loss": "why"})


def test_the_committed_picture_is_drawn_from_the_committed_numbers() -> None:
    """Where this fails, run `python -m perf picture --draw`."""
    assert picture.PICTURE.read_text(encoding="utf-8") == picture.drawn(
        picture.read(), picture.read_compiled()
    )


def test_it_shows_every_loss_of_logits_and_labels_at_full_size() -> None:
    asked = [op for op in operations() if op.differentiable and op.cases[0].ratio is None]
    losses = {op.name for op in asked if any(case.labels for case in op.cases)}
    memory = picture.read()
    assert {entry.op for entry in memory} == losses
    assert {entry.pixels for entry in memory} == {4 * 1024 * 2048}
    known = {(op.name, case.text) for op in operations() if (case := picture.question(op))}
    assert {(entry.op, entry.case) for entry in memory} == known


def test_every_loss_has_a_bar_of_torch_compile_or_a_reason_for_none() -> None:
    found = picture.read_compiled()
    assert {*found.shares, *found.left_out} == {entry.op for entry in picture.read()}
    assert not found.shares.keys() & found.left_out.keys()
    assert all(share >= 1 for share in found.shares.values())  # the gradient alone is 1


def test_a_loss_that_was_not_compiled_is_named() -> None:
    text = picture.drawn([ENTRY], CompiledMemory({}, {"some_loss": "why"}))
    assert "Inductor did not compile some loss." in text
    assert text.count('class="compile"') == 1  # in the legend


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_a_compiled_pass_is_counted() -> None:
    """Fused, it keeps less than eager does, and never less than the gradient."""

    def function(x: torch.Tensor) -> torch.Tensor:
        return (x.exp() * x.square() + x.sin()).sum()

    case = Case(replace(SHAPES["cityscapes"], batch=1, classes=1, height=32, width=64))
    x = torch.rand(1, 1, 32, 64)
    eager = share(function, case, [x])
    assert 1 <= share(compiled(function), case, [x]) < eager


@pytest.mark.compile_only
def test_the_committed_numbers_are_what_a_step_allocates() -> None:
    """Where this fails, run `python -m perf picture`. Eager's depend on PyTorch's version."""
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
    picture.write([ENTRY], COMPILED, tmp_path / "memory.json")
    assert picture.read(tmp_path / "memory.json") == [ENTRY]
    assert picture.read_compiled(tmp_path / "memory.json") == COMPILED


def test_it_is_well_formed_and_readable_in_light_and_dark() -> None:
    text = picture.drawn([ENTRY], COMPILED)
    ElementTree.fromstring(text)
    assert "@media (prefers-color-scheme: dark)" in text and "as Inductor fuses for a CPU" in text
    assert ">1.01</text>" in text and ">17.0</text>" in text
    assert ">4.25</text>" in text
    # the text for those who do not see the picture
    assert "some loss 1.01, torch.compile 4.25, eager PyTorch 17.0" in text
    light, dark = text.split("@media")[0], text.split("@media")[1].split("</style>")[0]
    coloured = re.findall(r"^ *([\w.]+) \{[^}]*(?:fill|stroke): #", dark, re.MULTILINE)
    assert coloured == re.findall(r"^([\w.]+) \{[^}]*(?:fill|stroke): #", light, re.MULTILINE)


def test_the_readme_shows_it() -> None:
    assert picture.PICTURE.relative_to(ROOT).as_posix() in (ROOT / "README.md").read_text()

"""Launch configurations, looked up without error at every launch."""

from __future__ import annotations

import os
import re
import timeit
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tritonloss
from tests.tools.tuned import (
    CPU,
    ENTRY,
    HEURISTIC,
    ROOT,
    TUNED,
    ask,
    entry,
    named,
    write,
)
from tritonloss._core import configurations
from tritonloss._tools import doctor, tuned_files
from tritonloss.windows import gaussian_statistics


def test_order_of_precedence(
    cache: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = tmp_path_factory.mktemp("shipped")
    monkeypatch.setattr(configurations, "SHIPPED_DIRECTORY", shipped)
    assert ask() == HEURISTIC

    shipped_only = {**TUNED, "ROWS": 2}
    entries = {named(19, window=window): entry(configuration=shipped_only) for window in (3, 5)}
    write(shipped / "cpu.json", entries=entries)
    write(cache / "cpu.json")
    configurations.forget()
    assert ask() == TUNED  # the user's file before the shipped one
    assert ask(classes=32) == TUNED  # the same bucket
    assert ask(window=5) == shipped_only
    assert ask(classes=33) == HEURISTIC
    assert ask(operator="another_forward") == HEURISTIC
    with configurations.forced("some_forward", {"ROWS": 4}):
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
        (lambda path: path.write_text('{"schema": 2, "entr'), "cannot be read"),
        (lambda path: path.write_bytes(b"\xff\xfe\x00"), "cannot be read"),
        (lambda path: path.mkdir(), "cannot be read"),
        (lambda path: path.write_text("[]"), "not a tuned file"),
        (lambda path: write(path, entries=[]), "not a tuned file"),
        (lambda path: write(path, schema=0), "schema is 0, not 2"),
        (lambda path: write(path, gpu="NVIDIA_H100"), "tuned on 'NVIDIA_H100', not on 'cpu'"),
        (lambda path: write(path, tritonloss="0.0.1"), "tuned with tritonloss '0.0.1'"),
        (lambda path: write(path, entries={ENTRY: None}), "no valid configuration"),
        (
            lambda path: write(path, entries={ENTRY: entry(configuration={**TUNED, "ROWS": 0})}),
            "no valid configuration",
        ),
        (
            lambda path: write(
                path, entries={ENTRY: entry(configuration={**TUNED, "num_warps": 3})}
            ),
            "no valid configuration",
        ),
        (
            lambda path: write(path, entries={ENTRY: entry(configuration={"num_warps": 2})}),
            r"sets \['num_warps'\]",
        ),
        (lambda path: write(path, entries={ENTRY: entry(checked="all")}), "was checked for"),
        (lambda path: write(path, entries={ENTRY: entry(source="0")}), "1 of 1 entries .* kernels"),
        (lambda path: write(path, entries={ENTRY: entry(slice="no_such")}), "1 of 1 entries"),
        (lambda path: write(path, entries={ENTRY: entry(slice=None)}), "1 of 1 entries"),
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


def test_another_number_of_classes_is_served_by_what_was_checked_for_it(cache: Path) -> None:
    few, many = {**TUNED, "ROWS": 2}, {**TUNED, "ROWS": 4}
    entries = {
        named(2): entry(configuration=few, checked=[1, 2, 64]),
        named(150): entry(configuration=many, checked=[16, 256]),
        named(8): entry(configuration={"MATRICES": 4, "num_warps": 1}, checked=[1, 256]),
        named(19, "another_forward"): entry(checked=[1, 256]),
        named(19, window=5): entry(checked=[1, 256]),
        named(1000): entry(checked=[]),
    }
    write(cache / "cpu.json", entries=entries)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ask(classes=2) == few
        assert ask(classes=4) == few  # nearer than 150; what sets other things is passed over
        assert ask(classes=64) == many
        assert ask(classes=16) == few == ask(classes=9)  # 3 steps from 2, 4 steps from 150
        assert ask(classes=512) == HEURISTIC  # nothing was checked for as many


def test_an_unchecked_neighbour_is_not_used(cache: Path) -> None:
    for reach in ([], [32], [32, 64]):
        write(cache / "cpu.json", entries={ENTRY: entry(checked=reach)})
        configurations.forget()
        assert ask(classes=150) == HEURISTIC
        assert ask(classes=64) == (TUNED if 64 in reach else HEURISTIC)


def test_look_up_costs_less_than_five_microseconds(cache: Path) -> None:
    write(cache / "cpu.json")
    heuristic = dict(HEURISTIC)

    def look_up() -> None:
        configurations.launch_configuration(
            "some_forward",
            device=CPU,
            dtype=torch.float32,
            classes=19,
            window=3,
            layout="contiguous",
            heuristic=heuristic,
        )

    look_up()
    # The best of many short runs: other processes only ever add to the time.
    assert min(timeit.repeat(look_up, number=200, repeat=50)) / 200 < 5e-6


def test_only_the_first_look_up_asks_for_the_gpu(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[torch.device] = []

    def name(device: torch.device) -> str:
        asked.append(device)
        return "NVIDIA H200"

    monkeypatch.setattr(configurations, "_names", {})
    monkeypatch.setattr(torch.cuda, "get_device_name", name)
    write(cache / "NVIDIA_H200.json", gpu="NVIDIA_H200")
    for classes in (19, 19, 20, 150):
        found = configurations.launch_configuration(
            "some_forward",
            device=torch.device("cuda", 0),
            dtype=torch.float32,
            classes=classes,
            window=3,
            layout="contiguous",
            heuristic=dict(HEURISTIC),
        )
        assert found == (HEURISTIC if classes == 150 else TUNED)
    assert len(asked) == 1


def test_a_compiled_loss_uses_the_tuned_file(cache: Path, device: torch.device) -> None:
    """Image sizes do not matter, and a compiled graph looks up what an eager call looks up."""
    heuristic = gaussian_statistics._forward_heuristic(3)
    tuned = {**heuristic, "ROWS": 8, "LANES": 32, "num_warps": 1}
    name = configurations.device_name(device)
    entries = {named(2, "gaussian_statistics_forward"): entry(configuration=tuned)}
    write(cache / f"{name}.json", gpu=name, entries=entries)
    used: list[Any] = []
    launch = gaussian_statistics.strip_launch

    def seen(shape: Any, configuration: Any, *others: Any, **named: Any) -> Any:
        used.append(configuration)
        return launch(shape, configuration, *others, **named)

    compiled = torch.compile(tritonloss.gaussian_statistics, fullgraph=True, backend="aot_eager")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gaussian_statistics, "strip_launch", seen)
        for size in (9, 11):
            compiled(torch.rand(1, 2, size, 13, device=device))
    assert used == [tuned, tuned]


def test_device_names_are_file_names() -> None:
    assert configurations.sanitised("NVIDIA H200") == "NVIDIA_H200"
    assert configurations.sanitised("../../etc/x") == "etc_x"
    assert configurations.sanitised("Œ™/\\:*") == "unnamed"
    assert len(configurations.sanitised("x" * 500)) == 100
    assert configurations.sanitised("CON: a/b\\c\n\0") == "CON_a_b_c"


def test_a_gpu_with_an_odd_name_has_a_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = "NVIDIA® GeForce / RTX\\4090 <Ti> (24 GB)\n"
    monkeypatch.setattr(configurations, "_names", {})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: odd)
    name = configurations.device_name(torch.device("cuda", 3))
    path = configurations.tuned_files(name)[0]
    tuned_files.write_entries(path, name, {ENTRY: entry()})
    assert path.parent == cache and os.listdir(cache) == [path.name]
    assert configurations.read_document(path, name)["gpu"] == name


def test_shipped_files_are_usable() -> None:
    for path in configurations.SHIPPED_DIRECTORY.glob("*.json"):
        entries = configurations.read_document(path, path.stem)["entries"]
        assert not [name for name, value in entries.items() if configurations.is_outdated(value)]


def test_doctor_names_an_unusable_file(cache: Path) -> None:
    assert doctor._configurations_in_use("cpu") == "heuristic, no tuned file"
    write(cache / "cpu.json", schema=0)
    assert "is ignored: its schema is 0" in doctor._configurations_in_use("cpu")
    write(cache / "cpu.json")
    assert "cpu.json (1 entries, triton 3.6.0" in doctor._configurations_in_use("cpu")


def test_an_unknown_operator_in_a_file_does_no_harm(cache: Path) -> None:
    strange = {"": entry(), "no|such|key": entry(), named(3, "unknown"): entry(), "x|c|w|": entry()}
    write(cache / "cpu.json", entries={**strange, ENTRY: entry()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ask() == TUNED and ask(window=5) == HEURISTIC


def test_every_environment_variable_stands_in_the_readme() -> None:
    named: set[str] = set()
    for path in (*ROOT.glob("tritonloss/**/*.py"), *ROOT.glob("perf/**/*.py")):
        if path.stem == "stand_in":  # sets one that is Triton's own
            continue
        named |= set(re.findall(r'"(TRITON(?:LOSS)?_[A-Z_]+)"', path.read_text()))
    table = (ROOT / "README.md").read_text().split("## Environment variables")[1].split("##")[0]
    assert named == set(re.findall(r"^\| `(TRITON[A-Z_]+)", table, re.MULTILINE))

"""Launch configurations: looked up without error at every launch, and measured by the tuner."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import tempfile
import timeit
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.runtime import interpreter

import tritonloss
from tritonloss import __main__, functional, linalg
from tritonloss._core import configurations, tuning_inputs
from tritonloss._core import source_hash as hashing
from tritonloss._core.source_hash import source_hash
from tritonloss._tools import doctor, tuned_files, tuner, tuning_cases
from tritonloss._tools.launches import recorded
from tritonloss._tools.sieve import Sieve
from tritonloss.regions.plan import kernels_of_large_images
from tritonloss.windows import gaussian_statistics

CPU = torch.device("cpu")
HEURISTIC: configurations.Configuration = {"LANES": 32, "ROWS": 16, "num_warps": 4}
TUNED: configurations.Configuration = {"LANES": 64, "ROWS": 8, "num_warps": 2}
ENTRY = configurations.key("some_forward", 19, 3, torch.float32, "contiguous")
SLICE = "windows.gaussian_statistics"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory, and a process that has read no tuned file."""
    monkeypatch.setenv("TRITONLOSS_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITONLOSS_TUNING", raising=False)
    monkeypatch.setattr(configurations, "_tables", {})
    monkeypatch.setattr(configurations, "_resolved", {})
    return tmp_path


def ask(classes: int = 19, window: int = 3, operator: str = "some_forward") -> Any:
    return configurations.launch_configuration(
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
        "schema": configurations.SCHEMA,
        "gpu": "cpu",
        "triton": "3.6.0",
        "tritonloss": tritonloss.__version__,
        "date": "2026-01-01T00:00:00Z",
        "entries": {ENTRY: entry()},
    }
    path.write_text(json.dumps({**document, **changes}))


def entry(**changes: Any) -> dict[str, Any]:
    made = {
        "configuration": TUNED,
        "ms": 0.1,
        "checked": [32],
        "slice": SLICE,
        "source": source_hash(SLICE),
    }
    return {**made, **changes}


def named(classes: int, operator: str = "some_forward", window: int = 3) -> str:
    return configurations.key(operator, classes, window, torch.float32, "contiguous")


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

    def seen(shape: Any, configuration: Any, *others: Any) -> Any:
        used.append(configuration)
        return launch(shape, configuration, *others)

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


def case_of(*candidates: configurations.Configuration) -> configurations.TuningCase:
    """A case whose launch takes ROWS milliseconds; 13 does not compile and 7 is wrong."""

    def run(device: torch.device) -> Callable[[], Any]:
        def launch() -> tuple[torch.Tensor, None]:
            rows = int(ask()["ROWS"])
            if rows == 13:
                raise RuntimeError("out of resources\nand a long story")
            return torch.full((2,), float("nan") if rows == 7 else 1.0), None

        return launch

    return configurations.TuningCase(
        "some_forward", 19, 3, torch.float32, "contiguous", run, list(candidates), slice=SLICE
    )


RUN = case_of(HEURISTIC).run


def rows_as_time(launch: Callable[[], Any]) -> float:
    launch()
    return float(ask()["ROWS"])


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


def test_tuner_leaves_out_what_compiling_has_sifted(cache: Path) -> None:
    case = case_of({"ROWS": 8}, {"ROWS": 4})
    faults = [None, "some_kernel spills 8 B"]
    outcome = tuner.tune_case(case, CPU, float("inf"), rows_as_time, faults)
    assert outcome.best == (8.0, {"ROWS": 8})
    assert outcome.dropped == ["{'ROWS': 4}: some_kernel spills 8 B"]


def test_a_sieve_that_lets_nothing_pass_is_not_believed() -> None:
    class Found:
        def __init__(self, fault: str | None) -> None:
            self.result = lambda: fault

    sieve = object.__new__(Sieve)
    case = case_of({"ROWS": 8}, {"ROWS": 4})
    sieve._futures = {case.key: [Found("spills"), Found(None)]}  # type: ignore[list-item]
    assert sieve.faults(case) == ["spills", None]
    sieve._futures = {case.key: [Found("no compiler"), Found("no compiler")]}  # type: ignore[list-item]
    assert sieve.faults(case) == [None, None]
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


@pytest.fixture
def stub_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU in place of a GPU, and launches that say how long they take."""
    monkeypatch.setattr(tuner, "_gpu", lambda: CPU)
    monkeypatch.setattr(tuner, "_median_ms", rows_as_time)


def offer(monkeypatch: pytest.MonkeyPatch, *cases: configurations.TuningCase) -> None:
    monkeypatch.setattr(tuner, "tuning_cases", lambda operator, shapes: list(cases))


def interrupted(device: torch.device) -> Callable[[], Any]:
    raise KeyboardInterrupt


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


def test_shapes_choose_the_classes_and_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = tuning_cases.tuning_cases("ssim_forward", [(1, 150, 64, 64)])
    assert {case.classes for case in cases} == {150}
    assert {case.layout for case in cases} == {"contiguous"}
    assert {case.shape for case in cases} == {(1, 150, 64, 64)}
    with pytest.raises(SystemExit):
        __main__.main(["tune", "--shapes", "4x19x1024"])


def test_cases_cover_buckets_and_layouts_of_every_sized_operator() -> None:
    cases = tuning_cases.tuning_cases()
    assert len({case.key for case in cases}) == len(cases)
    stated = [case for name in tuning_cases.slices() for case in tuning_cases.own_cases(name)]
    assert {case.slice for case in cases[:3]} >= set(tuning_cases.slices()[:3])
    for case in stated:
        same = [c for c in cases if c.operator == case.operator and c.dtype == case.dtype]
        if case.sized is not None:
            buckets = {(configurations.bucket_of(c.classes), c.layout) for c in same}
            sizes = [size for size in tuning_cases.SIZES if size[1] in case.layouts]
            assert len(buckets) >= len(sizes)
    last = cases[-1]
    again = tuning_cases.same_case(last.slice, last.number, last.shape, last.layout)
    assert again.key == last.key and again.candidates == last.candidates


@contextmanager
def questions(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, configurations.Configuration]]:
    """The entries that launchers look up inside, with their heuristics; no kernel runs."""
    asked: dict[str, configurations.Configuration] = {}

    def answer(
        operator: str,
        *,
        device: torch.device,
        heuristic: configurations.Configuration,
        **question: Any,
    ) -> configurations.Configuration:
        asked[configurations.key(operator, **question)] = dict(heuristic)
        return heuristic

    with monkeypatch.context() as patch, recorded("skip"):
        for module in [module for name, module in sys.modules.items() if "tritonloss." in name]:
            if hasattr(module, "launch_configuration"):
                patch.setattr(module, "launch_configuration", answer)
        patch.setattr(interpreter.GridExecutor, "__call__", lambda *_, **__: None)
        yield asked


def ask_losses(dtype: torch.dtype, layout: str, device: torch.device) -> None:
    """Forward and backward of every loss, with the windows that the standard options have."""
    logits = tuning_inputs.random_map((1, 19, 24, 40), layout, dtype, device).requires_grad_()
    target = tuning_inputs.random_labels((1, 19, 24, 40), device)
    offsets = tritonloss.margin_offsets(torch.arange(1, 20, device=device))
    losses = [
        functional.cross_entropy(logits, target),
        functional.binary_cross_entropy(logits, target),
        functional.focal_loss(logits, target),
        functional.margin_calibrated_loss(logits, target, offsets),
        functional.rmi_loss(logits, target, pooling="nearest"),
        functional.rmi_loss(logits, target, pooling="max", pool_size=2, region_size=2),
    ]
    losses += [functional.rmi_loss(logits, target, pooling=pooling) for pooling in ("avg", None)]
    losses += [
        functional.rmi_loss(logits, target, region_size=region, pooling=None)
        for region in (2, 4, 5)
    ]
    for window_size in (3, 5, 7, 9, 11):
        losses.append(
            functional.structural_similarity_loss(logits, target, window_size=window_size)
        )
        losses.append(tritonloss.gaussian_statistics(logits, window_size)[0].sum())
    for window_size in (7, 11):
        losses.append(functional.ssim_loss(logits, target, window_size=window_size))
    for loss in losses:
        loss.backward()


def ask_linalg(dtype: torch.dtype, device: torch.device) -> None:
    """Every function on matrices, and its gradient, for orders in lanes and in tiles."""
    for order in (2, 4, 8, 9, 10, 16, 32, 64):
        matrices = torch.eye(order, dtype=dtype, device=device)[None].requires_grad_()
        results = (
            linalg.cholesky_ex(matrices)[0],
            linalg.logdet(matrices),
            linalg.inv(matrices),
            linalg.solve(matrices, torch.ones_like(matrices)[..., :1]),
        )
        for result in results:
            result.sum().backward()


def test_the_tuner_has_a_case_for_whatever_a_launcher_asks(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        questions(monkeypatch) as asked,
        tritonloss.use_backend("triton"),
        kernels_of_large_images(),
    ):
        for dtype in (torch.float32, torch.bfloat16):
            for layout in ("contiguous", "channels_last", "strided"):
                ask_losses(dtype, layout, device)
        for dtype in (torch.float32, torch.float64):
            ask_linalg(dtype, device)
    cases = {case.key: case for case in tuning_cases.tuning_cases()}
    operators = {case.operator for case in cases.values()}
    assert {name.split("|")[0] for name in asked} == operators
    assert not asked.keys() - cases.keys()
    for name, heuristic in asked.items():
        assert cases[name].candidates[0] == heuristic, name
        assert all(other.keys() == heuristic.keys() for other in cases[name].candidates), name


def test_the_default_run_is_bounded() -> None:
    """The first cases are those that most will profit from, whatever the budget leaves out."""
    cases = tuning_cases.tuning_cases()
    assert len(cases) < 800
    first = {case.operator for case in cases if case.dtype == torch.float32}
    assert first == {case.operator for case in cases[:120] if case.dtype == torch.float32}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_tuning_inputs_have_the_layout(layout: str) -> None:
    x = tuning_inputs.random_map((2, 3, 8, 16), layout, torch.bfloat16, CPU)
    assert x.shape == (2, 3, 8, 16) and x.dtype == torch.bfloat16
    assert x.is_contiguous() == (layout == "contiguous")
    assert x.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")
    labels = tuning_inputs.random_labels((2, 3, 33, 40), CPU)
    assert labels.shape == (2, 33, 40) and labels.max() < 3


@pytest.mark.compile_only
def test_candidates_are_compiled_and_sifted_in_a_pool() -> None:
    """In a process without the interpreter, as on a machine with a GPU."""
    script = (
        "from triton.backends.compiler import GPUTarget\n"
        "from tritonloss._tools.launches import offline\n"
        "from tritonloss._tools.sieve import Sieve\n"
        "from tritonloss._tools.tuning_cases import tuning_cases\n"
        "if __name__ == '__main__':\n"
        "    target = GPUTarget('cuda', 90, 32)\n"
        "    with offline(target):\n"
        "        cases = tuning_cases('structural_similarity_forward')\n"
        "    case = next(c for c in cases if c.window == 11)\n"
        "    sieve = Sieve([case], target, 227 * 1024, workers=2)\n"
        "    faults = sieve.faults(case)\n"
        "    sieve.close()\n"
        "    assert faults[0] is None and len(faults) == len(case.candidates)\n"
        "    wide = case.candidates.index({**case.candidates[0], 'COLUMNS': 4})\n"
        "    assert 'spills' in faults[wide], faults\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    path = Path(tempfile.mkdtemp()) / "sift.py"
    path.write_text(script)
    subprocess.run([sys.executable, path], cwd=ROOT, env=environment, check=True)


def test_source_hash_follows_device_code_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = (
        "from . import helpers\n\n\n@triton.jit\ndef kernel(x):\n"
        '    """Text."""\n    y = x  # why\n    return y\n\n\ndef launch():\n    pass\n'
    )
    monkeypatch.setattr(hashing, "_PACKAGE", tmp_path)

    def hashed(text: str, helper: str = "") -> str | None:
        (tmp_path / "loss.py").write_text(text)
        (tmp_path / "helpers.py").write_text(helper)
        source_hash.cache_clear()
        return source_hash("loss")

    try:
        before = hashed(kernel)
        assert before == hashed(kernel.replace("Text", "Other text").replace("why", "so"))
        assert before == hashed(kernel.replace("pass", "return 1"))
        assert before != hashed(kernel.replace("y = x", "y = x + 1"))
        assert before != hashed(kernel, "@triton.jit\ndef helper():\n    return 1\n")
        assert source_hash("no_such_slice") is None and source_hash("../loss") is None
    finally:
        source_hash.cache_clear()


@pytest.mark.parametrize(
    "line",
    [
        "from ..engine import helpers",
        "from ..engine.helpers import helper",
        "from .. import engine",
        "from tritonloss.engine.helpers import helper",
        "import tritonloss.engine.helpers",
    ],
)
def test_source_hash_follows_imports_into_rooms(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine in a folder of its own counts as one beside the slice does."""
    monkeypatch.setattr(hashing, "_PACKAGE", tmp_path)
    for room in ("windows", "engine"):
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").write_text("")
    (tmp_path / "engine" / "__init__.py").write_text("from . import helpers\n")
    (tmp_path / "windows" / "loss.py").write_text(f"{line}\n")

    def hashed(number: int) -> str | None:
        helper = f"@triton.jit\ndef helper():\n    return {number}\n"
        (tmp_path / "engine" / "helpers.py").write_text(helper)
        source_hash.cache_clear()
        return source_hash("windows.loss")

    try:
        first = hashed(1)
        assert first is not None and first == hashed(1) != hashed(2)
    finally:
        source_hash.cache_clear()


def test_every_module_with_device_code_counts_for_a_slice() -> None:
    package = ROOT / "tritonloss"
    reached = {name for one in tuning_cases.slices() for name in hashing.source_modules(one)}
    for path in package.rglob("*.py"):
        if "triton.jit" in path.read_text() and path.stem != "interpreter":  # the doctor's trial
            assert ".".join(path.relative_to(package).with_suffix("").parts) in reached


def test_slices_are_found_in_rooms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "attic").mkdir()
    (tmp_path / "attic" / "__init__.py").write_text("")
    (tmp_path / "attic" / "old_loss.py").write_text("def tuning_cases():\n    return []\n")
    before = tuning_cases.slices()
    monkeypatch.setattr(tritonloss, "__path__", [*tritonloss.__path__, str(tmp_path)])
    assert set(tuning_cases.slices()) == {*before, "attic.old_loss"}


def test_tuning_adds_to_the_file(cache: Path) -> None:
    write(cache / "cpu.json", entries={ENTRY: entry(), named(1): entry(source="0")})
    other = named(2, "other")
    tuned_files.write_entries(cache / "cpu.json", "cpu", {other: entry(configuration=HEURISTIC)})
    assert set(configurations.read_document(cache / "cpu.json", "cpu")["entries"]) == {ENTRY, other}


def test_a_failed_write_leaves_the_old_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(cache / "cpu.json")
    before = (cache / "cpu.json").read_text()
    with pytest.raises(TypeError):
        tuned_files.write_entries(cache / "cpu.json", "cpu", {"some": object()})
    assert (cache / "cpu.json").read_text() == before
    assert os.listdir(cache) == ["cpu.json"]


def test_a_process_killed_while_it_writes_leaves_the_old_file(cache: Path) -> None:
    write(cache / "cpu.json")
    script = (
        "import os; from pathlib import Path; from tritonloss._tools import tuned_files\n"
        "os.replace = lambda *paths: os._exit(9)\n"
        f"tuned_files.write_entries(Path({str(cache / 'cpu.json')!r}), 'cpu', {{}})\n"
    )
    killed = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False)
    assert killed.returncode == 9 and len(os.listdir(cache)) == 2
    assert ask() == TUNED
    tuned_files.write_entries(cache / "cpu.json", "cpu", {})
    assert os.listdir(cache) == ["cpu.json"]  # what was left is swept up


def test_two_processes_write_the_same_file(cache: Path) -> None:
    """Nothing of either gets lost, and a third one that reads never sees half a file."""
    path = cache / "cpu.json"
    write(path)
    script = (
        "import json, sys; from pathlib import Path; from tritonloss._tools import tuned_files\n"
        "entry, path, who = json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])\n"
        "for n in range(25):\n"
        "    key = f'some_forward|c{who}|w{2 * n + 1}|float32|contiguous'\n"
        "    tuned_files.write_entries(path, 'cpu', {key: entry})\n"
    )
    command = [sys.executable, "-c", script, json.dumps(entry()), str(path)]
    writers = [subprocess.Popen([*command, who], cwd=ROOT) for who in ("1", "2")]
    reads = 0
    while any(writer.poll() is None for writer in writers):
        assert ENTRY in configurations.read_document(path, "cpu")["entries"]
        reads += 1
    assert [writer.returncode for writer in writers] == [0, 0] and reads > 10
    assert len(configurations.read_document(path, "cpu")["entries"]) == 1 + 2 * 25


def test_a_cache_directory_that_cannot_be_written_to(
    cache: Path, monkeypatch: pytest.MonkeyPatch, stub_gpu: None
) -> None:
    """It serves what it holds, and tuning says at once that it has nowhere to write."""

    def refuse(**_: Any) -> Any:
        raise OSError(errno.EROFS, "Read-only file system")

    write(cache / "cpu.json")
    cache.chmod(0o555)
    monkeypatch.setattr(tempfile, "mkstemp", refuse)  # permissions do not stop every user
    offer(monkeypatch, replace(case_of(HEURISTIC), run=interrupted))
    said: list[str] = []
    assert ask() == TUNED
    assert tuner.tune(tuner.Request(), said.append) == 1
    assert "Read-only file system" in said[-1] and "TRITONLOSS_CACHE_DIR" in said[-1]
    cache.chmod(0o755)


def test_an_unknown_operator_in_a_file_does_no_harm(cache: Path) -> None:
    strange = {"": entry(), "no|such|key": entry(), named(3, "unknown"): entry(), "x|c|w|": entry()}
    write(cache / "cpu.json", entries={**strange, ENTRY: entry()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ask() == TUNED and ask(window=5) == HEURISTIC


def test_export_writes_what_can_be_shipped(
    cache: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = tmp_path_factory.mktemp("shipped")
    monkeypatch.setattr(configurations, "SHIPPED_DIRECTORY", shipped)
    entries = {ENTRY: entry(), named(2): entry(source="0")}
    write(cache / "mine.json", gpu="NVIDIA_H200", entries=entries)
    assert __main__.main(["tune", "--export", str(cache / "mine.json")]) == 0
    document = configurations.read_document(shipped / "NVIDIA_H200.json", "NVIDIA_H200")
    assert list(document["entries"]) == [ENTRY]

    write(cache / "old.json", entries={ENTRY: entry(source="0")})
    (cache / "no.json").write_text("[]")
    for name in ("old.json", "no.json", "none.json"):
        assert __main__.main(["tune", "--export", str(cache / name)]) == 1
    assert os.listdir(shipped) == ["NVIDIA_H200.json"]


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


def test_every_environment_variable_stands_in_the_readme() -> None:
    named: set[str] = set()
    for path in (*ROOT.glob("tritonloss/**/*.py"), *ROOT.glob("perf/**/*.py")):
        if path.stem == "stand_in":  # sets one that is Triton's own
            continue
        named |= set(re.findall(r'"(TRITON(?:LOSS)?_[A-Z_]+)"', path.read_text()))
    table = (ROOT / "README.md").read_text().split("## Environment variables")[1].split("##")[0]
    assert named == set(re.findall(r"^\| `(TRITON[A-Z_]+)", table, re.MULTILINE))


def test_every_tuning_case_has_distinct_candidates() -> None:
    cases = tuning_cases.tuning_cases()
    assert cases
    for case in cases:
        assert case.candidates and case.slice in tuning_cases.slices()
        for candidate in case.candidates:
            assert configurations._is_configuration(candidate), (case.key, candidate)
            assert case.candidates.count(candidate) == 1, (case.key, candidate)


def test_predictions_need_a_checkout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "perf.compiling.predict", None)
    assert __main__.main(["tune", "--compile-only", "--target", "sm_90"]) == 1
    assert "the folder perf of the repository" in capsys.readouterr().out

"""What slices tell the benchmarks, the parity gate, and other people's libraries."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from perf import __main__
from perf.measuring import measure
from perf.measuring.parity import Gate, Verdict
from perf.measuring.timing import Timing
from perf.measuring.trial import Trial
from perf.operations import contract, peers
from perf.operations.contract import (
    SHAPES,
    Goal,
    UnknownCaseError,
    operations,
)
from perf.report.choice import Choice
from perf.report.make import plan
from tests.perf.made import CPU, NAMES, ROOT, machine, small
from tritonloss import functional


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
    held = sum(x.numel() * x.element_size() for x in (*inputs, *results)) + operation.kept(case)
    upstream = sum(x.numel() * x.element_size() for x in results[: -len(inputs)] or results[:1])
    floor = operation.floor(case)
    assert 0 < floor.forward and floor.forward + floor.backward == floor.of("full")
    assert (floor.backward > 0) == operation.differentiable
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
    planned = plan(chosen, Choice(), on_gpu=True)
    assert [operation.name for operation, _ in planned[: len(chosen)]] == NAMES
    assert len(planned) == sum(len(operation.cases) for operation in chosen)
    assert len(plan(chosen, Choice(quick=True), on_gpu=False)) == len(chosen)
    only = plan(chosen, Choice(shapes=["voc"], dtypes=["float32"]), on_gpu=False)
    assert {case.shape.name for _, case in only} == {"voc"}


@pytest.mark.parametrize("name", NAMES)
def test_gate_passes_the_reference_and_stops_a_wrong_border(name: str) -> None:
    operation = operations([name])[0]
    gate = Gate(operation, small(operation), CPU)

    def wrong_in_one_place(*inputs: Tensor, **options: Any) -> Any:
        first, *others = inputs
        corner = torch.zeros_like(first)
        corner[0, :, 0, 0] = 1e-2 if operation.differentiable else 100.0  # what counts, flips
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


LIBRARIES = [
    (operation.name, library)
    for operation in operations()
    for library in sorted(operation.libraries)
]


@pytest.mark.parametrize(("name", "library"), LIBRARIES)
def test_installed_libraries_have_the_same_formula(name: str, library: str) -> None:
    operation = operations([name])[0]
    try:
        function = operation.libraries[library]()
    except ImportError:
        pytest.skip(f"{library} is not installed")
    answered = 0
    for case in operation.cases:
        batch, classes = 2, min(case.shape.classes, 7)
        shape = replace(case.shape, batch=batch, classes=classes, height=24, width=29)
        reduced = replace(case, shape=shape)
        try:
            verdict = Gate(operation, reduced, CPU).judge(function)
        except UnknownCaseError:
            continue
        answered += 1
        assert verdict.passed, (case.text, verdict)
        inputs = operation.inputs(reduced, CPU)
        wide = [x.double() if x.is_floating_point() else x for x in inputs]
        expected = operation.reference(*wide, **case.options)
        for precise in (wide, inputs) if case.dtype == "float32" else ():
            try:
                found = function(*precise, **case.options)
            except UnknownCaseError:
                continue
            torch.testing.assert_close(found.double(), expected.double(), rtol=2e-6, atol=1e-6)
    assert answered


@pytest.mark.parametrize("name", ["cross_entropy", "binary_cross_entropy", "focal_loss"])
def test_libraries_of_pixelwise_losses_refuse_what_they_do_not_have(name: str) -> None:
    operation = operations([name])[0]
    inputs = operation.inputs(small(operation), CPU)
    for library, load in operation.libraries.items():
        if library in ("torch", "log_softmax"):
            continue
        try:
            function = load()
        except ImportError:
            continue
        with pytest.raises(UnknownCaseError):
            function(*inputs, reduction="none")
        with pytest.raises(UnknownCaseError):
            function(inputs[0].bfloat16(), inputs[1])


def test_torch_compile_is_warm_before_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parity check has made the graph, for the case's own size."""
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "compile", lambda f, **given: (asked.append(given), f)[1])
    calls: list[str] = []
    operation = operations(["gaussian_statistics"])[0]

    def judged(gate: Gate, function: object) -> Verdict:
        calls.append("judged")
        return Verdict(0.0, 1.0)

    def timed(function: object, device: object) -> Timing:
        calls.append("timed")
        return Timing(1.0, 1.0, 1.0, "none")

    monkeypatch.setattr(Gate, "judge", judged)
    monkeypatch.setattr(measure, "time_call", timed)
    bench = measure.Bench(machine(), 10.0)
    found = list(bench.rows(operation, small(operation), measure.compiled(operation)))
    assert asked == [{"dynamic": False}] and len(found) == 3
    assert calls[0] == "judged" and set(calls[1:]) == {"timed"}


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

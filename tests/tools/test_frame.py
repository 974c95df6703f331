"""The frame around the losses: choice of backend, doctor, annotations."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
import triton
from setuptools import find_packages

import kernels_reference
import tritonloss
from tritonloss._core import backend
from tritonloss._core.example import Example
from tritonloss._tools import doctor, interpreter
from tritonloss._tools.examples import examples

ROOT = Path(__file__).parents[2]


def test_backend_follows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.zeros(1)
    monkeypatch.setattr(backend, "INTERPRETED", True)
    assert backend.serves_triton(tensor)
    with tritonloss.use_backend("reference"):
        assert not backend.serves_triton(tensor)
        with tritonloss.use_backend("triton"):
            assert backend.serves_triton(tensor)
        assert not backend.serves_triton(tensor)
    monkeypatch.setattr(backend, "INTERPRETED", False)
    assert not backend.serves_triton(tensor)


def test_kernels_on_a_cpu_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "INTERPRETED", False)
    with tritonloss.use_backend("triton"), pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        backend.serves_triton(torch.zeros(1))


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="backend must be .* got 'cuda'"):
        with tritonloss.use_backend("cuda"):
            pass


def test_backend_is_restored_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "INTERPRETED", True)
    with pytest.raises(KeyError):
        with tritonloss.use_backend("reference"):
            raise KeyError
    assert backend.serves_triton(torch.zeros(1))


def test_compiled_code_follows_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "INTERPRETED", True)

    @torch.compile(fullgraph=True, backend="eager")
    def compiled(tensor: torch.Tensor) -> torch.Tensor:
        return tensor + 1 if backend.serves_triton(tensor) else tensor + 2

    tensor = torch.zeros(1)
    assert compiled(tensor) == 1
    with tritonloss.use_backend("reference"):
        assert compiled(tensor) == 2
    assert compiled(tensor) == 1


def test_doctor_passes_and_says_so() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-m", "tritonloss", "doctor"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.splitlines()[-1] == "verdict: healthy"
    for example in examples():
        assert f"  {example.name} on " in ran.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("example", examples(), ids=lambda example: example.name)
def test_an_example_agrees_on_the_gpu(example: Example) -> None:
    """Each example is a test of its own, so that many processes can share them."""
    said: list[str] = []
    assert doctor.self_test(torch.device("cuda"), said.append, chosen=[example]) == 0, said


def show(monkeypatch: pytest.MonkeyPatch, **functions: Any) -> None:
    """Let the doctor have these examples only."""
    found = [Example(name, function, None) for name, function in functions.items()]
    monkeypatch.setattr(doctor, "examples", lambda: found)


def test_doctor_fails_on_a_wrong_kernel(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    def wrong(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, ...]:
        value = logits.sum()
        return (value if backend.serves_triton(logits) else 1.01 * value,)

    def broken(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, ...]:
        raise RuntimeError("no such kernel")

    def right(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (logits.sum(),)

    said: list[str] = []
    show(monkeypatch, right=right)
    assert doctor.self_test(device, said.append) == 0
    show(monkeypatch, wrong=wrong, broken=broken, right=right)
    assert doctor.self_test(device, said.append) == 1
    assert ["FAILED" in line for line in said] == [False, True, True, False]


def _no_loop(*_: object) -> None:
    raise TypeError("only 0-dimensional arrays can be converted to Python scalars")


@pytest.mark.skipif(not backend.INTERPRETED, reason="for Triton's interpreter")
def test_an_interpreter_that_runs_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter is tried out, whatever the versions say."""
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    monkeypatch.setattr(numpy, "__version__", "2.4.0")
    assert interpreter.interpreter_problem() is None


@pytest.mark.parametrize(
    ("of_triton", "of_numpy", "reason"),
    [
        ("3.6.0", "2.4.6", "that of Triton 3.6 needs numpy < 2.4"),
        ("3.6.0+git1234", "2.10.0rc1", "that of Triton 3.6 needs numpy < 2.4"),
        ("3.6.0", "2.3.5", "TypeError: only 0-dimensional arrays"),
        ("3.9.0", "2.4.6", "TypeError: only 0-dimensional arrays"),
    ],
)
def test_an_interpreter_that_does_not_run_is_named(
    of_triton: str, of_numpy: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton, "__version__", of_triton)
    monkeypatch.setattr(numpy, "__version__", of_numpy)
    monkeypatch.setattr(interpreter, "_count_kernel", {(1,): _no_loop})
    said: list[str] = []
    assert doctor.interpreted_self_test(said.append) == doctor.CANNOT_INTERPRET
    installed = f"(Triton {of_triton}, numpy {of_numpy})"
    assert said[0].startswith(f"  Triton's interpreter cannot run here {installed}: {reason}")
    assert len(said) == 1


@pytest.mark.parametrize("healthy", [True, False])
def test_doctor_tests_the_reference_where_no_kernel_can_run(
    healthy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def child(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[-2:] == ["doctor", "--self-test"]
        said = "  Triton's interpreter cannot run here\n"
        return subprocess.CompletedProcess(command, doctor.CANNOT_INTERPRET, said, "")

    def wrong(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (logits.sum() * (1 if logits.dtype == torch.float64 else 1.01),)

    shown = [*examples(), *([] if healthy else [Example("wrong", wrong, None)])]
    monkeypatch.setattr(doctor, "examples", lambda: shown)
    cpu = [(torch.device("cpu"), "a processor")]
    monkeypatch.setattr(doctor, "_devices", lambda: cpu)
    monkeypatch.setattr(doctor, "INTERPRETED", False)
    monkeypatch.setattr(doctor, "subprocess", SimpleNamespace(run=child))
    said: list[str] = []
    assert doctor.doctor(said.append) == (0 if healthy else 1)
    assert "  Triton's interpreter cannot run here" in said
    for name in [example.name for example in shown]:
        verdict = "FAILED" if name == "wrong" else "ok"
        assert any(line.startswith(f"  {name} on cpu, reference: {verdict}") for line in said)
    assert said[-1].startswith("verdict: healthy" if healthy else "verdict: NOT healthy")


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_no_rounding_decides_the_self_test(device_type: str) -> None:
    logits, target = doctor.self_test_inputs(device_type)
    for window in (3, 7):
        options = {"window_size": window, "sigma": 1.5, "stability": 0.01}
        e = kernels_reference.structural_difference(
            logits.double(), target, ignore_index=255, **options
        )
        largest = kernels_reference.largest_difference(**options)
        assert ((e / largest - 0.1).abs() > 2e-5).all()


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("tritonloss/**/*.py")), ids=lambda path: path.stem
)
def test_everything_but_device_code_is_annotated(path: Path) -> None:
    """mypy cannot demand that in files that hold kernels, too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.FunctionDef):
            continue
        if any("jit" in ast.unparse(decorator) for decorator in node.decorator_list):
            continue
        arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        bare = [
            argument.arg
            for argument in arguments
            if argument.annotation is None and argument.arg not in ("self", "cls")
        ]
        assert not bare, f"{node.name}: {bare}"
        assert node.returns is not None, f"{node.name}: return type"


def test_every_folder_with_code_is_packed() -> None:
    """A room without __init__.py, or one that packaging misses, would not be in the wheel."""
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())
    find = project["tool"]["setuptools"]["packages"]["find"]
    found = find_packages(str(ROOT), include=find["include"])
    for package in ("tritonloss", "kernels_reference"):
        folders = {path.parent for path in (ROOT / package).rglob("*.py")}
        assert {".".join(folder.relative_to(ROOT).parts) for folder in folders} <= set(found)
    assert not [name for name in found if not name.startswith(("tritonloss", "kernels_reference"))]


def test_mypy_checks_everything_in_full_but_device_code() -> None:
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())
    overrides = project["tool"]["mypy"]["overrides"]
    loose = [name for each in overrides if "check_untyped_defs" in each for name in each["module"]]
    with_kernels = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "tritonloss").rglob("*.py")
        if "triton.jit" in path.read_text()
    }
    assert set(loose) == with_kernels

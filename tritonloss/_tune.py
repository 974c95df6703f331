"""Measure launch configurations on the GPU at hand and write the user's tuned file.

A candidate that does not compile, or that disagrees with the first one (the heuristic's own, which
the tests hold to the reference), is dropped and reported; of the rest the fastest is kept. The file
is replaced atomically after every case, so that an interruption keeps what was tuned.
"""

from __future__ import annotations

import importlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import triton
from triton.testing import do_bench

import tritonloss

from . import _tuning
from ._backend import INTERPRETED
from ._tuning import Configuration, TuningCase

SLICES = (
    "gaussian_window",
    "structural_similarity",
    "ssim",
    "region_mutual_information",
    "linalg",
    "pixelwise",
    "margin_calibration",
)

# Candidates differ in the order of their sums, not in their mathematics.
_TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 4e-2, torch.float32: 1e-3, torch.float64: 1e-6}

Timer = Callable[[Callable[[], Any]], float]


@dataclass
class Outcome:
    """A case's candidates: milliseconds of those measured, the reasons of those dropped."""

    measured: list[tuple[float, Configuration]] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    @property
    def best(self) -> tuple[float, Configuration]:
        return min(self.measured, key=lambda pair: pair[0])


def tuning_cases(operator: str | None = None) -> list[TuningCase]:
    """The cases of every slice, or of one operator.

    Raises:
        ValueError: no slice has an operator of that name.
    """
    cases: list[TuningCase] = []
    for name in SLICES:
        cases += importlib.import_module(f"tritonloss.{name}").tuning_cases()
    if operator is None:
        return cases
    selected = [case for case in cases if case.operator == operator]
    if not selected:
        known = ", ".join(sorted({case.operator for case in cases}))
        raise ValueError(f"--op must be one of {known}; got {operator!r}")
    return selected


def tune(
    operator: str | None, budget: float | None, out: Path | None, say: Callable[[str], None]
) -> int:
    """Tune every case on the current GPU; the exit status of ``python -m tritonloss tune``."""
    device = _gpu()
    if device is None:
        say(f"tune needs a GPU that torch can use, and there is none ({_what_is_missing()}).")
        return 1
    name = _tuning.device_name(device)
    path = out or _tuning.tuned_files(name)[0]
    try:
        cases = tuning_cases(operator)
        write_entries(path, name, {})
    except ValueError as error:
        say(str(error))
        return 1
    except OSError as error:
        say(f"cannot write {path}: {error}. --out or TRITONLOSS_CACHE_DIR choose another place.")
        return 1
    say(f"tuning {len(cases)} cases on {name} into {path}")
    failed: list[str] = []
    try:
        failed = _tune_cases(cases, device, budget, path, say)
    except KeyboardInterrupt:
        say(f"interrupted; what was tuned so far is in {path}")
        return 130
    finally:
        _tuning.forget()
    say(f"tuned: {path}")
    if failed:
        say(f"no candidate runs for {', '.join(failed)}")
    return 1 if failed else 0


def tune_case(case: TuningCase, device: torch.device, seconds: float, timer: Timer) -> Outcome:
    """Measure the candidates that run and agree with the first, while ``seconds`` last."""
    deadline = time.monotonic() + seconds
    outcome = Outcome()
    expected: list[torch.Tensor] | None = None
    launch: Callable[[], Any] | None = None
    for candidate in case.candidates:
        if outcome.measured and time.monotonic() > deadline:
            break
        try:
            launch = launch or case.run(device)
            with _tuning.forced(case.operator, candidate):
                result = tensors(launch())
                if expected is not None and (reason := disagreement(result, expected)):
                    outcome.dropped.append(f"{candidate}: {reason}")
                    continue
                outcome.measured.append((timer(launch), candidate))
        except Exception as error:  # whatever a compiler or a driver may raise
            outcome.dropped.append(f"{candidate}: {type(error).__name__}: {_first_line(error)}")
            continue
        if expected is None:
            expected = [tensor.clone() for tensor in result]
    return outcome


def tensors(result: object) -> list[torch.Tensor]:
    """The floating-point tensors in what a launch returned."""
    if isinstance(result, torch.Tensor):
        return [result] if result.is_floating_point() else []
    if isinstance(result, (tuple, list)):
        return [tensor for part in result for tensor in tensors(part)]
    return []


def disagreement(result: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> str | None:
    """Why two results are not the same up to rounding; None if they are."""
    if [tensor.shape for tensor in result] != [tensor.shape for tensor in expected]:
        return "wrong: other shapes than the first candidate"
    for actual, wanted in zip(result, expected, strict=True):
        if wanted.numel() == 0:
            continue
        # A non-finite difference fails the comparison, as it should.
        exact = torch.promote_types(wanted.dtype, torch.float32)
        scale = float(wanted.abs().max())
        difference = float((actual.to(exact) - wanted.to(exact)).abs().max())
        if not difference <= _TOLERANCE[wanted.dtype] * scale:
            return f"wrong: differs from the first candidate by {difference:.3g} (of {scale:.3g})"
    return None


def write_entries(path: Path, name: str, entries: dict[str, Any]) -> None:
    """Lay ``entries`` over those of the file at ``path`` and replace it in one step."""
    try:
        kept = _tuning.read_document(path, name)["entries"]
    except (FileNotFoundError, _tuning.UnusableFileError):
        kept = {}
    document = {
        "schema": _tuning.SCHEMA,
        "gpu": name,
        "triton": triton.__version__,
        "tritonloss": tritonloss.__version__,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "entries": dict(sorted({**kept, **entries}.items())),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".draft")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=1)
            file.write("\n")
        os.chmod(draft, 0o644)
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise


def _tune_cases(
    cases: list[TuningCase],
    device: torch.device,
    budget: float | None,
    path: Path,
    say: Callable[[str], None],
) -> list[str]:
    """Tune case after case, each with its share of the time left; the keys of those that failed."""
    name = _tuning.device_name(device)
    deadline = time.monotonic() + budget if budget is not None else float("inf")
    failed: list[str] = []
    for index, case in enumerate(cases):
        left = deadline - time.monotonic()
        if left <= 0:
            say(f"the budget of {budget:g} s is spent; {len(cases) - index} cases are left out")
            break
        outcome = tune_case(case, device, left / (len(cases) - index), _median_ms)
        say(f"[{index + 1}/{len(cases)}] {case.key}: {_summary(outcome)}")
        for reason in outcome.dropped:
            say(f"    dropped {reason}")
        if outcome.measured:
            ms, configuration = outcome.best
            entry = {"configuration": configuration, "ms": round(ms, 6)}
            write_entries(path, name, {case.key: entry})
        else:
            failed.append(case.key)
    return failed


def _summary(outcome: Outcome) -> str:
    if not outcome.measured:
        return "no candidate runs"
    ms, configuration = outcome.best
    gain = outcome.measured[0][0] / ms
    return (
        f"{ms:.4f} ms, {gain:.2f}x as fast as the first of {len(outcome.measured)}: {configuration}"
    )


def _median_ms(launch: Callable[[], Any]) -> float:
    return float(do_bench(launch, warmup=10, rep=50, return_mode="median"))


def _gpu() -> torch.device | None:
    if INTERPRETED:
        return None
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        return torch.device("xpu", torch.xpu.current_device())
    return None


def _what_is_missing() -> str:
    if INTERPRETED:
        return "TRITON_INTERPRET=1 replaces the GPU kernels"
    return f"torch {torch.__version__} sees no CUDA, ROCm or XPU device"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]

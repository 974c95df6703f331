"""Measure launch configurations on the GPU at hand and write the user's tuned file.

Candidates are compiled first (``sieve.py``). One that does not compile, spills or asks for too much
shared memory is dropped. So is one that disagrees with the heuristic's result, which the tests
compare with the reference. Of the others the fastest is kept, by the time that a CUDA graph of its
launches takes. The file is replaced in one step after every case, so that an interruption keeps
what was tuned. In the end the winners are checked for other numbers of classes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton

from .._core import configurations
from .._core.backend import INTERPRETED
from .._core.configurations import Configuration, Shape, TuningCase, bucket_of
from .._core.progress import Progress
from .._core.source_hash import source_hash
from . import tuned_files
from .launches import Launch, recorded
from .sieve import Sieve
from .stopping import ended_in_order
from .timing import LAUNCHES, Timed
from .timing import median_ms as _median_ms
from .tuning_cases import sized, tuning_cases

# Relative to the largest element: candidates differ in the order of sums, not in mathematics.
_TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 4e-2, torch.float32: 1e-3, torch.float64: 1e-6}
# Numbers of classes for which a winner is checked too. It may be used for all buckets in between.
_REACH = (1, 256)
# Every case gets its share of the budget, but at least this, to measure a few candidates.
_LEAST_SECONDS = 1.0

Say = Callable[[str], None]
Tuned = tuple[TuningCase, dict[str, Any]]  # a case, and its entry
Timer = Callable[[Callable[[], Any]], Timed]


@dataclass(frozen=True)
class Request:
    """The options of ``python -m tritonloss tune``; None is everything, or no limit."""

    operator: str | None = None
    shapes: Sequence[Shape] | None = None
    budget: float | None = None
    resume: bool = False
    out: Path | None = None
    first: bool = False


@dataclass
class Outcome:
    """A case's candidates: milliseconds of those measured, the reasons of those dropped.

    ``timers`` says how each was measured.
    """

    measured: list[tuple[float, Configuration]] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    timers: list[str] = field(default_factory=list)

    @property
    def best(self) -> tuple[float, Configuration]:
        return min(self.measured, key=lambda pair: pair[0])


def tune(request: Request, say: Say) -> int:
    """The exit status of ``python -m tritonloss tune``, which tunes all cases on this GPU."""
    device = _gpu()
    if device is None:
        say(
            f"tune needs a GPU that torch can use, and there is none ({_what_is_missing()}). "
            "In a checkout of the repository, python -m perf predict ranks candidates without one."
        )
        return 1
    name = configurations.device_name(device)
    path = request.out or configurations.tuned_files(name)[0]
    try:
        cases = tuning_cases(request.operator, request.shapes, request.first)
        tuned_files.write_entries(path, name, {})
    except ValueError as error:
        say(str(error))
        return 1
    except OSError as error:
        say(f"cannot write {path}: {error}. --out or TRITONLOSS_CACHE_DIR choose another place.")
        return 1
    unchecked: list[Tuned] = []
    if request.resume:
        cases, unchecked = _left_to_do(cases, path, name)
    say(f"tuning {len(cases)} cases on {name} into {path}")
    failed: list[str] = []
    try:
        with ended_in_order():
            failed = _tune_cases(cases, unchecked, device, request.budget, path, say)
    except KeyboardInterrupt:
        say(f"interrupted; what was tuned so far is in {path}, and --resume goes on from there")
        return 130
    finally:
        configurations.forget()
    say(f"tuned: {path}")
    if failed:
        say(f"no candidate runs for {', '.join(failed)}")
    return 1 if failed else 0


def export(source: Path | None, say: Say) -> int:
    """The exit status of ``tune --export``, which writes a tuned file for shipping."""
    if source is None:
        device = _gpu()
        if device is None:
            say(f"--export needs the name of a tuned file, or a GPU ({_what_is_missing()})")
            return 1
        source = configurations.tuned_files(configurations.device_name(device))[0]
    try:
        path = tuned_files.export(source, configurations.SHIPPED_DIRECTORY)
    except (OSError, configurations.UnusableFileError) as error:
        say(f"cannot export {source}: {error}")
        return 1
    say(f"exported: {path}")
    return 0


def tune_case(
    case: TuningCase,
    device: torch.device,
    seconds: float,
    timer: Timer,
    faults: Sequence[str | None] | None = None,
) -> Outcome:
    """The outcome of measuring the candidates that run and agree with the heuristic.

    Once one is measured, none is begun after ``seconds``. ``faults`` are reasons, known beforehand,
    to drop a candidate.
    """
    deadline = time.monotonic() + seconds
    outcome = Outcome()
    try:
        launch = case.run(device)
    except Exception as error:  # whatever a driver may raise
        outcome.dropped.append(f"the inputs: {_described(error)}")
        return outcome
    expected, spills = _heuristic_result(case, launch)
    for candidate, fault in zip(case.candidates, faults or [None] * 999, strict=False):
        if outcome.measured and time.monotonic() > deadline:
            break
        if fault:
            outcome.dropped.append(f"{candidate}: {fault}")
            continue
        try:
            with configurations.forced(case.operator, candidate):
                with recorded("run") as launches:
                    result = tensors(launch())
                reason = disagreement(result, expected) if expected is not None else None
                if reason is None and _spills(launches) > spills:
                    reason = "spills registers"
                if reason:
                    outcome.dropped.append(f"{candidate}: {reason}")
                    continue
                if expected is None:
                    expected = [tensor.clone() for tensor in result]
                ms, how = timer(launch)
                outcome.measured.append((ms, candidate))
                outcome.timers.append(how)
        except Exception as error:  # whatever a compiler or a driver may raise
            outcome.dropped.append(f"{candidate}: {_described(error)}")
    return outcome


def reach(case: TuningCase, configuration: Configuration, device: torch.device) -> list[int]:
    """The buckets of classes for which the configuration was checked, its own among them."""
    checked = [bucket_of(case.classes)]
    for other in _within_reach(case):
        try:
            launch = other.run(device)
            expected, spills = _heuristic_result(other, launch)
            with configurations.forced(case.operator, configuration), recorded("run") as launches:
                agrees = expected is not None and not disagreement(tensors(launch()), expected)
            agrees = agrees and _spills(launches) <= spills
        except Exception:  # it may be too large for this GPU: then it is not checked
            continue
        if agrees:
            checked.append(bucket_of(other.classes))
    return sorted(checked)


def _within_reach(case: TuningCase) -> list[TuningCase]:
    """The case for the numbers of classes in _REACH, if it can be sized for them."""
    others = [sized(case, (1, classes, 130, 1024), case.layout) for classes in _REACH]
    own = bucket_of(case.classes)
    return [other for other in others if other and bucket_of(other.classes) != own]


def tensors(result: object) -> list[torch.Tensor]:
    """The tensors in what a launch returned."""
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, (tuple, list)):
        return [tensor for part in result for tensor in tensors(part)]
    return []


def disagreement(result: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> str | None:
    """Why two results differ by more than rounding, or counts at all; None if they do not."""
    if [tensor.shape for tensor in result] != [tensor.shape for tensor in expected]:
        return "wrong: other shapes than the heuristic's"
    for actual, wanted in zip(result, expected, strict=True):
        if wanted.numel() == 0:
            continue
        # A non-finite difference fails the comparison, as it should.
        is_count = not wanted.is_floating_point()
        exact = torch.float64 if is_count else torch.promote_types(wanted.dtype, torch.float32)
        scale = float(wanted.abs().max())
        difference = float((actual.to(exact) - wanted.to(exact)).abs().max())
        if not difference <= (0.0 if is_count else _TOLERANCE[wanted.dtype]) * scale:
            return f"wrong: differs from the heuristic by {difference:.3g} (of {scale:.3g})"
    return None


def _heuristic_result(
    case: TuningCase, launch: Callable[[], Any]
) -> tuple[list[torch.Tensor] | None, int]:
    """(result, spilled registers) of the heuristic's configuration; (None, 0) if it cannot run."""
    try:
        with configurations.forced(case.operator, {}), recorded("run") as launches:
            result = [tensor.clone() for tensor in tensors(launch())]
    except Exception:  # then candidates are compared with the first that runs
        return None, 0
    return result, _spills(launches)


def _spills(launches: Sequence[Launch]) -> int:
    """The registers that the driver says are spilled, in all kernels that were launched."""
    return sum(getattr(record.compiled, "n_spills", None) or 0 for record in launches)


def _left_to_do(
    cases: list[TuningCase], path: Path, name: str
) -> tuple[list[TuningCase], list[Tuned]]:
    """(cases to tune, winners that are still to be checked for other numbers of classes)."""
    known = tuned_files.current_entries(path, name)
    series = triton.__version__.split(".")[:2]
    done = {
        key: entry
        for key, entry in known.items()
        if str(entry.get("triton")).split(".")[:2] == series
    }
    unchecked = [
        (case, done[case.key])
        for case in cases
        if case.key in done and len(done[case.key].get("checked", [])) < 2
    ]
    return [case for case in cases if case.key not in done], unchecked


def _tune_cases(
    cases: list[TuningCase],
    unchecked: list[Tuned],
    device: torch.device,
    budget: float | None,
    path: Path,
    say: Say,
) -> list[str]:
    """The keys of the cases that failed; tunes all, each with its share of the time left."""
    name = configurations.device_name(device)
    deadline = time.monotonic() + budget if budget is not None else math.inf
    failed: list[str] = []
    sieve = _sieve(cases, device)
    for case, entry in unchecked:
        _prepare_reach(case, entry, sieve)
    bar = Progress(len(cases), budget_s=budget)
    try:
        for index, case in enumerate(cases):
            bar.announce(case.key)
            faults = sieve.faults(case, deadline) if sieve else [None] * len(case.candidates)
            left = deadline - time.monotonic()
            if left <= 0 or faults is None:
                bar.clear()
                say(f"the budget of {budget:g} s is spent; {len(cases) - index} cases are left out")
                break
            share = max(left / (len(cases) - index), _LEAST_SECONDS)
            outcome = tune_case(case, device, share, _median_ms, faults)
            bar.clear()
            _report(f"[{index + 1}/{len(cases)}] {case.key}", outcome, say)
            if outcome.measured:
                entry = _entry(case, outcome)
                tuned_files.write_entries(path, name, {case.key: entry})
                unchecked.append((case, entry))
                _prepare_reach(case, entry, sieve)
            else:
                failed.append(case.key)
            bar.step(case.key)
        for case, entry in unchecked:
            bar.announce(f"{case.key} for other numbers of classes")
            if sieve and not sieve.prepared(case.key, deadline) or time.monotonic() > deadline:
                break
            entry["checked"] = reach(case, entry["configuration"], device)
            tuned_files.write_entries(path, name, {case.key: entry})
    finally:
        if sieve:
            sieve.close()
        bar.close()
    return failed


def _prepare_reach(case: TuningCase, entry: dict[str, Any], sieve: Sieve | None) -> None:
    """Begin to compile a winner for the other numbers of classes that it is checked for."""
    if sieve:
        sieve.prepare(case.key, _within_reach(case), entry["configuration"])


def _sieve(cases: Sequence[TuningCase], device: torch.device) -> Sieve | None:
    """The pool that compiles for this GPU; None where only the launch can tell."""
    if device.type == "cpu":
        return None
    driver = triton.runtime.driver.active
    if driver.get_current_target().backend not in ("cuda", "hip"):
        return None
    limit = driver.utils.get_device_properties(device.index or 0)["max_shared_mem"]
    return Sieve(cases, driver.get_current_target(), int(limit))


def _entry(case: TuningCase, outcome: Outcome) -> dict[str, Any]:
    """The entry of a case in the tuned file."""
    ms, configuration = outcome.best
    return {
        "configuration": configuration,
        "ms": round(ms, 6),
        "timer": _timers(outcome),
        "checked": [bucket_of(case.classes)],
        "slice": case.slice,
        "source": source_hash(case.slice),
        "triton": triton.__version__,
        "timings": [{"ms": round(ms, 6), **tried} for ms, tried in _sorted(outcome)],
        "dropped": outcome.dropped,
    }


def _timers(outcome: Outcome) -> str:
    """How the case was timed: in one way, or in two if some candidates could not be captured."""
    return "; ".join(dict.fromkeys(outcome.timers))


def _sorted(outcome: Outcome) -> list[tuple[float, Configuration]]:
    """What was measured, the fastest first."""
    return sorted(outcome.measured, key=lambda pair: pair[0])


def _report(title: str, outcome: Outcome, say: Say) -> None:
    """Say what was measured for a case, and why candidates were dropped."""
    say(f"{title}: {_summary(outcome)}")
    if LAUNCHES in outcome.timers:
        say(f"    timed by {_timers(outcome)}: no graph could be captured")
    for reason in outcome.dropped:
        say(f"    dropped {reason}")


def _summary(outcome: Outcome) -> str:
    if not outcome.measured:
        return "no candidate runs"
    ms, configuration = outcome.best
    gain = outcome.measured[0][0] / ms
    return (
        f"{ms:.4f} ms, {gain:.2f}x as fast as the first of {len(outcome.measured)}: {configuration}"
    )


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


def _described(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"

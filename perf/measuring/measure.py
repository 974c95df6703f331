"""Rows of one case: every provider past its parity gate, then timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from perf.measuring.machine import Machine
from perf.measuring.memory import peak_bytes
from perf.measuring.parity import Gate, Verdict
from perf.measuring.rows import Row
from perf.measuring.timing import time_backward, time_call
from perf.measuring.trial import Trial
from perf.operations.contract import PASSES, Case, Operation, Outputs, UnknownCaseError, scheduled
from tritonloss._tools.launches import recorded

PARITY_FAILED = "not timed: parity failed"
NO_GRADIENT = "there is no gradient"
OURSELVES = ("triton", "eager", "compile")
_MIB = 2**20


class DeviceLostError(Exception):
    """The GPU answers nothing any more in this process: a kernel went astray."""


@dataclass(frozen=True)
class Bench:
    """Where the measurements are made, and the bandwidth that they are compared with.

    `yardsticks` keeps the errors of the reference in the case's own dtype: they are eager's errors.
    """

    machine: Machine
    copy_GBps: float  # noqa: N815
    yardsticks: dict[tuple[str, str], Verdict] = field(default_factory=dict)

    def rows(
        self, operation: Operation, case: Case, providers: Mapping[str, Callable[..., Outputs]]
    ) -> Iterator[Row]:
        """One row per provider and pass, as they come.

        The row of a provider without parity has its error and no time.

        Raises:
            DeviceLostError: a provider broke the GPU for this process; its rows have come.
        """
        gates: list[Gate] = []  # holds one gate, once a provider has needed it
        with scheduled(operation, case):
            for provider, function in providers.items():
                if not self._is_known(operation, case, provider, function):
                    continue
                common = {"op": operation.name, "provider": provider, **case.columns()}
                common |= self.machine.columns
                missing = list(PASSES)
                try:
                    verdict = self._judge(operation, case, provider, function, gates)
                    for row in self._rows(operation, case, provider, function, verdict):
                        missing.remove(row["pass"])
                        yield common | row
                except Exception as error:  # a provider's trouble is a finding, not the end
                    reason = f"not timed: {type(error).__name__}"
                    yield from (common | {"pass": name, "timer": reason} for name in missing)
                    self._look_after_the_device(error)

    def _is_known(
        self, operation: Operation, case: Case, provider: str, function: Callable[..., Outputs]
    ) -> bool:
        """Whether a library has this case: it is called on a tiny map, before truth is computed."""
        if provider in OURSELVES:
            return True
        tiny = case.tiny()
        try:
            Trial(function, tiny, operation.inputs(tiny, self.machine.device)).forward()
        except UnknownCaseError:
            return False
        except Exception:  # at the case's own size it becomes a row that says so
            return True
        return True

    def _judge(
        self,
        operation: Operation,
        case: Case,
        provider: str,
        function: Callable[..., Outputs],
        gates: list[Gate],
    ) -> tuple[Verdict, str]:
        """How wrong the function is, and the configurations of the kernels it launched."""
        named = operation.name, case.text
        if provider == "eager" and named in self.yardsticks:
            return self.yardsticks[named], ""
        if not gates:
            gates.append(self._gate(operation, case))
            self.yardsticks[named] = gates[0].yardstick
        if provider == "eager":
            return self.yardsticks[named], ""
        with recorded("run") as launches:
            verdict = gates[0].judge(function)
        configurations = dict.fromkeys(f"{x.kernel} {x.configuration}" for x in launches)
        return verdict, "; ".join(configurations)

    def _gate(self, operation: Operation, case: Case) -> Gate:
        try:
            return Gate(operation, case, self.machine.device)
        except torch.OutOfMemoryError:
            # float64 does not fit into memory: the same question is asked about a smaller map.
            return Gate(operation, case.reduced(), self.machine.device)

    def _look_after_the_device(self, error: Exception) -> None:
        if self.machine.has_gpu:
            try:
                torch.cuda.synchronize(self.machine.device)
            except Exception:
                raise DeviceLostError(f"{type(error).__name__}: {error}") from error

    def _rows(
        self,
        operation: Operation,
        case: Case,
        provider: str,
        function: Callable[..., Outputs],
        judged: tuple[Verdict, str],
    ) -> Iterator[Row]:
        verdict, configurations = judged
        answer: Row = {"max_error": verdict.error, "launch_config": configurations}
        if not verdict.passed:
            yield from ({"pass": name, "timer": PARITY_FAILED, **answer} for name in PASSES)
            return
        # Counting tensors would make torch.compile fall back to eager on a CPU.
        counted = self.machine.has_gpu or provider == "eager"
        trial = Trial(function, case, operation.inputs(case, self.machine.device))
        for name in PASSES:
            if name == "backward" and not operation.differentiable:
                yield {"pass": name, "timer": NO_GRADIENT, **answer}
                continue
            row = {"pass": name, **answer, **self._times(operation, case, trial, name)}
            # What the backward pass holds was mostly allocated by the forward pass: see "full".
            if counted and name != "backward":
                step = trial.forward if name == "forward" else trial.full
                row["peak_delta_MiB"] = peak_bytes(step, self.machine.device) / _MIB
            yield row

    def _times(self, operation: Operation, case: Case, trial: Trial, name: str) -> Row:
        device = self.machine.device
        if name == "backward":
            timing = time_backward(trial.forward, trial.backward, device)
        else:
            timing = time_call(trial.forward if name == "forward" else trial.full, device)
        floor = operation.floor(case).of(name)
        bandwidth = floor / timing.p50 / 1e6
        return {
            "ms_p50": timing.p50,
            "ms_p20": timing.p20,
            "ms_p80": timing.p80,
            "timer": timing.timer,
            "bytes_floor": floor,
            "GBps": bandwidth,
            "share_of_copy": bandwidth / self.copy_GBps,
        }


def kernels(operation: Operation) -> dict[str, Callable[..., Outputs]]:
    """The kernels themselves, which need a GPU."""
    return {"triton": operation.function}


def others(operation: Operation) -> dict[str, Callable[..., Outputs]]:
    """Eager PyTorch, and the libraries that are installed."""
    found: dict[str, Callable[..., Outputs]] = {"eager": operation.reference}
    for name, load in operation.libraries.items():
        try:
            found[name] = load()
        except ImportError:
            continue
    return found


def compiled(operation: Operation) -> dict[str, Callable[..., Outputs]]:
    """The reference under torch.compile, with a graph of its own for every case.

    With dynamic shapes it would be slower. Its parity check, at the case's own size, compiles it
    before anything is timed.
    """
    torch._dynamo.reset()
    return {"compile": torch.compile(operation.reference, dynamic=False)}

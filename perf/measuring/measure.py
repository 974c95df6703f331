"""Rows of one case: every provider past its parity gate, then timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from perf.measuring.machine import Machine
from perf.measuring.memory import peak_bytes
from perf.measuring.parity import Gate
from perf.measuring.rows import Row
from perf.measuring.timing import time_backward, time_call
from perf.measuring.trial import Trial
from perf.operations.contract import PASSES, Case, Operation, Outputs, UnknownCaseError, scheduled
from tritonloss._tools.launches import recorded

PARITY_FAILED = "not timed: parity failed"
_MIB = 2**20


@dataclass(frozen=True)
class Bench:
    """Where the measurements are made, and the bandwidth that they are compared with."""

    machine: Machine
    copy_GBps: float  # noqa: N815

    def rows(
        self, operation: Operation, case: Case, providers: Mapping[str, Callable[..., Outputs]]
    ) -> list[Row]:
        """One row per provider and pass. Without parity a row carries its error and no time."""
        with scheduled(operation, case):
            gate = self._gate(operation, case)
            rows = []
            for provider, function in providers.items():
                common = {"op": operation.name, "provider": provider, **case.columns()}
                common |= self.machine.columns
                try:
                    # Counting tensors would make torch.compile fall back to eager on a CPU.
                    counted = self.machine.has_gpu or provider == "eager"
                    rows += [
                        common | row for row in self._rows(operation, case, gate, function, counted)
                    ]
                except Exception as error:  # a provider's trouble is a finding, not the end
                    if provider in operation.libraries and isinstance(error, UnknownCaseError):
                        continue  # a library that does not know this case
                    reason = f"not timed: {type(error).__name__}"
                    rows += [common | {"pass": name, "timer": reason} for name in PASSES]
            return rows

    def _gate(self, operation: Operation, case: Case) -> Gate:
        try:
            return Gate(operation, case, self.machine.device)
        except torch.OutOfMemoryError:
            # float64 does not fit: the same question about a smaller map.
            return Gate(operation, case.reduced(), self.machine.device)

    def _rows(
        self,
        operation: Operation,
        case: Case,
        gate: Gate,
        function: Callable[..., Outputs],
        counted: bool,
    ) -> Iterator[Row]:
        with recorded("run") as launches:
            verdict = gate.judge(function)
        configuration = dict.fromkeys(f"{x.kernel} {x.configuration}" for x in launches)
        answer: Row = {"max_error": verdict.error, "launch_config": "; ".join(configuration)}
        if not verdict.passed:
            yield from ({"pass": name, "timer": PARITY_FAILED, **answer} for name in PASSES)
            return
        trial = Trial(function, case, operation.inputs(case, self.machine.device))
        for name in PASSES:
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


def providers(
    operation: Operation, on_gpu: bool, against_compile: bool
) -> dict[str, Callable[..., Outputs]]:
    """Who answers: the kernels on a GPU, eager PyTorch, torch.compile, installed libraries."""
    found: dict[str, Callable[..., Outputs]] = {}
    if on_gpu:
        found["triton"] = operation.function
    found["eager"] = operation.reference
    if against_compile:
        # A graph of its own for every case: with dynamic shapes torch.compile would be slower.
        torch._dynamo.reset()
        found["compile"] = torch.compile(operation.reference, dynamic=False)
    for name, load in operation.libraries.items():
        try:
            found[name] = load()
        except ImportError:
            continue
    return found

"""Rows, kernels' facts and reports that the tests of perf are made with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from perf.compiling.counting import Counts, LoopFacts
from perf.compiling.facts import KernelFacts
from perf.measuring import rows
from perf.measuring.counted import CountedMemory
from perf.measuring.interpreted import Parity
from perf.measuring.machine import Machine
from perf.measuring.measure import PARITY_FAILED
from perf.operations.contract import (
    Case,
    Operation,
    Shape,
    operations,
)
from perf.report.goals import Finding
from perf.report.report import Report

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
NAMES = [operation.name for operation in operations()]


def small(operation: Operation) -> Case:
    case = operation.cases[0]
    if type(case.shape) is not Shape:
        return case.tiny()
    return replace(case, shape=replace(case.shape, batch=1, classes=3, height=9, width=13))


def row(**values: Any) -> rows.Row:
    measured = {
        "op": "loss", "provider": "triton", "pass": "full", "dtype": "float32",
        "layout": "contiguous", "batch": 4, "classes": 19, "height": 1024, "width": 2048,
        "parameters": "window_size=3", "ms_p50": 1.0, "ms_p20": 0.9, "ms_p80": 1.1,
        "timer": "do_bench", "peak_delta_MiB": 100.0, "bytes_floor": 10, "GBps": 2000.0,
        "share_of_copy": 0.5, "max_error": 1e-7, "gpu": "GPU", "capability": "9.0",
        "utc": "2026-01-01T00:00:00Z",
    }  # fmt: skip
    return {**dict.fromkeys(rows.FIELDS), **measured, **values}


def machine(device: torch.device = CPU) -> Machine:
    gpu = device.type != "cpu"
    return Machine(
        device=device, gpu="Some GPU" if gpu else "no GPU (a processor)",
        capability="9.0" if gpu else None, driver="1" if gpu else None,
        cuda="13" if gpu else None, torch="2", triton="3", tritonloss="0.1", commit=None,
        utc="2026-01-01T00:00:00Z",
    )  # fmt: skip


def counted(rows: float, once: float = 2.0) -> Counts:
    return Counts(once, (LoopFacts("rows", rows, rows),), (("total", rows + once),))


def fact(**values: Any) -> KernelFacts:
    common: dict[str, Any] = {
        "op": "gaussian_statistics", "case": "cityscapes float32 contiguous window_size=3",
        "target": "sm_90", "kernel": "_gaussian_statistics_forward_kernel",
        "configuration": "COLUMNS=4", "constants": {"WINDOW.size": 3}, "registers": 40,
        "occupancy": 0.5, "instructions": 300, "counts": counted(25.0),
    }  # fmt: skip
    return KernelFacts(**{**common, **values})


def offline_report(**changes: Any) -> Report:
    made = Report(
        machine(), 10.0,
        parity=[Parity("loss", "float32 <odd>", 1e-7, 1e-5, True)],
        memory=[
            CountedMemory("loss", "cityscapes float32", 100, 1700, 100, 19, 10),
            CountedMemory("loss", "ade20k float32", 400, 6800, 400, 150, 5),
        ],
        facts=[fact(), fact(constants={"WINDOW.size": 5}, case="cityscapes float32 contiguous b")],
        goals=[Finding("a goal", "at least 1", None, None, "loss")],
        rows=rows.with_comparisons([row(provider="eager", gpu="no GPU", capability=None)]),
    )  # fmt: skip
    return replace(made, **changes)


def gpu_report() -> Report:
    eager = row(provider="eager", ms_p50=12.0, peak_delta_MiB=1700.0)
    losing = row(parameters="window_size=9", ms_p50=3.0, max_error=2e-7)
    fast = row(parameters="window_size=9", provider="eager", ms_p50=2.0)
    failed = row(parameters="window_size=7", ms_p50=None, timer=PARITY_FAILED, share_of_copy=None)
    measured = rows.with_comparisons([row(), eager, losing, fast, failed])
    return replace(offline_report(), machine=machine(torch.device("cuda")), rows=measured)

"""Tuned files and tuning cases that the tests of tuning are made with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tritonloss
from tritonloss._core import configurations
from tritonloss._core.source_hash import source_hash
from tritonloss._tools import tuner
from tritonloss._tools.timing import GRAPH, Timed

CPU = torch.device("cpu")
HEURISTIC: configurations.Configuration = {"LANES": 32, "ROWS": 16, "num_warps": 4}
TUNED: configurations.Configuration = {"LANES": 64, "ROWS": 8, "num_warps": 2}
ENTRY = configurations.key("some_forward", 19, 3, torch.float32, "contiguous")
SLICE = "windows.gaussian_statistics"
ROOT = Path(__file__).parents[2]


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


def rows_as_time(launch: Callable[[], Any]) -> Timed:
    launch()
    return Timed(float(ask()["ROWS"]), GRAPH)


def offer(monkeypatch: pytest.MonkeyPatch, *cases: configurations.TuningCase) -> None:
    monkeypatch.setattr(tuner, "tuning_cases", lambda operator, shapes, first: list(cases))


def interrupted(device: torch.device) -> Callable[[], Any]:
    raise KeyboardInterrupt

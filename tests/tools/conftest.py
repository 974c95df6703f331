"""A process that has read no tuned file, and the CPU in place of a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tools.tuned import (
    CPU,
    rows_as_time,
)
from tritonloss._core import configurations
from tritonloss._tools import tuner


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory, and a process that has read no tuned file."""
    monkeypatch.setenv("TRITONLOSS_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITONLOSS_TUNING", raising=False)
    monkeypatch.setattr(configurations, "_tables", {})
    monkeypatch.setattr(configurations, "_resolved", {})
    return tmp_path


@pytest.fixture
def stub_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU in place of a GPU, and launches that say how long they take."""
    monkeypatch.setattr(tuner, "_gpu", lambda: CPU)
    monkeypatch.setattr(tuner, "_median_ms", rows_as_time)

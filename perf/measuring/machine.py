"""What the measurements ran on."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

import tritonloss
from perf.measuring.rows import Row

_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Machine:
    """The device and the versions that a row was measured with.

    `gpu` names the processor where there is no GPU, so that rows of the two never mix.
    """

    device: torch.device
    gpu: str
    capability: str | None
    driver: str | None
    cuda: str | None
    torch: str
    triton: str
    tritonloss: str
    commit: str | None
    utc: str

    @property
    def has_gpu(self) -> bool:
        return self.device.type != "cpu"

    @property
    def columns(self) -> Row:
        """The columns of every row."""
        names = (
            "gpu", "capability", "driver", "cuda", "torch", "triton", "tritonloss", "commit", "utc",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}


def this_machine() -> Machine:
    """The first GPU, or the CPU where there is no GPU, with all versions."""
    gpu = torch.cuda.is_available()
    return Machine(
        device=torch.device("cuda", 0) if gpu else torch.device("cpu"),
        gpu=torch.cuda.get_device_name(0) if gpu else f"no GPU ({_processor()})",
        capability=".".join(map(str, torch.cuda.get_device_capability(0))) if gpu else None,
        driver=_driver() if gpu else None,
        cuda=torch.version.cuda or torch.version.hip if gpu else None,
        torch=torch.__version__,
        triton=triton.__version__,
        tritonloss=tritonloss.__version__,
        commit=_commit(),
        utc=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )


def _processor() -> str:
    cores = f"{os.cpu_count()} cores"
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, {cores}"
    except OSError:
        pass  # not Linux
    return f"{platform.processor() or platform.machine()}, {cores}"


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = _answer(query)
    return answer.splitlines()[0] if answer else None


def _commit() -> str | None:
    """The commit, with a plus where files differ from it; None outside a repository."""
    commit = _answer(["git", "-C", str(_ROOT), "rev-parse", "--short=12", "HEAD"])
    if not commit:
        return None
    return commit + ("+" if _answer(["git", "-C", str(_ROOT), "status", "--porcelain"]) else "")


def _answer(command: list[str]) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None

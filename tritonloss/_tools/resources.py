"""What a compiled kernel takes of a GPU: registers, spilled bytes, shared memory."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton


@dataclass(frozen=True)
class Resources:
    """Registers and spilled bytes per thread, shared bytes per block, of one compiled kernel."""

    registers: int
    spill_bytes: int
    shared_bytes: int

    def fault(self, shared_limit: int) -> str | None:
        """Why such a kernel must not be launched; None if it may."""
        if self.spill_bytes:
            return f"spills {self.spill_bytes} B"
        if self.shared_bytes > shared_limit:
            return f"needs {self.shared_bytes} of {shared_limit} B shared"
        return None


def resources(compiled: Any) -> Resources | None:
    """The resources of a compiled kernel; None where nothing tells them (Intel GPUs)."""
    shared = int(compiled.metadata.shared)
    if "cubin" in compiled.asm:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernel.cubin"
            path.write_bytes(compiled.asm["cubin"])
            return Resources(*nvidia_usage(cuobjdump("--dump-resource-usage", path)), shared)
    if "amdgcn" in compiled.asm:
        return Resources(*amd_usage(compiled.asm["amdgcn"]), shared)
    return None


def nvidia_usage(listing: str) -> tuple[int, int]:
    """(registers, spilled bytes) as cuobjdump lists them; the stack counts as spilled."""
    usage = re.search(r"REG:(\d+) STACK:(\d+)", listing)
    if usage is None:
        raise ValueError(f"cuobjdump tells no register count: {listing[:200]!r}")
    return int(usage[1]), int(usage[2])


def amd_usage(assembly: str) -> tuple[int, int]:
    """(registers, spilled bytes) from the metadata in the assembly text."""
    # Scalar registers that spill go to lanes of a vector register, not to memory: not counted.
    spilled = 4 * _metadata(assembly, "vgpr_spill_count")
    return (
        _metadata(assembly, "vgpr_count"),
        max(_metadata(assembly, "private_segment_fixed_size"), spilled),
    )


def cuobjdump(option: str, path: Path) -> str:
    """What cuobjdump, which comes with Triton, prints about a file."""
    return _printed("cuobjdump", [option], path)


def nvdisasm(options: Sequence[str], path: Path) -> str:
    """What nvdisasm, which comes with Triton, prints about a file."""
    return _printed("nvdisasm", options, path)


def _printed(name: str, options: Sequence[str], path: Path) -> str:
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run(
        [program, *options, path], check=True, capture_output=True, text=True
    ).stdout


def _metadata(assembly: str, name: str) -> int:
    value = re.search(rf"^\s+\.{name}:\s+(\d+)", assembly, re.MULTILINE)
    if value is None:
        raise ValueError(f"the assembly tells no {name}")
    return int(value[1])

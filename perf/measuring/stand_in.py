"""A GPU that is not there: Triton's own driver, launchers and compiler on a stand-in for libcuda.

Kernels are compiled for an H200 and go through every step of a launch up to the driver's last
function, which counts it and runs nothing. So the host's time, launches, allocations and
compilations are what they are on a GPU. No result is computed: outputs stay what they were.

`install` has to run before anything asks for Triton's driver, in a process of its own. `adopt` lets
the losses take CPU tensors for those of the GPU.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_SOURCE = Path(__file__).with_name("stand_in.c")
_library: Any = None


@dataclass(frozen=True)
class _Properties:
    """What torch.cuda says of the device."""

    major: int = 9
    minor: int = 0
    name: str = "NVIDIA H200"
    total_memory: int = 139 * 2**30
    multi_processor_count: int = 132


def install() -> None:
    """Make Triton, and the Python side of torch.cuda, believe in the GPU."""
    global _library
    if _library is not None:
        return
    os.environ.pop("TRITON_INTERPRET", None)
    library = _built()
    os.environ["TRITON_LIBCUDA_PATH"] = str(library.parent)
    _library = ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    _library.stand_in_launches.restype = ctypes.c_ulonglong

    cuda: Any = torch.cuda
    cuda._initialized = True
    cuda._cached_device_count = 1
    cuda._lazy_init = lambda: None
    cuda.device_count = lambda: 1
    cuda._get_device_properties = lambda device: _Properties()
    cuda._exchange_device = lambda device: 0
    cuda._maybe_exchange_device = lambda device: 0
    internals: Any = torch._C
    internals._cuda_getDevice = lambda: 0

    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver

    nvidia.libcuda_dirs.cache_clear()
    nvidia.library_dirs.cache_clear()
    active: Any = nvidia.CudaDriver()
    active.get_current_device = cuda.current_device
    active.get_current_stream = lambda device: 0
    active.get_device_capability = cuda.get_device_capability
    active.set_current_device = lambda device: None
    active.get_active_torch_device = lambda: torch.device("cpu")
    driver.set_active(active)


def adopt(guard: Callable[[int], Any] = lambda device: torch.cuda.device(0)) -> None:
    """Let the losses take CPU tensors for the GPU's; their labels and offsets go unchecked.

    `guard` is what makes a device the current one around a launch.
    """
    from tritonloss._core import backend, checks

    backend.INTERPRETED = False
    backend.GUARDS["cpu"] = guard
    checks.check_offsets = lambda offsets, name: None
    checks.check_labels_in_range = lambda target, classes, ignore_index: None


@contextmanager
def adopted() -> Iterator[None]:
    """The same within a `with` block, for calls whose launches are left out."""
    from tritonloss._core import backend, checks

    before = backend.INTERPRETED, checks.check_offsets, checks.check_labels_in_range
    guard = backend.GUARDS.get("cpu")
    adopt(guard=lambda device: nullcontext())
    try:
        yield
    finally:
        backend.INTERPRETED, checks.check_offsets, checks.check_labels_in_range = before
        del backend.GUARDS["cpu"]
        if guard is not None:
            backend.GUARDS["cpu"] = guard


def launches() -> int:
    """Kernels launched in this process so far."""
    return int(_library.stand_in_launches())


def _built() -> Path:
    """The library's path; it is compiled once for every state of its source."""
    source = _SOURCE.read_text()
    folder = Path(tempfile.gettempdir()) / f"tritonloss-stand-in-{os.getuid()}"
    library, copy = folder / "libcuda.so.1", folder / "stand_in.c"
    if library.exists() and copy.exists() and copy.read_text() == source:
        return library
    folder.mkdir(parents=True, exist_ok=True)
    copy.write_text(source)
    draft = folder / f"libcuda.{os.getpid()}"
    command = ["gcc", "-O2", "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "-o"]
    subprocess.run([*command, str(draft), str(copy)], check=True)
    draft.replace(library)
    return library

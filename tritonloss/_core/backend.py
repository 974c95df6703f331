"""Which implementation is used for a tensor: the Triton kernels or the eager reference."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, get_args

import torch
import triton

Backend = Literal["triton", "reference"]

# Triton chooses between a kernel and its interpreted form when the kernel is decorated. What counts
# is therefore the setting at the import of tritonloss.
INTERPRETED: bool = os.environ.get("TRITON_INTERPRET") == "1"

# The types of devices that the kernels run on, each with the context that makes one device current:
# Triton launches on the current one. ROCm devices call themselves cuda.
GUARDS: dict[str, Callable[[int], AbstractContextManager[object]]] = {
    "cuda": torch.cuda.device,
    "xpu": torch.xpu.device,
}

# A plain global: torch.compile guards it, and recompiles when it changes. It cannot trace a
# ContextVar, and it reads a thread-local once and never again.
_override: Backend | None = None


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Use one backend for every tensor inside the block, in all threads of the process.

    The default is the Triton kernels for GPU tensors and ``kernels_reference`` for CPU tensors (the
    kernels in Triton's interpreter when ``TRITON_INTERPRET=1`` was set before the import). The
    forward pass makes the choice. Its backward pass follows that choice, also outside the block.

    Args:
        backend: ``"triton"`` or ``"reference"``.

    Raises:
        ValueError: ``backend`` is neither.

    Example:
        >>> import torch, tritonloss
        >>> with tritonloss.use_backend("reference"):
        ...     mean, variance = tritonloss.gaussian_statistics(torch.rand(1, 1, 8, 8))
    """
    global _override
    if backend not in get_args(Backend):
        raise ValueError(f'backend must be "triton" or "reference"; got {backend!r}')
    before = _override
    _override = backend
    try:
        yield
    finally:
        _override = before


def serves_triton(tensor: torch.Tensor) -> bool:
    """Whether the Triton kernels are used for ``tensor``; if not, ``kernels_reference`` is.

    Raises:
        RuntimeError: ``use_backend`` asks for the kernels, which cannot run on the tensor's device.
    """
    device = tensor.device.type
    if _override == "reference":
        return False
    if device in GUARDS:
        return True
    if device == "cpu" and INTERPRETED:
        return True
    if _override == "triton":
        raise RuntimeError(
            f'use_backend("triton") needs tensors on a GPU; got a tensor on {device!r}. On CPU '
            "tensors the kernels run in Triton's interpreter when TRITON_INTERPRET=1 is set before "
            "tritonloss is imported."
        )
    return False


def warp_size() -> int:
    """Threads in a warp of the current GPU: 32, or 64 on AMD; 32 in the interpreter."""
    if INTERPRETED:
        return 32
    return int(triton.runtime.driver.active.get_current_target().warp_size)


def architecture() -> int:
    """The compute capability of NVIDIA's GPU, 90 for 9.0; 0 of others, and in the interpreter."""
    if INTERPRETED:
        return 0
    target = triton.runtime.driver.active.get_current_target()
    return int(target.arch) if target.backend == "cuda" else 0


def registers(most: int = 255) -> dict[str, int]:
    """The option of a launch that says how many registers of NVIDIA's GPUs a thread may have.

    Left to itself ptxas may decide for 168 or 96, so that more programs fit, and spill the rest. Or
    it may take more than it needs, so that fewer fit.
    """
    if INTERPRETED or triton.runtime.driver.active.get_current_target().backend != "cuda":
        return {}
    return {"maxnreg": most}


# Triton's interpreter replaces functions of its own library while it runs a kernel. A second thread
# would be given the first one's, so only one thread at a time may run a kernel.
_interpreter = threading.RLock()


def device_guard(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """The context of a launch: the tensor's GPU is the current one, on which Triton launches.

    In the interpreter it lets one thread at a time run a kernel.
    """
    guard = GUARDS.get(tensor.device.type)
    if guard is not None:
        return guard(tensor.get_device())  # its number: PyTorch takes longer for a torch.device
    return _interpreter if INTERPRETED else nullcontext()


def is_captured(device: torch.device) -> bool:
    """Whether the current stream's work goes into a CUDA graph, which may run on any stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def stream_of(device: torch.device) -> int:
    """The current stream; 0 where there is none."""
    if INTERPRETED:
        return 0
    return int(triton.runtime.driver.active.get_current_stream(device.index or 0))

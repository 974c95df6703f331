"""Peak memory of a computation, from an allocator or counted; and PyTorch's own work in it."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Bytes that the function holds at its peak beyond what is allocated before it runs."""
    if device.type == "cuda":
        return _gpu_peak(function, device)
    return counted_peak(function)


def counted_peak(function: Callable[[], object]) -> int:
    """The same without an allocator to ask: the bytes of all tensors alive at the same time.

    Works on torch's meta device too, where nothing is computed and full-size maps cost nothing.
    What an operation allocates within itself is not seen.
    """
    with _Counter() as counter:
        kept = function()
    del kept
    return counter.peak


def allocated_peak(function: Callable[[], object]) -> int:
    """The same for tensors on a CPU, as its allocator says: autograd's own are among them.

    It needs no dispatch mode. Under one, losses would take torch.compile's way, which is another.
    """
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        kept = function()
    del kept
    results: Any = profile.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    alive = itertools.accumulate(
        event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())
    )
    return max(alive, default=0)


def _gpu_peak(function: Callable[[], object], device: torch.device) -> int:
    gc.collect()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    kept = function()
    torch.cuda.synchronize(device)
    del kept
    return int(torch.cuda.max_memory_allocated(device) - before)


class _Counter(TorchDispatchMode):
    """Follows every storage that an operation returns until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        # Weak references, so that no address is used again while it is a key here.
        self._before: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        # A storage that is first seen as an input was allocated before the function ran.
        for storage in _storages((args, kwargs)):
            if storage._cdata not in self._alive:
                self._before.setdefault(storage._cdata, StorageWeakRef(storage))
        result = func(*args, **(kwargs or {}))
        self._alive = {key: held for key, held in self._alive.items() if not held[0].expired()}
        for storage in _storages(result):
            if storage._cdata not in self._before:
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result


@dataclass(frozen=True)
class Tally:
    """How often PyTorch itself allocates, makes a view and computes something in a computation.

    Whatever computes something is a launch on a GPU.
    """

    allocations: int
    views: int
    computing: int


def tally(function: Callable[[], object]) -> Tally:
    """The counts of PyTorch's own operations in a function, as the profiler sees them.

    Under a dispatch mode, losses would take torch.compile's way, which is another.
    """
    with torch.autograd.profiler.profile() as profile:
        function()
    events = [event for event in profile.function_events if event.name.startswith("aten::")]
    callers = {id(event.cpu_parent) for event in events if event.cpu_parent is not None}
    innermost = [event.name for event in events if id(event) not in callers]
    allocations = sum(name in _ALLOCATIONS for name in innermost)
    views = sum(name in _VIEWS for name in innermost)
    return Tally(allocations, views, len(innermost) - allocations - views)


_ALLOCATIONS = ("aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty")
_VIEWS = ("aten::as_strided", "aten::view", "aten::detach", "aten::alias")


def _storages(values: object) -> list[torch.UntypedStorage]:
    return [
        leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)
    ]

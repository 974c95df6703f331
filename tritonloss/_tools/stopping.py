"""Being stopped: by Ctrl-C, by the signal of a time limit, by the end of the parent process."""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_PR_SET_PDEATHSIG = 1  # of Linux's prctl


@contextmanager
def ended_in_order() -> Iterator[None]:
    """Inside, SIGTERM raises KeyboardInterrupt: whoever handles that keeps what has been done."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say what a signal does
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def end_with_parent() -> None:
    """End this process when the one that started it ends, even if that one is killed; on Linux."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

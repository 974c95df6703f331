"""A progress bar on stderr."""

from __future__ import annotations

import sys
import time
from typing import TextIO


class Progress:
    """Counts steps towards a total; `more` raises the total when work turns up on the way."""

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        self._total = total
        self._done = 0
        self._stream = stream or sys.stderr
        self._started = time.monotonic()
        self._printed = 0.0

    def more(self, steps: int) -> None:
        """There are this many steps more than was thought."""
        self._total += steps

    def step(self, text: str, steps: int = 1) -> None:
        """What `text` says is done."""
        self._done += steps
        self._show(text)

    def announce(self, text: str) -> None:
        """What `text` says begins now."""
        self._show(text)

    def close(self) -> None:
        """Leave the line."""
        self._show("done", last=True)

    def _show(self, text: str, last: bool = False) -> None:
        # A log file gets a line now and then, a terminal one line that changes.
        now = time.monotonic()
        terminal = self._stream.isatty()
        if not terminal and not last and now - self._printed < 10:
            return
        self._printed = now
        filled = 24 * self._done // max(self._total, 1)
        bar = "#" * filled + "." * (24 - filled)
        line = f"[{bar}] {self._done}/{self._total} {now - self._started:4.0f} s  {text}"
        start, end = ("\r", "\n" if last else "") if terminal else ("", "\n")
        self._stream.write(f"{start}{line[:100]:<100}{end}" if terminal else f"{line}{end}")
        self._stream.flush()

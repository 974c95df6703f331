"""A progress bar on stderr."""

from __future__ import annotations

import sys
import time
from typing import TextIO


class Progress:
    """Counts steps towards a total; `more` raises the total when work turns up on the way.

    Steps may differ in weight, roughly the seconds that one takes: the time left follows from it.
    With ``budget_s`` the time left is never shown as more than what is left of those seconds.
    """

    def __init__(
        self, total: int, stream: TextIO | None = None, budget_s: float | None = None
    ) -> None:
        self._total = total
        self._budget_s = budget_s
        self._done = 0
        self._weight = float(total)
        self._weight_done = 0.0
        self._stream = stream or sys.stderr
        self._started = time.monotonic()
        self._printed = 0.0

    def more(self, steps: int, weight: float = 1.0) -> None:
        """Raise the total by this many steps, each of this weight."""
        self._total += steps
        self._weight += steps * weight

    def step(self, text: str, steps: int = 1, weight: float = 1.0) -> None:
        """Count steps as done, and show `text`, which says what they were."""
        self._done += steps
        self._weight_done += steps * weight
        self._show(text)

    def announce(self, text: str) -> None:
        """Show `text`, which says what begins now."""
        self._show(text)

    def clear(self) -> None:
        """Make room on a terminal for a line that someone else prints."""
        if self._stream.isatty():
            self._stream.write(f"\r{'':100}\r")
            self._stream.flush()

    def close(self) -> None:
        """Show that all is done, and end the line."""
        self._show("done", last=True)

    def _show(self, text: str, last: bool = False) -> None:
        # A log file gets a line now and then, a terminal one line that changes.
        now = time.monotonic()
        terminal = self._stream.isatty()
        if not terminal and not last and now - self._printed < 10:
            return
        self._printed = now
        filled = min(24, int(24 * self._weight_done / max(self._weight, 1.0)))
        bar = "#" * filled + "." * (24 - filled)
        clock = f"{now - self._started:4.0f} s" if last else self._clock(now)
        line = f"[{bar}] {self._done}/{self._total} {clock}  {text}"
        start, end = ("\r", "\n" if last else "") if terminal else ("", "\n")
        self._stream.write(f"{start}{line[:100]:<100}{end}" if terminal else f"{line}{end}")
        self._stream.flush()

    def _clock(self, now: float) -> str:
        """The time that has passed and, once steps tell how long one takes, the time left."""
        passed = now - self._started
        clock = f"{passed:4.0f} s"
        if not 0 < self._done < self._total:
            return clock
        left = passed / self._weight_done * (self._weight - self._weight_done)
        if self._budget_s is not None:
            left = min(left, max(0.0, self._budget_s - passed))
        return f"{clock}, {left:.0f} s left"

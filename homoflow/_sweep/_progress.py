"""How far a sweep is: settings done, failed, and the time that is left."""

import sys
import time
from typing import Any, final

#: Seconds between two lines in a file; on a screen one line is written over and over.
_BETWEEN_LINES = 10.0


@final
class SweepMeter:
    """A line of text on a stream, such as standard error; nothing on `None`."""

    def __init__(self, total: int, done: int, failed: int, stream: Any):
        self._total = total
        self._before = self._done = done
        self._failed = failed
        self._stream = stream
        self._start = self._shown = time.monotonic()
        self._first: tuple[float, int] | None = None

    def add(self, done: int, failed: int) -> None:
        """Counts the settings of another chunk."""
        self._done += done
        self._failed += failed
        now = time.monotonic()
        self._first = self._first or (now - self._start, self._done)
        is_last = self._done == self._total
        if self._is_screen or is_last or now - self._shown > _BETWEEN_LINES:
            self._shown = now
            self._write(self.text(now - self._start))

    def text(self, seconds: float) -> str:
        """The line after so many seconds."""
        left = self._total - self._done
        line = f"sweep: {self._done} of {self._total} settings, {self._failed} failed"
        if not left:
            return f"{line}, {_duration(seconds)}"
        if self._first is None:
            return line
        first_seconds, first_done = self._first
        if self._done > first_done:
            rate = (seconds - first_seconds) / (self._done - first_done)
            return f"{line}, {_duration(rate * left)} left"
        # The first chunk has compiled the program, which the others will not.
        rate = seconds / (self._done - self._before)
        return f"{line}, at most {_duration(rate * left)} left"

    def close(self) -> None:
        if self._stream is not None and self._is_screen:
            print(file=self._stream)

    @property
    def _is_screen(self) -> bool:
        return self._stream is not None and self._stream.isatty()

    def _write(self, line: str) -> None:
        if self._stream is not None:
            ends: dict[str, Any] = {"end": ""} if self._is_screen else {}
            start = "\r" if self._is_screen else ""
            print(f"{start}{line:<70}".rstrip(), file=self._stream, flush=True, **ends)


def make_meter(is_shown: bool, total: int, done: int, failed: int) -> SweepMeter:
    return SweepMeter(total, done, failed, sys.stderr if is_shown else None)


def _duration(seconds: float) -> str:
    whole = int(seconds + 0.5)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

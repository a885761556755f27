"""Ctrl-C in a sweep: the current chunk is finished, and what there is returned."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator

from ._engines import Stop


@contextlib.contextmanager
def stop_on_interrupt(stop: Stop) -> Iterator[None]:
    """Within it the first Ctrl-C asks for a stop; the second interrupts as always."""
    is_main = threading.current_thread() is threading.main_thread()
    previous = signal.getsignal(signal.SIGINT) if is_main else None
    if not callable(previous):  # Only the main thread is told, and a server may not be.
        yield
        return

    def handle(signum, frame):
        del signum, frame
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True
        print(
            "\nStopping after the current chunk; Ctrl-C again stops at once.",
            file=sys.stderr,
        )

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)

"""A stop that waits for the end of an update."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from colabtools.report import get_logger

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["deferred_interrupt"]

# SIGTERM is what a cluster or a runtime that is given back sends first.
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """Yield an event that a first Ctrl-C or SIGTERM sets; a second one interrupts at once.

    Outside the main thread signals cannot be caught; the event is never set there.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        get_logger(__name__).warning("stopping after this update; once more stops at once")

    former = {number: signal.signal(number, ask) for number in _SIGNALS}
    try:
        yield asked
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)

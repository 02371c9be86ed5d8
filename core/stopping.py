"""A polite end: SIGTERM and Ctrl-C finish the update, save, and leave; a second Ctrl-C leaves at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPS = (signal.SIGTERM, signal.SIGINT)
"""The signals that ask for a polite end; the first wins where ranks were sent different ones."""


class Stop:
    """Whether this process was asked to stop, and by what."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


@contextmanager
def asked_to_stop() -> Iterator[Stop]:
    """Within: SIGTERM and SIGINT set `stop.signal` instead of ending the process."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield stop
        return
    before = {number: signal.signal(number, stop) for number in STOPS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""A polite end: SIGTERM, Ctrl-C and the files `save` and `stop`. A second Ctrl-C, or too long a wait, ends at once.

Python runs signal handlers only between instructions of the main thread, which may sit in a collective whose partner is
dead. So a thread of its own reads the signals (from the wake-up descriptor, which the operating system fills), keeps
the grace time, and can leave when the main thread cannot.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from core.distributed import Ranks

STOPS = (signal.SIGTERM, signal.SIGINT)
"""The signals that ask for a polite end; the first wins where ranks were sent different ones."""
SAME = 0.5
"""Seconds within which a second SIGINT is the same Ctrl-C: launchers hand it on to processes that already have it."""


class Wishes(NamedTuple):
    """What was asked of a run from outside, by signals and by files in its output directory."""

    signal: int = 0
    stop: bool = False
    save: bool = False

    @property
    def leave(self) -> bool:
        """Whether the run is to end now."""
        return bool(self.signal) or self.stop

    def flags(self) -> list[bool]:
        """As numbers that ranks can add up; `of` is the inverse."""
        return [*(self.signal == number for number in STOPS), self.stop, self.save]

    @classmethod
    def of(cls, flags: list[float]) -> Wishes:
        """From the sums of every rank's `flags`."""
        *signals, stop, save = flags
        number = next((int(n) for n, on in zip(STOPS, signals, strict=True) if on), 0)
        return cls(number, bool(stop), bool(save))


NOTHING = Wishes()


class Leave(Exception):
    """Raised between batches of validation and sampling, on every rank together, when the run is to end."""


class Stop:
    """Whether this process was asked to stop, and by what; leaves by itself after `grace` seconds."""

    def __init__(self, grace: float) -> None:
        self.signal, self.grace = 0, grace
        self.polite = False
        """Whether there is something to finish; before that, in start-up, a signal ends the process at once."""
        self.last_words: Callable[[], None] = lambda: None
        """Called before leaving at once, in the watching thread; it must be quick."""
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK)
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)

    def wishes(self, folder: Path | None) -> Wishes:
        """What this process was asked; the files count on the rank that is given the `folder`."""
        if folder is None:
            return Wishes(self.signal)
        return Wishes(self.signal, (folder / "stop").exists(), (folder / "save").exists())

    def agreed(self, here: Ranks) -> Wishes:
        """What any rank was sent; a collective."""
        return Wishes.of(here.sum(torch.tensor([float(flag) for flag in self.wishes(None).flags()])).tolist())

    def obeyed(self, folder: Path) -> None:
        """Take the files away, so that they ask once."""
        for name in ("stop", "save"):
            (folder / name).unlink(missing_ok=True)

    def _watch(self) -> None:
        deadline, first = None, 0.0
        while True:
            wait = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._reader], [], [], wait)[0]:
                self._leave(f"not done within --grace {self.grace:.0f} s")
            for number in os.read(self._reader, 64):
                now = time.monotonic()
                if number == 0:
                    return
                if number == signal.SIGINT and self.signal == signal.SIGINT and now - first > SAME:
                    self._leave("a second Ctrl-C")
                if number in STOPS and not self.signal:
                    self.signal, first, deadline = number, now, now + self.grace
                    if not self.polite:
                        self._leave("stopped before the run began")

    def _leave(self, why: str) -> None:
        print(f"{why}: leaving at once; whole checkpoints stay", file=sys.stderr, flush=True)
        self.last_words()
        os._exit(128 + self.signal)


@contextmanager
def asked_to_stop(grace: float) -> Iterator[Stop]:
    """Within: SIGTERM and SIGINT set `stop.signal` instead of ending the process. Off the main thread, which alone may
    have handlers, nothing is caught.
    """
    stop = Stop(grace)
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, _noted) for number in STOPS} if main else {}
    woken = signal.set_wakeup_fd(stop._writer, warn_on_full_buffer=False) if main else -1
    stop._thread.start()
    try:
        yield stop
    finally:
        if main:
            signal.set_wakeup_fd(woken)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.write(stop._writer, b"\0")
        stop._thread.join()
        os.close(stop._reader)
        os.close(stop._writer)


def _noted(number: int, frame: FrameType | None) -> None:
    """The signal reaches the watching thread through the wake-up descriptor; the main thread goes on."""

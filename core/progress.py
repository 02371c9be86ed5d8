"""What the person at the terminal sees: a progress bar, or plain lines when it is no terminal; everything also in
run.log.
"""

from __future__ import annotations

import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from core.errors import printable
from core.redact import redact


class Progress:
    """Lines and a bar on rank 0's terminal, and `run.log`; silent on the other ranks (`log` None)."""

    def __init__(self, log: Path | None, total: int, start: int) -> None:
        self.active, self.total = log is not None, total
        self._file = log.open("a", buffering=1) if log else None
        self._bar: Any = None
        self._task: Any = None
        self._began, self._start = time.monotonic(), start
        if self.active and sys.stderr.isatty():
            self._open_bar(start)

    def _open_bar(self, start: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = RichProgress(*columns, console=Console(stderr=True))
        self._bar.start()
        self._task = self._bar.add_task("starting", total=self.total, completed=start)

    def line(self, text: str) -> None:
        """A line for the person and the log."""
        if not self.active:
            return
        text = printable(redact(text))
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)
        self.note(text)

    def note(self, text: str) -> None:
        """A line for the log alone."""
        if self._file is not None:
            self._file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {redact(text)}\n")

    def step(self, step: int) -> None:
        """An update is done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """The numbers of a log interval."""
        if not self.active:
            return
        text = f"loss {values['loss']:.4f}  lr {values['lr']:.2e}  {values['samples_per_s']:.1f} samples/s"
        if self._bar is not None:
            self._bar.update(self._task, description=text, completed=step)
            self.note(f"step {step}  {text}")
        else:
            self.line(f"step {step}/{self.total}  {text}  {self._left(step)} left")

    def _left(self, step: int) -> str:
        done = step - self._start
        seconds = int((time.monotonic() - self._began) / max(done, 1) * (self.total - step))
        hours, rest = divmod(seconds, 3600)
        return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"

    def close(self) -> None:
        """Take the bar down and close the log."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._file is not None:
            self._file.close()
            self._file = None

"""The journal: what a run has to say, one JSON line an event, in the output directory. The truth; MLflow is a copy.

A line is with the operating system when `append` returns, so that a killed process loses nothing; `sync`, called once a
second, bounds what a power cut takes. Lines are appended, never changed: only the torn last line that a crash may leave
is cut off when the file is opened again.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from core.events import is_event
from core.redact import redact_all

FILE_NAME = "journal.jsonl"
Event = dict[str, Any]
"""`event` (its kind), `time` (milliseconds since 1970), and what belongs to the kind."""
NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
"""JSON has no such numbers; they stand as these texts."""
_ENCODER = json.JSONEncoder(allow_nan=False)
"""Kept: `json.dumps` with an option makes one for every line."""


LONGEST = 2**24
"""Bytes of a line at most; the longest ones name the files of a checkpoint."""


class Point(NamedTuple):
    """The newest value of a metric."""

    value: float
    step: int
    time: int


class InUse(OSError):
    """Another process writes this journal."""


class Journal:
    """The open journal of a run. Any thread may append; one process at a time holds the file."""

    def __init__(self, path: Path, patience: float = 0.0) -> None:
        """Open and mend the file. Raises InUse when it is still held by another after `patience` seconds."""
        self.path = path
        self._file = path.open("ab", buffering=0)
        try:
            _lock(self._file.fileno(), patience)
        except InUse:
            self._file.close()
            raise
        self.mended = mend(path)
        self.latest: dict[str, Point] = {}
        self.last: dict[str, Event] = {}
        """The newest event of each kind but metrics."""
        self._shown: dict[str, int] = {}
        self._writing = threading.Lock()
        self._dirty = self._torn = False
        for event, _ in read(path):
            self._remember(event)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Write numbers of a step. A metric that already has a point at this step or a later one is left out: after a
        kill the run computes some steps a second time, with the same results.
        """
        with self._writing:
            new = {k: float(v) for k, v in values.items() if k not in self.latest or step > self.latest[k].step}
            if new:
                now = _now()
                self._write({"event": "metrics", "step": step, "time": now, "values": new})
                self.latest.update((k, Point(v, step, now)) for k, v in new.items())

    def picture(self, path: str, key: str, step: int) -> None:
        """Note a picture (a file in the output directory) of a series; once for each step, as metrics."""
        if step > self._shown.get(key, -1):
            self.append("picture", path=path, key=key, step=step)

    def append(self, kind: str, **facts: Any) -> None:
        """Write an event of another kind. Secrets in its texts are hidden."""
        event = {"event": kind, "time": _now()} | redact_all(facts)
        with self._writing:
            self._write(event)
            self._remember(event)

    def sync(self) -> None:
        """Bring what was written onto the disk."""
        if self._dirty:
            self._dirty = False
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync and let go."""
        self.sync()
        self._file.close()

    def _write(self, event: Event) -> None:
        line = b"\n" * self._torn + dump(event).encode() + b"\n"
        self._torn = True  # until the whole line is there: a full disk takes a part of it
        if self._file.write(line) != len(line):
            raise OSError(f"{self.path}: a line was written in part")
        self._torn, self._dirty = False, True

    def _remember(self, event: Event) -> None:
        kind = event["event"]
        if kind == "metrics":
            for name, value in event["values"].items():
                self.latest[name] = Point(value, event["step"], event["time"])
            return
        self.last[kind] = event
        if kind == "picture":
            self._shown[event["key"]] = max(event["step"], self._shown.get(event["key"], -1))


def _now() -> int:
    return time.time_ns() // 1_000_000


def _lock(handle: int, patience: float) -> None:
    end = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= end:
                raise InUse("another process writes this run") from None
        except OSError:  # a file system without locks
            return
        time.sleep(0.1)


def in_use(path: Path) -> bool:
    """Whether a living process of this machine holds the journal."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
    return False


def dump(event: Event) -> str:
    """An event as a line of valid JSON."""
    try:
        return _ENCODER.encode(event)
    except ValueError:
        return _ENCODER.encode(event | {"values": {k: said(v) for k, v in event["values"].items()}})


def said(value: float) -> float | str:
    """A number as JSON can hold it."""
    return value if math.isfinite(value) else "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def parse(line: bytes) -> Event | None:
    """The event of a line; None for a damaged one."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not is_event(event):
        return None
    if event["event"] == "metrics":
        event["values"] = {k: NON_FINITE[v] if isinstance(v, str) else v for k, v in event["values"].items()}
    return event  # type: ignore[no-any-return]


def read(path: Path, offset: int = 0) -> Iterator[tuple[Event, int]]:
    """The events from `offset` on, each with the offset behind it. Damaged lines are left out, and so is a last line
    that is not ended yet.
    """
    with path.open("rb") as file:
        file.seek(offset)
        whole = True  # this part is a line, not the rest of one that is too long to be an event
        while (line := file.readline(LONGEST)).endswith(b"\n") or len(line) == LONGEST:
            offset += len(line)
            ended = line.endswith(b"\n")
            event = parse(line) if whole and ended else None
            whole = ended
            if event is not None:
                yield event, offset


def mend(path: Path) -> int:
    """End the last line if it is whole, cut it off if it is torn. Returns how many bytes were cut."""
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        start = _last_line(file, size)
        file.seek(start)
        tail = file.read(LONGEST)
        if not tail:
            return 0
        if parse(tail) is not None:
            file.write(b"\n")
            return 0
        file.truncate(start)
        return int(size - start)


def _last_line(file: Any, size: int) -> int:
    """Where the text after the last line end begins."""
    end = size
    while end > 0:
        start = max(0, end - 65536)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return int(start + found + 1)
        end = start
    return 0

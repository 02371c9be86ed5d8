"""Records out of parts by their place in the index, in any process, with bounded memory and disk.

A chunk of a gzip part is decompressed once a machine: whoever needs it first writes it to the spool in the cache, and
all workers and ranks read it there. Six workers would otherwise decompress everything six times.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from core.errors import UserError
from data.cache import cache
from data.part_lists import Part
from data.parts import Index
from data.samples import BadSample

SPOOL_BYTES = 1 << 30  # on disk, by all runs of the machine; the oldest chunks go first
OPEN_FILES = 48  # of each kind, in a process
LONGEST_WAIT = 20.0  # seconds for another process to make a chunk

T = TypeVar("T")


class Place(NamedTuple):
    """A stretch of a part's content (of a gzip part: decompressed) that belongs to chunk `chunk`."""

    part: int
    chunk: int
    start: int
    size: int


class Latest(Generic[T]):
    """The last few things that were opened, by key; what falls out is closed. It pickles empty."""

    def __init__(self, most: int, close: Callable[[T], object] | None = None):
        self.most, self.close = most, close
        self.things: OrderedDict[object, T] = OrderedDict()

    def get(self, key: object, make: Callable[[], T]) -> T:
        if key not in self.things:
            self.things[key] = make()
            if len(self.things) > self.most:
                self._drop(last=False)
        self.things.move_to_end(key)
        return self.things[key]

    def clear(self) -> None:
        """Close all."""
        while self.things:
            self._drop(last=True)

    def _drop(self, last: bool) -> None:
        _, thing = self.things.popitem(last=last)
        if self.close:
            self.close(thing)

    def __reduce__(self) -> tuple[object, ...]:
        return Latest, (self.most, self.close)


class Reader:
    """Reads from parts. It pickles as what it was made of: every process opens files for itself."""

    def __init__(self, parts: list[Part], indices: list[Index]):
        self.parts, self.indices = parts, indices
        self._files: Latest[int] = Latest(OPEN_FILES, os.close)
        self._rows: Latest[np.ndarray] = Latest(OPEN_FILES)

    def row(self, part: int, row: int) -> list[int]:
        """A row of the part's index."""
        return self._rows.get(part, self.indices[part].rows)[row].tolist()

    def bytes_at(self, place: Place) -> bytes:
        """Raises BadSample where the part is not what it was when the run began."""
        part, index = self.parts[place.part], self.indices[place.part]
        try:
            if not index.gzip:
                file = self._files.get(place.part, lambda: _opened(part))
                found = os.pread(file, place.size, place.start)
            else:
                first, last = self._span(place)
                file = self._files.get((place.part, place.chunk), lambda: _chunk(part, index, first, last))
                found = os.pread(file, place.size, place.start - first)
        except OSError as error:
            raise BadSample(part.name, error.strerror or str(error)) from None
        if len(found) != place.size:
            raise BadSample(part.name, "is shorter than when the run began")
        return found

    def _span(self, place: Place) -> tuple[int, int]:
        """First byte of a chunk, and the byte behind its last."""
        first, behind = self.indices[place.part].chunks[place.chunk : place.chunk + 2].tolist()
        _, start, size = self.row(place.part, behind - 1)[:3]
        return self.row(place.part, first)[1], start + size

    def __del__(self) -> None:
        self._files.clear()


def _opened(part: Part) -> int:
    """The open part, if it is still the one that was indexed."""
    file = os.open(part.path, os.O_RDONLY | os.O_CLOEXEC)
    status = os.fstat(file)
    if (status.st_size, status.st_mtime_ns) != (part.size, part.time):
        os.close(file)
        raise BadSample(part.name, "has changed since the run began")
    return file


# ---- the spool ------------------------------------------------------------------------------------------------------


def _chunk(part: Part, index: Index, first: int, behind: int) -> int:
    """The open spooled chunk, which is made if it is not there."""
    path = cache() / "spool" / f"{index.folder.name}-{first}"
    while (file := _spooled(path, behind - first)) is None:
        try:
            _spool(path, part, index, first, behind)
        except OSError as error:
            raise _unwritable(error) from None
    return file


def _spooled(path: Path, size: int) -> int | None:
    """The open file of a chunk that is whole and was written since the machine started: it is never synced to disk."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    status = os.fstat(file)
    started = time.time() - time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
    if status.st_size == size and status.st_mtime > started - 1:
        return file
    os.close(file)
    path.unlink(missing_ok=True)
    return None


def _spool(path: Path, part: Part, index: Index, first: int, behind: int) -> None:
    """Write a chunk, unless someone else has done it while this process waited."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path.with_name(f"{path.name}.lock")):
        if path.exists():
            return
        content = _unzipped(part, index, first, behind - first)
        descriptor, half = tempfile.mkstemp(prefix=".half-", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
            Path(half).replace(path)
        except OSError:
            Path(half).unlink(missing_ok=True)
            raise
        _evict(path)


def _unzipped(part: Part, index: Index, first: int, size: int) -> bytes:
    """A stretch of a gzip part's content, from the last state of the decompressor before it."""
    from indexed_gzip import IndexedGzipFile

    try:
        os.close(_opened(part))
        with IndexedGzipFile(
            str(part.path), index_file=str(index.folder / "states"), readbuf_size=1 << 18, buffer_size=1 << 20
        ) as file:
            file.seek(first)
            content: bytes = file.read(size)
    except (OSError, EOFError, ValueError) as error:
        raise BadSample(part.name, f"cannot be decompressed at byte {first}: {error}") from None
    if len(content) != size:
        raise BadSample(part.name, f"ends before byte {first + size} of its content")
    return content


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """While this lasts, hardly any other process of the machine is within; a lock ends with the process that has it."""
    with path.open("wb") as file:
        _lock(file.fileno())
        yield
        path.unlink(missing_ok=True)


def _lock(file: int) -> None:
    """Wait for a lock, but not for a process that was halted. Without one a chunk is made twice, no more."""
    end = time.monotonic() + LONGEST_WAIT
    while time.monotonic() < end:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.002)
        except OSError:  # some network file systems have no locks
            return None
    return None


def _evict(newest: Path) -> None:
    """Remove the oldest files until the spool is within its bounds. Who has one open goes on reading it."""
    files = []
    for path in newest.parent.iterdir():
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            files.append((status.st_mtime_ns, status.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= SPOOL_BYTES:
            return
        if path != newest:
            path.unlink(missing_ok=True)
            total -= size


def _unwritable(error: OSError) -> UserError:
    return UserError(
        f"cannot write chunks of gzip parts to the cache ({error}): make room there, name another with "
        "REGISTRY_CACHE, or gunzip the parts."
    )

"""Files that are whole or absent: written beside, synced, renamed. What a kill at any moment leaves can be read.

And small files from anywhere: read only when they are ordinary and not too long, so that nothing hangs or fills memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_atomic(path: Path, text: str) -> None:
    """Write `text` so that a reader finds the old file or the new one, never a part; it survives a power cut."""
    with whole(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write a file that a reader finds whole or not at all: it gets its name when it is written."""
    partial = path.with_name(f".partial-{path.name}")
    yield partial
    partial.replace(path)


def sync_folder(folder: Path) -> None:
    """Make renames within `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def synced_digest(path: Path) -> str:
    """SHA-256 of a file in hexadecimal, after its bytes are on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_text(path: Path, limit: int) -> str:
    """The text of an ordinary file of at most `limit` bytes. Raises OSError or ValueError for any other, and does not
    wait for a pipe.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is no ordinary file")
    if found.st_size > limit:
        raise ValueError(f"it is larger than {limit:,} bytes")
    return path.read_bytes().decode()


def read_json(path: Path, limit: int) -> Any:
    """The value in a JSON file. Raises OSError for one that is not there or cannot be read, else ValueError."""
    try:
        return json.loads(read_text(path, limit))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None

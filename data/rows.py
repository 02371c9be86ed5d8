"""Which rows of a table are trained on: those whose file is there, and as many of them as were asked for.

The answer is a function of the table, the folder and the slot: the same on every rank and for every worker.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from core.hashing import hash_of, hash_text, mix64_array
from data.annotations import resolved
from data.index import Dropped, Index, Names

if TYPE_CHECKING:
    from data.slots import CaptionedVideos

MISSING = "rows whose file is not there"


class Rows(NamedTuple):
    """The rows that are samples, and what is to be said of the others."""

    names: Names
    fingerprint: str
    dropped: Dropped
    told: dict[str, str]


def chosen(slot: CaptionedVideos, table: Index, first: int, last: int, root: Path) -> Rows:
    """Of the rows from `first` to `last` of the table, those that the slot asks for."""
    dropped, told = Dropped(), {}
    places: np.ndarray | None = None
    whole = Names(table, first, last)
    if slot.missing == "leave_out":
        places = _there(table, first, last, root, dropped)
    has = last - first if places is None else len(places)
    if slot.max_samples is not None:
        told["max_samples"] = f"{min(slot.max_samples, has):,} of {has:,} rows, {slot.subset}"
        if slot.max_samples < has:
            places = _taken(slot, slot.max_samples, np.arange(first, last) if places is None else places, whole)
    names = whole if places is None else Names(table, first, last, places.astype(_narrow(last)))
    return Rows(names, _fingerprint(names), dropped, told)


def _narrow(last: int) -> type:
    """Places travel to every worker."""
    return np.int32 if last < 1 << 31 else np.int64


def _fingerprint(names: Names) -> str:
    """Of the table's rows and the part of them; where it is no range, of what is in it."""
    parts: list[int | str] = [names.table.about["digest"], names.first, names.last]
    if names.places is not None:
        parts.append(blake2b(names.hashes().tobytes(), digest_size=16).hexdigest())
    return f"{hash_of(*parts):016x}"


def _taken(slot: CaptionedVideos, count: int, places: np.ndarray, whole: Names) -> np.ndarray:
    """Exactly `count` of the places: the lowest by a hash of (seed, path), or by their row in the table."""
    if slot.subset == "head":
        keys = whole.table.maps.rows[whole.first : whole.last][places - whole.first]
    else:
        salt = np.uint64(hash_of("max_samples", slot.subset_seed))
        keys = mix64_array(whole.hashes()[places - whole.first] ^ salt)
    return np.sort(places[np.argpartition(keys, count - 1)[:count]])


# ---- whose file is there --------------------------------------------------------------------------------------------


def _there(table: Index, first: int, last: int, root: Path, dropped: Dropped) -> np.ndarray | None:
    """Places whose file is there, None for all. Folders are listed, which is quicker than to ask for each file: by far
    where they are on a network.
    """
    files = np.fromiter(_files(table, root), np.uint64)
    there = np.isin(table.maps.hashes[first:last], files)
    missing = np.flatnonzero(~there)
    if not len(missing):
        return None
    dropped.add(MISSING, table.row(first + int(missing[0]))[0], len(missing))
    return first + np.flatnonzero(there)


def _files(table: Index, root: Path) -> Iterator[int]:
    """`hash_text` of the path of every file in the folders that the table names, as the table writes it."""
    for folder in sorted(table.folders()):
        inner = resolved(folder, root)
        if inner is None or not inner.is_dir():
            continue
        with os.scandir(inner) as entries:
            for entry in entries:
                path = f"{folder}{entry.name}"
                if entry.is_file() and (not entry.is_symlink() or resolved(path, root) is not None):
                    yield hash_text(path)

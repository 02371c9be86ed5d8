"""The index of a table of videos: an Arrow file and the hashes of its paths, which every process maps into memory.

Ten million rows so cost no more memory than ten, and a run starts at once.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from core.errors import UserError
from core.hashing import hash_text, mix64_array
from data.cache import cached
from data.samples import sorted_places

VERSION = 1  # of the index: raise it when its files change
ROWS = 1 << 15  # of a batch: what is unpacked to reach one row
SCHEMA = pa.schema({"path": pa.string(), "caption": pa.string()})

Fill = Callable[["Writer"], None]


class Dropped(Counter[str]):
    """How many rows were left out by reason; the reason names the first of them."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: dict[str, str] = {}

    def add(self, reason: str, example: str, count: int = 1) -> None:
        text = self.texts.setdefault(reason, f"{reason} (the first: {example[:80]!r})")
        self[text] += count


class Index:
    """An index as it is used: rows sorted by the hash of their path, opened when first asked for.

    It pickles as its folder's name, so a worker maps the files for itself.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.about: dict[str, Any] = json.loads((folder / "about.json").read_text())
        self._maps: _Maps | None = None

    def __len__(self) -> int:
        return int(self.about["rows"])

    @property
    def maps(self) -> _Maps:
        if self._maps is None:
            self._maps = _Maps.open(self.folder)
        return self._maps

    def row(self, place: int) -> tuple[str, str]:
        """Path and caption."""
        row = int(self.maps.rows[place])
        which = int(np.searchsorted(self.maps.starts, row, side="right")) - 1
        batch = self.maps.table.get_batch(which)
        at = row - int(self.maps.starts[which])
        return batch.column(0)[at].as_py(), batch.column(1)[at].as_py()

    def folders(self) -> set[str]:
        """What stands before the last part of the paths, with its slash; empty for files in the root itself."""
        batches = map(self.maps.table.get_batch, range(self.maps.table.num_record_batches))
        return {path[: path.rfind("/") + 1] for batch in batches for path in batch.column(0).to_pylist()}

    def copy_number(self, place: int) -> int:
        """How many rows with the same path come before this one."""
        return place - int(np.searchsorted(self.maps.hashes, self.maps.hashes[place], side="left"))

    def name(self, place: int) -> str:
        """The path; with a number where several rows share it."""
        copy = self.copy_number(place)
        return f"{self.row(place)[0]}#{copy}" if copy else self.row(place)[0]

    def below(self, share: float) -> int:
        """How many rows belong to the `share` of videos with the lowest hashes, one video at least: a video never
        leaves it when others join."""
        if share >= 1.0:
            return len(self)
        hashes = self.maps.hashes
        border = max(int(share * 2.0**64), int(hashes[0]) + 1)
        return int(np.searchsorted(hashes, np.uint64(border), side="left"))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": None}


class _Maps(NamedTuple):
    """The memory-mapped files. `starts`: first row of every batch of the table."""

    table: Any
    starts: np.ndarray
    rows: np.ndarray
    hashes: np.ndarray

    @classmethod
    def open(cls, folder: Path) -> _Maps:
        return cls(
            pa.ipc.open_file(pa.memory_map(str(folder / "table.arrow"))),
            np.load(folder / "starts.npy"),
            np.load(folder / "rows.npy", mmap_mode="r"),
            np.load(folder / "hashes.npy", mmap_mode="r"),
        )


class Names(Sequence[str]):
    """The names of an index' rows from `first` to `last`, read when asked for; with `places`, of those rows alone
    (int, ascending, within the range).
    """

    def __init__(self, table: Index, first: int, last: int, places: np.ndarray | None = None):
        self.table, self.first, self.last, self.places = table, first, last, places

    def __len__(self) -> int:
        return self.last - self.first if self.places is None else len(self.places)

    def place(self, index: int) -> int:
        """Where the row is in the table."""
        return self.first + index if self.places is None else int(self.places[index])

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        return self.table.name(self.place(place % len(self)))

    def hashes(self) -> np.ndarray:
        """(rows,) uint64: `hash_text` of every path, mixed with the number of the copy where a path comes again."""
        found = self._hashes()
        return found if self.places is None else found[self.places - self.first]

    def _hashes(self) -> np.ndarray:
        found = self.table.maps.hashes[self.first : self.last]
        copies = np.flatnonzero(found[1:] == found[:-1]) + 1
        if len(copies):
            found = np.array(found)
            numbers = copies - np.searchsorted(found, found[copies], side="left")
            found[copies] = mix64_array(found[copies] + numbers.astype(np.uint64))
        return found


# ---- making an index ------------------------------------------------------------------------------------------------


def index_of_rows(rows: Sequence[tuple[str, str]], dropped: Dropped) -> Index:
    """The index of rows that come from no table."""
    print_of = blake2b(repr((rows, dropped)).encode(), digest_size=16).hexdigest()

    def fill(writer: Writer) -> None:
        stream = iter(rows)
        while part := list(islice(stream, ROWS)):
            writer.add(pa.array([row[0] for row in part], pa.string()), pa.array([row[1] for row in part], pa.string()))
        writer.dropped.update(dropped)

    return made({"rows": print_of}, fill)


def made(key: dict[str, Any], fill: Fill) -> Index:
    def write(folder: Path) -> None:
        with Writer(folder) as writer:
            fill(writer)
        writer.finish()

    try:
        return Index(cached("index", VERSION, key, write))
    except OSError as error:
        raise UserError(
            f"cannot write an index of the annotations to the cache ({error}): name another with REGISTRY_CACHE."
        ) from None


class Writer:
    """Writes an index in one pass, and sorts the hashes at the end. `digest` is the sum of the rows' hashes, whatever
    their order."""

    def __init__(self, folder: Path):
        self.folder, self.rows = folder, 0
        self.starts: list[int] = []
        self.dropped = Dropped()
        self.digest = 0

    def __enter__(self) -> Writer:
        self.table = pa.ipc.new_file(str(self.folder / "table.arrow"), SCHEMA)
        self.hashes = (self.folder / "hashes").open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        self.table.close()
        self.hashes.close()

    def add(self, paths: pa.Array, captions: pa.Array) -> None:
        """Append rows."""
        for start in range(0, len(paths), ROWS):
            batch = pa.record_batch([paths[start : start + ROWS], captions[start : start + ROWS]], schema=SCHEMA)
            texts = batch.column(0).to_pylist()
            self.table.write_batch(batch)
            self.hashes.write(np.fromiter(map(hash_text, texts), np.uint64, len(texts)).tobytes())
            pairs = zip(texts, batch.column(1).to_pylist(), strict=True)
            self.digest += sum(hash_text(f"{path}\0{caption}") for path, caption in pairs)
            self.starts.append(self.rows)
            self.rows += len(batch)

    def finish(self) -> None:
        """The hashes in order, the rows in the order of their hashes, and what the table is."""
        unsorted = np.memmap(self.folder / "hashes", np.uint64, "r") if self.rows else np.empty(0, np.uint64)
        order = sorted_places(unsorted)
        np.save(self.folder / "rows.npy", order)
        header = {"descr": "<u8", "fortran_order": False, "shape": (self.rows,)}
        with (self.folder / "hashes.npy").open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for start in range(0, self.rows, 1 << 20):
                file.write(unsorted[order[start : start + (1 << 20)]].astype("<u8").tobytes())
        np.save(self.folder / "starts.npy", np.array(self.starts, np.int64))
        (self.folder / "hashes").unlink()
        about = {"rows": self.rows, "digest": f"{self.digest % (1 << 64):016x}", "dropped": dict(self.dropped)}
        (self.folder / "about.json").write_text(json.dumps(about))

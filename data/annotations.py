"""Tables of videos and captions, from csv or json-lines files of any length.

A table is read once, in blocks, into an index in the cache: an Arrow file and the hashes of its paths, which every
process maps into memory. Ten million rows so cost no more memory than ten, and a run starts at once.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from core.errors import UserError, did_you_mean
from core.hashing import hash_text, mix64_array
from data.cache import cached

VERSION = 1  # of the index: raise it when its files change
BLOCK = 4 << 20  # bytes of a csv file that are read at a time; a row cannot be longer
ROWS = 1 << 15  # of a batch: what is unpacked to reach one row
SCHEMA = pa.schema({"path": pa.string(), "caption": pa.string()})
COLUMNS = {"csv": ("contentUrl", "name"), "jsonl": ("afs_path", "name")}
"""Path and caption, as WebVid's csv and LVDM's json-lines call them."""
HALF_PAIR = re.compile("[\ud800-\udfff]")

Fill = Callable[["Writer"], None]


class Source(NamedTuple):
    """An annotation file, and where its videos lie."""

    file: Path
    layout: str  # csv, jsonl
    path: str  # a column, or a template of columns: {page_dir}/{videoid}.mp4
    caption: str  # a column
    root: Path

    def parts(self) -> list[tuple[str, str | None]]:
        """The path as literal texts, each with the column that follows it."""
        if "{" not in self.path:
            return [("", self.path)]
        return [(literal, column) for literal, column, _, _ in Formatter().parse(self.path)]

    def columns(self) -> list[str]:
        """What is read of the file: the caption, then what the path is made of."""
        return [self.caption, *(column for _, column in self.parts() if column is not None)]


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

    def copy_number(self, place: int) -> int:
        """How many rows with the same path come before this one."""
        return place - int(np.searchsorted(self.maps.hashes, self.maps.hashes[place], side="left"))

    def name(self, place: int) -> str:
        """The path; with a number where several rows share it."""
        copy = self.copy_number(place)
        return f"{self.row(place)[0]}#{copy}" if copy else self.row(place)[0]

    def below(self, share: float) -> int:
        """How many rows belong to the `share` of videos with the lowest hashes: a video never leaves it when others
        join."""
        if share >= 1.0:
            return len(self)
        return int(np.searchsorted(self.maps.hashes, np.uint64(int(share * 2.0**64)), side="left"))

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
    """The names of an index' rows from `first` to `last`, read when asked for."""

    def __init__(self, table: Index, first: int, last: int):
        self.table, self.first, self.last = table, first, last

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        return self.table.name(self.first + place % len(self))

    def hashes(self) -> np.ndarray:
        """(rows,) uint64: `hash_text` of every path, mixed with the number of the copy where a path comes again."""
        found = self.table.maps.hashes[self.first : self.last]
        copies = np.flatnonzero(found[1:] == found[:-1]) + 1
        if len(copies):
            found = np.array(found)
            numbers = copies - np.searchsorted(found, found[copies], side="left")
            found[copies] = mix64_array(found[copies] + numbers.astype(np.uint64))
        return found


# ---- making an index ------------------------------------------------------------------------------------------------


def index_of(source: Source) -> Index:
    """The index of an annotation file, made on first use: a file that has changed is another one.

    Raises UserError when the file cannot be read or lacks a column.
    """
    stat = source.file.stat()
    with source.file.open("rb") as file:
        head = blake2b(file.read(1 << 20), digest_size=16).hexdigest()
    key = {"source": source, "size": stat.st_size, "mtime": stat.st_mtime_ns, "head": head}
    return _made(key, lambda writer: _read(source, writer))


def index_of_rows(rows: Sequence[tuple[str, str]], dropped: Dropped) -> Index:
    """The index of rows that come from no table."""
    print_of = blake2b(repr((rows, dropped)).encode(), digest_size=16).hexdigest()

    def fill(writer: Writer) -> None:
        stream = iter(rows)
        while part := list(islice(stream, ROWS)):
            writer.add(pa.array([row[0] for row in part], pa.string()), pa.array([row[1] for row in part], pa.string()))
        writer.dropped.update(dropped)

    return _made({"rows": print_of}, fill)


def _made(key: dict[str, Any], fill: Fill) -> Index:
    def write(folder: Path) -> None:
        with Writer(folder) as writer:
            fill(writer)
        writer.finish()

    return Index(cached("index", VERSION, key, write))


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
        kind = np.uint32 if self.rows < 1 << 32 else np.uint64
        unsorted = np.memmap(self.folder / "hashes", np.uint64, "r") if self.rows else np.empty(0, np.uint64)
        order = np.argsort(unsorted, kind="stable").astype(kind)
        np.save(self.folder / "rows.npy", order)
        ordered = np.lib.format.open_memmap(self.folder / "hashes.npy", "w+", np.uint64, (self.rows,))
        for start in range(0, self.rows, 1 << 20):
            ordered[start : start + (1 << 20)] = unsorted[order[start : start + (1 << 20)]]
        ordered.flush()
        np.save(self.folder / "starts.npy", np.array(self.starts, np.int64))
        (self.folder / "hashes").unlink()
        about = {"rows": self.rows, "digest": f"{self.digest % (1 << 64):016x}", "dropped": dict(self.dropped)}
        (self.folder / "about.json").write_text(json.dumps(about))


# ---- reading files --------------------------------------------------------------------------------------------------


def recognise(file: Path) -> str:
    """csv or jsonl, by the first character that is not blank."""
    with file.open("rb") as stream:
        start = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"["):
        raise UserError(
            f"{file} is one JSON list; expected json-lines: one object a line, without brackets and commas."
        )
    return "jsonl" if start.startswith(b"{") else "csv"


def _read(source: Source, writer: Writer) -> None:
    blocks = _csv_blocks(source, writer.dropped) if source.layout == "csv" else _json_blocks(source, writer.dropped)
    for paths, captions in blocks:
        paths, captions = _inside(paths, captions, source.root, writer.dropped)
        writer.add(paths, captions)


def _csv_blocks(source: Source, dropped: Dropped) -> Iterator[tuple[pa.Array, pa.Array]]:
    """Paths and captions as strings. Fields may hold quotes, commas and newlines (RFC 4180)."""
    columns = source.columns()
    _check_columns(source, _csv_header(source.file))

    def odd(row: Any) -> str:
        dropped.add("rows of another number of fields", str(row.text))
        return "skip"

    try:
        reader = csv.open_csv(
            source.file,
            read_options=csv.ReadOptions(block_size=BLOCK, use_threads=False),
            parse_options=csv.ParseOptions(newlines_in_values=True, invalid_row_handler=odd),
            convert_options=csv.ConvertOptions(
                include_columns=columns, column_types=dict.fromkeys(columns, pa.binary()), check_utf8=False
            ),
        )
        for batch in reader:
            captions, *parts = _texts(batch, dropped)
            yield _joined(source, parts), captions
    except pa.ArrowInvalid as error:
        raise UserError(f"{source.file} is not a csv file that can be read: {_one_line(error)}") from None


def _joined(source: Source, columns: list[pa.Array]) -> pa.Array:
    """The paths, out of the columns of their template."""
    left, pieces = iter(columns), []
    for literal, column in source.parts():
        pieces += [pa.scalar(literal), *([next(left)] if column is not None else [])]
    return pc.binary_join_element_wise(*pieces, "")


def _csv_header(file: Path) -> list[str]:
    try:
        reader = csv.open_csv(
            file,
            read_options=csv.ReadOptions(block_size=BLOCK, use_threads=False),
            parse_options=csv.ParseOptions(newlines_in_values=True, invalid_row_handler=lambda _: "skip"),
        )
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not a csv file with a header that can be read: {_one_line(error)}") from None
    return list(reader.schema.names)


def _texts(batch: pa.RecordBatch, dropped: Dropped) -> list[pa.Array]:
    """Binary columns as strings, without the rows that are not UTF-8."""
    try:
        return [column.cast(pa.string()) for column in batch.columns]
    except pa.ArrowInvalid:
        good = []
        for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            try:
                good.append([value.decode() for value in row])
            except UnicodeDecodeError:
                dropped.add("rows that are not UTF-8", repr(row[-1]))
        return [pa.array([row[i] for row in good], pa.string()) for i in range(batch.num_columns)]


def _json_blocks(source: Source, dropped: Dropped) -> Iterator[tuple[pa.Array, pa.Array]]:
    """Paths and captions of the lines that hold both; the columns are checked on the first object."""
    rows = _json_rows(source, dropped)
    while part := list(islice(rows, ROWS)):
        captions, *parts = (pa.array(column, pa.string()) for column in zip(*part, strict=True))
        yield _joined(source, parts), captions


def _json_rows(source: Source, dropped: Dropped) -> Iterator[list[str]]:
    columns, checked = source.columns(), False
    with source.file.open("rb") as file:
        for number, line in enumerate(file, 1):
            found = _object(line)
            if found is None:
                if line.strip():
                    dropped.add("lines that are not a JSON object", f"line {number}")
                continue
            if not checked:
                _check_columns(source, list(found))
                checked = True
            row = [found.get(column) for column in columns]
            if all(map(_is_text, row)):
                yield row  # type: ignore[misc]
            else:
                dropped.add("lines without a text for path and caption", f"line {number}")


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _is_text(value: object) -> bool:
    """A string that UTF-8 can hold: JSON can spell half a surrogate pair."""
    return isinstance(value, str) and (value.isascii() or not HALF_PAIR.search(value))


def _check_columns(source: Source, found: list[str]) -> None:
    for place, wanted in enumerate(source.columns()):
        if wanted not in found:
            flag = "--data.path" if place else "--data.caption"
            raise UserError(
                f"{source.file} has no column {wanted!r}{did_you_mean(wanted, found)}; it has "
                f"{', '.join(map(repr, found[:12])) or 'none'}. Name the column that is meant: {flag}."
            )


# ---- paths ----------------------------------------------------------------------------------------------------------


def _inside(paths: pa.Array, captions: pa.Array, root: Path, dropped: Dropped) -> tuple[pa.Array, pa.Array]:
    """Paths relative to the root, without the rows whose path is empty or leaves it. Links are followed when read."""
    prefix = f"{root}/".replace("//", "/")
    relative = pc.if_else(
        pc.starts_with(paths, prefix), pc.utf8_slice_codeunits(paths, len(prefix)), paths
    )  # absolute, but within the root
    relative = pc.replace_substring_regex(relative, r"^(\./+)+", "")
    empty = pc.equal(relative, "")
    address = pc.match_substring_regex(relative, r"^[A-Za-z][A-Za-z0-9+.-]*://")
    leaving = pc.match_substring_regex(relative, r"^/|(^|/)\.\.(/|$)|\x00")
    reasons = {"rows without a path": empty, "addresses, not paths": address, "paths that leave the root": leaving}
    for reason, mask in reasons.items():
        if count := pc.sum(mask).as_py():
            dropped.add(reason, paths.filter(mask)[0].as_py(), count)
    kept = pc.invert(pc.or_(pc.or_(empty, address), leaving))
    return relative.filter(kept), captions.filter(kept)


def resolved(path: str, root: Path) -> Path | None:
    """The real file, or None where links lead it out of the root (which is resolved)."""
    real = Path(os.path.realpath(root / path))
    return real if real.is_relative_to(root) else None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())

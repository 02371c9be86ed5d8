"""Tables of videos and captions, from csv or json-lines files of any length, read once and in blocks into an index."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from core.errors import UserError, did_you_mean
from data.index import ROWS, Dropped, Index, Writer, made

BLOCK = 4 << 20  # bytes of a csv file that are read at a time; a row cannot be longer
COLUMNS = {"csv": ("contentUrl", "name"), "jsonl": ("afs_path", "name")}
"""Path and caption, as WebVid's csv and LVDM's json-lines call them."""
HALF_PAIR = re.compile("[\ud800-\udfff]")


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


def index_of(*sources: Source) -> Index:
    """The index of annotation files, made on first use: a file that has changed is another one.

    Raises UserError when a file cannot be read or lacks a column.
    """

    def fill(writer: Writer) -> None:
        for source in sources:
            _read(source, writer)

    return made({f"{number}": (source, *_state(source.file)) for number, source in enumerate(sources)}, fill)


def _state(file: Path) -> tuple[int, int, str]:
    """Size, time and a hash of the beginning."""
    stat = file.stat()
    with file.open("rb") as stream:
        return stat.st_size, stat.st_mtime_ns, blake2b(stream.read(1 << 20), digest_size=16).hexdigest()


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
        raise UserError(
            f"{source.file} is not a csv file that can be read: {_one_line(error)}. Is a quotation mark not closed?"
        ) from None


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
            row = [str(value) if type(value := found.get(column)) is int else value for column in columns]
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

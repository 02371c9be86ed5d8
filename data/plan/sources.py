"""`data.txt` and the annotation files that it names: json, jsonl, pickles of plain values, and parquet.

A line of data.txt is `ROOT,ANNOTATION`. A record is a dict; every field of the seed is read (Open-Sora sheet §4.2).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from core.errors import UserError
from data.plan.unpickled import unpickled

ROWS = 1 << 16  # of a batch
ENDINGS = (".json", ".jsonl", ".pkl", ".parquet")
BAD = -1
"""Stands in `cut` and `crop` for something that is there, but is not two or four whole numbers."""
SCHEMA = pa.schema(
    {
        "source": pa.int32(),
        "path": pa.string(),
        "captions": pa.list_(pa.string()),
        **dict.fromkeys(("height", "width", "num_frames"), pa.int64()),
        **dict.fromkeys(("fps", "aesthetic", "tech", "motion"), pa.float64()),
        **dict.fromkeys(("cut_start", "cut_end", "x0", "x1", "y0", "y1"), pa.int64()),
    }
)
"""Columns of the index of records; what a record lacks is null."""


class Source(NamedTuple):
    """A line of data.txt."""

    root: Path
    annotation: Path


# ---- data.txt -------------------------------------------------------------------------------------------------------


def sources(file: Path) -> list[Source]:
    """The lines of a data.txt; a line may come again, which repeats its data. Relative paths are looked for beside the
    file, then here. Raises UserError that names the line.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    found = [_source(file, number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip(" \t\r\n")]
    if not found:
        raise UserError(f"{file} has no lines; expected ROOT,ANNOTATION on each.")
    return found


def _source(file: Path, number: int, line: str) -> Source:
    parts = [part.strip() for part in line.split(",")]
    if len(parts) != 2 or not all(parts):
        raise UserError(
            f"{file}, line {number}: {line.strip()!r} has {len(parts) - 1} commas; expected one: ROOT,ANNOTATION "
            "(a path with a comma in it must be renamed)."
        )
    root, annotation = (_there(file, Path(part).expanduser()) for part in parts)
    if not root.is_dir():
        raise UserError(f"{file}, line {number}: the root {root} is not a folder.")
    if annotation.suffix not in ENDINGS:
        raise UserError(f"{file}, line {number}: {annotation.name}: annotations are {', '.join(ENDINGS)} files.")
    if not annotation.is_file():
        raise UserError(f"{file}, line {number}: the annotations {annotation} are not there.")
    return Source(root.resolve(), annotation.resolve())


def _there(file: Path, path: Path) -> Path:
    """Beside data.txt, else from the working folder, as the original takes it."""
    beside = file.parent / path
    return beside if beside.exists() else path


# ---- annotations ----------------------------------------------------------------------------------------------------


def batches(number: int, source: Source) -> Iterator[pa.RecordBatch]:
    """The records of a source, in order, as batches of SCHEMA. Raises UserError for a file of none."""
    read = {".json": _json, ".jsonl": _jsonl, ".pkl": _pickled, ".parquet": _parquet}[source.annotation.suffix]
    found = 0
    for rows in read(source.annotation):
        if rows:
            found += len(rows)
            yield batch_of(number, rows)
    if not found:
        raise UserError(f"{source.annotation} has no records.")


def _json(file: Path) -> Iterator[list[Any]]:
    try:
        records = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        hint = " It looks like one object a line: call it .jsonl." if "Extra data" in str(error) else ""
        raise UserError(f"{file} is not JSON: {error}.{hint}") from None
    return _parts(file, records)


def _pickled(file: Path) -> Iterator[list[Any]]:
    return _parts(file, unpickled(file))


def _parts(file: Path, records: Any) -> Iterator[list[Any]]:
    if not isinstance(records, list):
        raise UserError(f"{file} holds a {type(records).__name__}; expected a list of records.")
    for start in range(0, len(records), ROWS):
        yield records[start : start + ROWS]


def _jsonl(file: Path) -> Iterator[list[Any]]:
    with file.open("rb") as lines:
        rows = (_line(file, number, line) for number, line in enumerate(lines, 1) if line.strip())
        while part := list(islice(rows, ROWS)):
            yield part


def _line(file: Path, number: int, line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}, line {number}: not JSON: {error}.") from None


def _parquet(file: Path) -> Iterator[list[Any]]:
    try:
        with pq.ParquetFile(file) as table:
            for batch in table.iter_batches(ROWS):
                yield batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file} is not a parquet file that can be read: {' '.join(str(error).split())}") from None


# ---- fields ---------------------------------------------------------------------------------------------------------


def batch_of(number: int, rows: Sequence[Any]) -> pa.RecordBatch:
    """Columns of records; what is no record at all is an empty one."""
    records = [row if isinstance(row, dict) else {} for row in rows]
    sizes = [size if isinstance(size := record.get("resolution"), dict) else {} for record in records]
    cuts = [_numbers(record.get("cut"), 2) for record in records]
    crops = [_numbers(record.get("crop"), 4) for record in records]
    columns: dict[str, pa.Array] = {
        "source": pa.array([number] * len(rows), pa.int32()),
        "path": _column([record.get("path") for record in records], pa.string(), _text),
        "captions": pa.array([_captions(record.get("cap")) for record in records], pa.list_(pa.string())),
        "height": _column([size.get("height") for size in sizes], pa.int64(), _whole),
        "width": _column([size.get("width") for size in sizes], pa.int64(), _whole),
        "num_frames": _column([record.get("num_frames") for record in records], pa.int64(), _whole),
        "fps": _column([_rate(record.get("fps")) for record in records], pa.float64(), _real),
        "aesthetic": _column([_aesthetic(record) for record in records], pa.float64(), _real),
    }
    for name in ("tech", "motion"):
        columns[name] = _column([record.get(name) for record in records], pa.float64(), _real)
    for place, name in enumerate(("cut_start", "cut_end")):
        columns[name] = pa.array([cut and cut[place] for cut in cuts], pa.int64())
    for place, name in enumerate(("x0", "x1", "y0", "y1")):
        columns[name] = pa.array([crop and crop[place] for crop in crops], pa.int64())
    return pa.record_batch([columns[name] for name in SCHEMA.names], schema=SCHEMA)


def _aesthetic(record: dict[str, Any]) -> Any:
    value = record.get("aesthetic")
    return record.get("aes") if value is None else value


def _column(values: list[Any], kind: pa.DataType, mend: Callable[[Any], Any]) -> pa.Array:
    """Values of one type in one go; where one is of another, each is mended by itself."""
    wanted = {pa.string(): (str,), pa.int64(): (int,), pa.float64(): (float, int)}[kind]
    if all(value is None or type(value) in wanted for value in values):
        try:
            found = pa.array(values, kind)
            if kind == pa.string():
                found.validate(full=True)
            return found
        except (pa.ArrowException, UnicodeError, OverflowError):
            pass
    return pa.array(map(mend, values), kind)


def _text(value: Any) -> str | None:
    """A text that UTF-8 can hold: JSON can spell half a surrogate pair."""
    if not isinstance(value, str):
        return None
    return value.encode("utf-8", "replace").decode()


def _whole(value: Any) -> int | None:
    """A whole number, also one written 93.0."""
    real = _real(value)
    return int(real) if real is not None and real.is_integer() and abs(real) < 2.0**62 else None


def _real(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _rate(value: Any) -> float | None:
    """Frames a second; what cannot be one is missing."""
    rate = _real(value)
    return rate if rate is not None and rate > 0 else None


def _numbers(value: Any, count: int) -> list[int] | None:
    """`count` whole numbers; BAD ones for anything else that is there."""
    if value is None:
        return None
    if isinstance(value, (list, tuple)) and len(value) == count:
        numbers = [_whole(part) for part in value]
        if None not in numbers:
            return numbers  # type: ignore[return-value]
    return [BAD] * count


def _captions(value: Any) -> list[str] | None:
    """A caption, or several; None where there is none."""
    texts = [value] if isinstance(value, str) else value if isinstance(value, (list, tuple)) else []
    return [_text(text) or "" for text in texts if isinstance(text, str)] or None

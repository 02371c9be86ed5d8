"""The index of a part: where each record lies in it. One pass over the part, kept on disk, so that any record can be
read at any step by any worker.

gzip has no places to jump to. So that pass also keeps the decompressor's state every few megabytes (`indexed_gzip`),
and records are grouped in chunks, which are decompressed as a whole: 0.27 ms a record of 20 KB, where single records
would take 19.7.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np

from core.errors import UserError
from data.cache import place, write_once
from data.part_lists import Part

VERSION = 1  # of the index: raise it when its files or the chunks change
CHUNK_RECORDS, CHUNK_BYTES = 256, 8 << 20  # of a chunk, at most (a larger record is a chunk of its own)
SPACING = 2 << 20  # bytes between two states of the decompressor, of 32 KB each
BLOCK = 1 << 20  # bytes that are read at a time
MOST_RECORDS = 1 << 24  # of a part: what an index may take is bounded
LINE_LIMIT = 1 << 26  # bytes of a record
RATIO, BOMB = 200, 1 << 28  # gzip makes base64 1.3 times smaller; what unpacks to more than both is a bomb
ENDING = 1 << 12  # bytes of a part's beginning and end that are its mark; the end of a gzip file holds its checksum
ALONE = 1 << 28  # bytes that one process indexes by itself
GZIP = b"\x1f\x8b"
PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "ppm")


class Unusable(Exception):
    """A part that cannot be indexed; the message is the reason, without its name."""


class Index(NamedTuple):
    """A part's index as it is used. `folder`: `rows.npy`, int64: (records, 3) line, start, bytes; of a tar (records, 6)
    number, start and bytes of the picture, those of the text, 1 where that is JSON. `chunks`: (chunks + 1,) first row
    of each. `fault`: why its end is missing, or empty.
    """

    folder: Path
    chunks: np.ndarray
    digest: str
    fault: str
    gzip: bool
    too_long: int

    @classmethod
    def open(cls, folder: Path) -> Index:
        """Raises OSError, ValueError or KeyError where its files are not whole."""
        about = json.loads((folder / "about.json").read_text())
        chunks = np.load(folder / "chunks.npy")
        if (folder / "rows.npy").stat().st_size != about["bytes"]:
            raise ValueError("its rows are not whole")
        return cls(folder, chunks, about["digest"], about["fault"], about["gzip"], about["too_long"])

    def rows(self) -> np.ndarray:
        """Mapped into memory."""
        return np.load(self.folder / "rows.npy", mmap_mode="r")


def indices(parts: list[tuple[Part, bool]]) -> list[Index | str]:
    """The index of each part (with whether it is a tar), or why it has none. What is not in the cache is made, by
    several processes where it is much; ranks share the work, because each begins elsewhere and takes what nobody has
    made.
    """
    ready = [_index(part, tar, make=False) for part, tar in parts]
    found = {number: index for number, index in enumerate(ready) if index is not None}
    todo = _turned([number for number in range(len(parts)) if number not in found])
    size = sum(parts[number][0].size for number in todo)
    workers = min(len(todo), os.cpu_count() or 1, 1 + size // ALONE)
    if workers < 2:
        found |= {number: _made(parts[number]) for number in todo}
    else:
        print(f"a first pass over {len(todo)} parts, {size / 1e9:.1f} GB, which is kept", file=sys.stderr)
        with ProcessPoolExecutor(workers, multiprocessing.get_context("forkserver")) as pool:
            found |= zip(todo, pool.map(_made, [parts[number] for number in todo]), strict=True)
    return [found[number] for number in range(len(parts))]


def _turned(numbers: list[int]) -> list[int]:
    """From this rank's share on, then the others'."""
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    turn = len(numbers) * rank // max(ranks, 1)
    return numbers[turn:] + numbers[:turn]


def _made(part: tuple[Part, bool]) -> Index | str:
    return _index(*part, make=True) or "has no index"


def _index(part: Part, tar: bool, make: bool) -> Index | str | None:
    """The part's index, or why there can be none; None where it is not there and not to be made. Raises UserError where
    the cache cannot be written.
    """
    try:
        folder, zipped = _place(part, tar)
        if make and folder.is_dir() and _whole(folder) is None:
            shutil.rmtree(folder, ignore_errors=True)  # the machine stopped while it was written
        if make and not folder.is_dir():
            _make(folder, part, tar, zipped)
        return _whole(folder)
    except Unusable as error:
        return str(error)


def _place(part: Part, tar: bool) -> tuple[Path, bool]:
    """Where the part's index belongs, and whether the part is gzip. Raises Unusable."""
    try:
        begins, ends = _ends(part)
    except OSError as error:
        raise Unusable(error.strerror or str(error)) from None
    zipped = begins.startswith(GZIP)
    if not begins:
        raise Unusable("is empty")
    if part.name.endswith(".gz") and not zipped:
        raise Unusable("is no gzip file, whatever its name says")
    if tar and zipped:
        raise Unusable("is a compressed tar, in which nothing can be found: gunzip it")
    digest = blake2b(begins + ends, digest_size=16).hexdigest()
    return place("part", VERSION, {"size": part.size, "time": part.time, "ends": digest, "tar": tar}), zipped


def _whole(folder: Path) -> Index | None:
    """The index in a folder; None where there is none, or one that is not whole."""
    try:
        return Index.open(folder)
    except (OSError, ValueError, KeyError):
        return None


def _make(folder: Path, part: Part, tar: bool, zipped: bool) -> None:
    try:
        write_once(folder, lambda half: _write(half, part.path, tar, zipped))
    except OSError as error:
        raise UserError(
            f"cannot write an index of {part.name} to the cache ({error}): name another with REGISTRY_CACHE."
        ) from None


def _ends(part: Part) -> tuple[bytes, bytes]:
    with part.path.open("rb") as file:
        begins = file.read(ENDING)
        file.seek(max(0, part.size - ENDING))
        return begins, file.read(ENDING)


def _write(folder: Path, path: Path, tar: bool, zipped: bool) -> None:
    """One pass over the part, into the files of its index. Raises Unusable."""
    scan = Scan(path)
    if tar:
        rows = _tar_rows(path, scan)
    elif zipped:
        rows = _lines(_unzipped(scan, folder / "states"), scan)
    else:
        rows = _lines(_plain(scan), scan)
    if not len(rows):
        raise Unusable(scan.fault or "has no records")
    np.save(folder / "rows.npy", rows)
    np.save(folder / "chunks.npy", _chunks(rows))
    about = {
        "digest": f"{scan.crc:08x}-{scan.size}",
        "fault": scan.fault,
        "gzip": zipped,
        "too_long": scan.too_long,
        "bytes": (folder / "rows.npy").stat().st_size,
    }
    (folder / "about.json").write_text(json.dumps(about))
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file)


class Scan:
    """What a pass over a part finds beside its records."""

    def __init__(self, path: Path):
        self.path = path
        self.crc, self.size, self.too_long, self.fault = 0, 0, 0, ""

    def take(self, block: bytes) -> bytes:
        """Account for a block of the part's content."""
        self.crc, self.size = zlib.crc32(block, self.crc), self.size + len(block)
        return block


def _chunks(rows: np.ndarray) -> np.ndarray:
    """(chunks + 1,) int64: first row of every chunk."""
    starts, count = rows[:, 1], len(rows)
    ends = starts + rows[:, 2]
    bounds = [0]
    while (first := bounds[-1]) < count:
        fitting = int(np.searchsorted(ends, starts[first] + CHUNK_BYTES, side="right"))
        bounds.append(min(max(fitting, first + 1), first + CHUNK_RECORDS, count))
    return np.array(bounds, np.int64)


# ---- lines ----------------------------------------------------------------------------------------------------------


def _plain(scan: Scan) -> Iterator[bytes]:
    try:
        with scan.path.open("rb", buffering=0) as file:
            while block := file.read(BLOCK):
                yield scan.take(block)
    except OSError as error:
        scan.fault = f"cannot be read to its end: {error.strerror}"


def _unzipped(scan: Scan, states: Path) -> Iterator[bytes]:
    """The content of a gzip file, and the states of the decompressor into `states`. What comes before the first damage
    is content; what the damage is, zlib says.
    """
    from indexed_gzip import IndexedGzipFile

    most = max(BOMB, RATIO * scan.path.stat().st_size)
    with IndexedGzipFile(str(scan.path), spacing=SPACING, readbuf_size=1 << 18, buffer_size=BLOCK) as file:
        try:
            while block := file.read(BLOCK):
                yield scan.take(block)
                if scan.size > most:
                    raise Unusable(f"unpacks to more than {RATIO} times its size")
        except (OSError, zlib.error) as error:
            scan.fault = f"is damaged: {error}"
        if scan.fault or _trailer(scan.path) != (scan.crc, scan.size % (1 << 32)):
            scan.fault = _damage(scan.path)
        try:
            file.export_index(str(states))
        except OSError:
            raise Unusable(scan.fault or "cannot be decompressed") from None


def _trailer(path: Path) -> tuple[int, int]:
    """Checksum and size as the end of a gzip file of one member says them (RFC 1952 §2.3.1)."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 8))
        words = np.frombuffer(file.read(8).rjust(8, b"\0"), "<u4")
    return int(words[0]), int(words[1])


def _damage(path: Path) -> str:
    """What is wrong with a gzip file, if anything: several members are not. indexed_gzip passes over wrong
    checksums.
    """
    unzip, data = zlib.decompressobj(wbits=31), b""
    with path.open("rb") as file:
        while True:
            try:
                content = unzip.decompress(data, BLOCK)
            except zlib.error as error:
                return f"is damaged: {error}"
            data = unzip.unused_data if unzip.eof else unzip.unconsumed_tail
            if len(data) < len(GZIP):
                data += file.read(BLOCK)
            if unzip.eof and not data.startswith(GZIP):
                return ""  # what follows the last member is padding
            if unzip.eof:
                unzip = zlib.decompressobj(wbits=31)
            elif not (data or content):
                return "is cut short"


def _lines(blocks: Iterable[bytes], scan: Scan) -> np.ndarray:
    """(records, 3) int64: number from 1, start and bytes of every line that is not blank. The last line of a part that
    is cut short is left out, unless it ends.
    """
    found, start, number, count, end = [], 0, 1, 0, 0
    for block in blocks:
        ends = np.flatnonzero(np.frombuffer(block, np.uint8) == 10) + end
        end += len(block)
        if len(ends):
            rows = _of_lines(np.concatenate([[start], ends[:-1] + 1]), ends, number, scan)
            found.append(rows)
            start, number, count = int(ends[-1]) + 1, number + len(ends), count + len(rows)
        if count > MOST_RECORDS:
            raise Unusable(f"has more than {MOST_RECORDS:,} lines")
    if start < end and not scan.fault:
        found.append(_of_lines(np.array([start]), np.array([end]), number, scan))
    return np.concatenate(found) if found else np.empty((0, 3), np.int64)


def _of_lines(starts: np.ndarray, ends: np.ndarray, number: int, scan: Scan) -> np.ndarray:
    rows = np.stack([np.arange(number, number + len(ends)), starts, ends - starts], axis=1)
    scan.too_long += int((rows[:, 2] > LINE_LIMIT).sum())
    return rows[(rows[:, 2] > 1) & (rows[:, 2] <= LINE_LIMIT)]


# ---- tar shards -----------------------------------------------------------------------------------------------------


def _tar_rows(path: Path, scan: Scan) -> np.ndarray:
    """(records, 6) int64 of a webdataset shard. Names in it are only compared: nothing is unpacked."""
    rows: list[tuple[int, ...]] = []
    number = 0
    for number, record in enumerate(_records(path, scan), 1):
        picture = next((record[kind] for kind in PICTURES if kind in record), None)
        text = record.get("txt") or record.get("json")
        if picture and text and 0 < picture.size <= LINE_LIMIT and text.size <= LINE_LIMIT:
            places = (picture.offset_data, picture.size, text.offset_data, text.size, int("txt" not in record))
            rows.append((number, *places))
        elif picture and picture.size > LINE_LIMIT:
            scan.too_long += 1
        if len(rows) > MOST_RECORDS:
            raise Unusable(f"has more than {MOST_RECORDS:,} records")
    if number and not rows:
        raise Unusable("has no record of a picture (jpg, png, webp) and a text (txt, json)")
    return np.array(rows, np.int64).reshape(-1, 6)


def _records(path: Path, scan: Scan) -> Iterator[dict[str, tarfile.TarInfo]]:
    """Files of one name, up to its first dot, that follow one another: by ending."""
    name: tuple[str, str] | None = None
    record: dict[str, tarfile.TarInfo] = {}
    for member in _members(path, scan):
        folder, _, file = member.name.rpartition("/")
        stem, _, ending = file.partition(".")
        if (folder, stem) != name and record:
            yield record
            record = {}
        name = (folder, stem)
        record[ending.lower()] = member
    if record:
        yield record


def _members(path: Path, scan: Scan) -> Iterator[tarfile.TarInfo]:
    """The ordinary files of a tar. Raises Unusable where it is none."""
    try:
        with tarfile.open(path, "r:") as tar:
            end = path.stat().st_size
            while member := tar.next():
                if member.offset_data + member.size > end:
                    raise tarfile.ReadError("unexpected end of data")
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                if member.isreg() and not member.issparse():
                    scan.take(f"{member.name}\0{member.size}\n".encode("utf-8", "surrogateescape"))
                    yield member
    except (tarfile.TarError, OSError, ValueError, EOFError, RecursionError, OverflowError) as error:
        scan.fault = "is cut short" if "unexpected end" in str(error) else f"is no tar that can be read: {error}"

"""The files of a cache. A shard is a safetensors file and, written after it, its rows as an Arrow file: a shard without
rows is half-written and counts for nothing. `index.arrow` is the rows of all shards of a part, in order.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from core.errors import UserError
from core.files import sync_folder, synced_digest

INDEX = "index.arrow"
EMPTY = "empty.safetensors"
ROWS = pa.schema(
    [
        ("sample", pa.int64()),  # index in the dataset
        ("draw", pa.int32()),
        ("id", pa.binary()),  # of the sample that was read, in UTF-8 (surrogateescape)
        ("caption", pa.binary()),
        ("bad", pa.string()),  # JSON: name and reason of those that it stands for
        ("content", pa.binary(16)),  # BLAKE2b over pixels and caption
        ("shard", pa.int32()),
        ("row", pa.int32()),  # of mean and std
        ("text", pa.int32()),  # row of text_states
        ("crc", pa.uint32()),  # CRC-32 over the bytes of mean, std and states
    ]
)
"""A row is one clip: a sample at one of its draws."""
TENSORS = ("mean", "std", "text_states")
"""Of a shard: (rows, C, T', H', W') twice, and (captions, N, D) where the text encoder is frozen."""


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.safetensors"


def write_shard(folder: Path, number: int, tensors: Mapping[str, Tensor], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write tensors, then rows, each whole or not at all and on the disk."""
    path = shard_path(folder, number)
    with _whole(path) as partial:
        save_file(dict(tensors), partial)
        facts = {"bytes": str(partial.stat().st_size), "sha256": synced_digest(partial)}
    table = pa.Table.from_pylist(list(rows), schema=ROWS.with_metadata(facts))
    with _whole(path.with_suffix(".arrow")) as partial:
        with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        synced_digest(partial)
    sync_folder(folder)


def rows_of(folder: Path, number: int) -> pa.Table | None:
    """The rows of a shard; None for one that is half-written or not there. The tensors have the size that was
    written.
    """
    path = shard_path(folder, number)
    try:
        table = _read(path.with_suffix(".arrow"))
        size = int(table.schema.metadata[b"bytes"])
    except (OSError, pa.ArrowInvalid, KeyError, ValueError):
        return None
    return table if path.is_file() and path.stat().st_size == size else None


def is_whole(folder: Path, number: int) -> bool:
    """Whether every byte of a shard is as it was written."""
    table = rows_of(folder, number)
    if table is None:
        return False
    with shard_path(folder, number).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest().encode() == table.schema.metadata[b"sha256"]


def merge(folder: Path, shards: int) -> bool:
    """Write the index of a part if all of its shards are there; whether they are. Several processes may do it at once:
    they write the same. Clears what kills have left.
    """
    found = [rows for number in range(shards) if (rows := rows_of(folder, number)) is not None]
    if len(found) < shards:
        return False
    with _whole(folder / INDEX) as partial:
        with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_file(file, ROWS) as writer:
            for rows in found:
                writer.write_table(rows.replace_schema_metadata(None))
        synced_digest(partial)
    for left in folder.glob(".partial-*"):
        left.unlink(missing_ok=True)
    sync_folder(folder)
    return True


def read_index(folder: Path, rows: int, shards: int) -> pa.Table:
    """The index of a part, mapped into memory. Raises UserError where the part is not finished, or a shard does not
    have the size that it was written with.
    """
    try:
        table = _read(folder / INDEX)
    except FileNotFoundError:
        raise UserError(f"the cache {folder.parent} is not finished: `data cache` goes on with it") from None
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(
            f"{folder / INDEX} cannot be read: {error}; remove it, and `data cache` makes it again"
        ) from None
    if not table.schema.equals(ROWS) or len(table) != rows:
        raise UserError(
            f"{folder / INDEX} is not the index of {rows} clips; remove it, and `data cache` makes it again"
        )
    for number in range(shards):
        if rows_of(folder, number) is None:
            raise UserError(damaged(folder, number, "is missing, or not as long as it was written"))
    return table


def _read(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).read_all()


def damaged(folder: Path, number: int, why: str) -> str:
    return f"{shard_path(folder, number)} {why}: the same `data cache` as before finds it and makes it again"


class Shards:
    """Rows of the shards of a folder, read as they are asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Workers open files of their own."""
        return {"folder": self.folder, "_open": {}}

    def read(self, number: int, row: int, text: int, crc: int) -> dict[str, Tensor]:
        """One clip: `mean`, `std` and, where `text` is not -1, `text_states`. Raises UserError where the bytes are
        not those that were written.
        """
        places = {"mean": row, "std": row} | ({"text_states": text} if text >= 0 else {})
        try:
            file = self._file(number)
            found = {name: file.get_slice(name)[place : place + 1][0] for name, place in places.items()}
        except (SafetensorError, OSError, IndexError) as error:
            raise UserError(damaged(self.folder, number, f"cannot be read ({error})")) from None
        if crc_of(found.values()) != crc:
            raise UserError(damaged(self.folder, number, f"is damaged in row {row}"))
        return found

    def _file(self, number: int) -> Any:
        if number not in self._open:
            if len(self._open) >= 64:  # each is a mapping and a parsed header
                self._open.pop(next(iter(self._open)))
            self._open[number] = safe_open(shard_path(self.folder, number), framework="pt")
        return self._open[number]


def crc_of(tensors: Any) -> int:
    """CRC-32 over the bytes of tensors, one after the other."""
    total = 0
    for tensor in tensors:
        total = zlib.crc32(tensor.contiguous().view(torch.uint8).numpy(), total)
    return total


def content_of(sample: Mapping[str, Any]) -> bytes:
    """BLAKE2b (16 bytes) over the pixels and the caption of a sample."""
    total = hashlib.blake2b(sample["pixel_values"].contiguous().numpy().tobytes(), digest_size=16)
    total.update(sample.get("caption", "").encode("utf-8", "surrogateescape"))
    return total.digest()


def write_empty(folder: Path, states: Tensor) -> None:
    """The states of the empty caption (1, N, D), for captions that are dropped."""
    with _whole(folder / EMPTY) as partial:
        save_file({"text_states": states}, partial, metadata={"crc": str(crc_of([states]))})
        synced_digest(partial)


def read_empty(folder: Path) -> Tensor:
    try:
        with safe_open(folder / EMPTY, framework="pt") as file:
            states, crc = file.get_tensor("text_states"), (file.metadata() or {}).get("crc")
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{folder / EMPTY} cannot be read ({error}): remove it, and `data cache` makes it again"
        ) from None
    if str(crc_of([states])) != crc:
        raise UserError(f"{folder / EMPTY} is damaged: remove it, and `data cache` makes it again")
    return states  # type: ignore[no-any-return]


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Where to write a file that is found whole or not at all; another process may be writing the same one."""
    partial = path.with_name(f".partial-{path.name}-{os.getpid()}")
    yield partial
    try:
        partial.replace(path)
    except FileNotFoundError:  # who finished the part has cleared it
        if not path.is_file():
            raise

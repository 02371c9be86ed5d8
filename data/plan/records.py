"""The index of records: annotations read once into an Arrow file, which every process maps into memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from core.errors import UserError
from core.hashing import hash_text, mix64_array
from data.cache import cached
from data.plan.kinds import IMAGES, suffix_of
from data.plan.sources import SCHEMA, Source, batches

VERSION = 1  # of the index: raise it when its files change


class Record(NamedTuple):
    """One record as it is read; what it lacks is None. `cut` and `crop` as the annotation has them."""

    root: Path
    path: str
    captions: list[str] | None
    size: tuple[int, int] | None
    num_frames: int | None
    fps: float | None
    aesthetic: float | None
    cut: tuple[int, int] | None
    crop: tuple[int, int, int, int] | None


class Records:
    """The index as it is used. It pickles as its folder's name, so a worker maps the files for itself.

    `hashes`: uint64 a record, of path, cut and which copy it is; unique. `paths`: uint64, of the path alone.
    """

    def __init__(self, folder: Path, found: Sequence[Source]):
        self.folder, self.sources = folder, list(found)
        self.about: dict[str, Any] = json.loads((folder / "about.json").read_text())
        self._table: Any = None

    def __len__(self) -> int:
        return int(self.about["rows"])

    @property
    def table(self) -> Any:
        """The Arrow file's reader."""
        if self._table is None:
            self._table = pa.ipc.open_file(pa.memory_map(str(self.folder / "records.arrow")))
        return self._table

    @property
    def hashes(self) -> np.ndarray:
        return np.load(self.folder / "hashes.npy", mmap_mode="r")

    @property
    def paths(self) -> np.ndarray:
        return np.load(self.folder / "paths.npy", mmap_mode="r")

    def chunks(self) -> Iterator[tuple[int, pa.RecordBatch]]:
        """First row and columns of each batch."""
        for number, first in enumerate(self.about["starts"]):
            yield first, self.table.get_batch(number)

    def name(self, row: int) -> str:
        """A unique name that does not say where the root is: path, cut, and which copy."""
        record = self[row]
        copy = int(np.load(self.folder / "copies.npy", mmap_mode="r")[row])
        cut = "" if record.cut is None else f"[{record.cut[0]}:{record.cut[1]}]"
        return f"{record.path}{cut}" + (f"#{copy}" if copy else "")

    def __getitem__(self, row: int) -> Record:
        starts = self.about["starts"]
        which = int(np.searchsorted(starts, row, side="right")) - 1
        values = {name: column[0] for name, column in self._slice(which, row - starts[which]).items()}
        cut, crop = (values["cut_start"], values["cut_end"]), tuple(values[name] for name in ("x0", "x1", "y0", "y1"))
        return Record(
            root=self.sources[values["source"]].root,
            path=values["path"],
            captions=values["captions"],
            size=None if values["height"] is None else (values["height"], values["width"]),
            num_frames=values["num_frames"],
            fps=values["fps"],
            aesthetic=values["aesthetic"],
            cut=None if cut[0] is None else cut,
            crop=None if crop[0] is None else crop,  # type: ignore[arg-type]
        )

    def _slice(self, which: int, at: int) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = self.table.get_batch(which).slice(at, 1).to_pydict()
        return found

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_table": None}


# ---- making it ------------------------------------------------------------------------------------------------------


def records_of(found: Sequence[Source], probe: bool) -> Records:
    """The index of the sources' annotations, made on first use; `probe` asks the files for what records lack."""

    def write(folder: Path) -> None:
        _write(folder, found, probe)

    key = {f"{number}": (source.root, *_state(source.annotation)) for number, source in enumerate(found)}
    try:
        return Records(cached("records", VERSION, key | {"probe": probe}, write), found)
    except OSError as error:
        raise UserError(
            f"cannot write an index of the annotations to the cache ({error}): name another with REGISTRY_CACHE."
        ) from None


def _state(file: Path) -> tuple[str, int, int, str]:
    """Path, size, time and a hash of the beginning."""
    stat = file.stat()
    with file.open("rb") as stream:
        start = blake2b(stream.read(1 << 20), digest_size=16).hexdigest()
    return str(file), stat.st_size, stat.st_mtime_ns, start


def _write(folder: Path, found: Sequence[Source], probe: bool) -> None:
    starts, rows, digest = [], 0, 0
    hashes, paths = [], []
    with pa.ipc.new_file(str(folder / "records.arrow"), SCHEMA) as file:
        for number, source in enumerate(found):
            for batch in batches(number, source):
                whole = _probed(source.root, batch) if probe else batch
                file.write_batch(whole)
                starts.append(rows)
                rows += len(whole)
                of_paths = _hashed(["" if path is None else path for path in whole.column("path").to_pylist()])
                paths.append(of_paths)
                hashes.append(_with(of_paths, whole, ("cut_start", "cut_end")))
                captions = ["\0".join(texts or ()) for texts in whole.column("captions").to_pylist()]
                named = set(SCHEMA.names) - {"source", "path", "captions", "cut_start", "cut_end"}
                content = _with(hashes[-1] ^ _hashed(captions), whole, tuple(sorted(named)))
                digest += int(mix64_array(content).astype(object).sum())
    ids, copies = _unique(np.concatenate(hashes))
    np.save(folder / "hashes.npy", ids)
    np.save(folder / "copies.npy", copies)
    np.save(folder / "paths.npy", np.concatenate(paths))
    about = {"rows": rows, "starts": starts, "digest": f"{digest % (1 << 64):016x}"}
    (folder / "about.json").write_text(json.dumps(about))


def _hashed(texts: list[str]) -> np.ndarray:
    return np.fromiter(map(hash_text, texts), np.uint64, len(texts))


def _with(hashes: np.ndarray, batch: pa.RecordBatch, names: tuple[str, ...]) -> np.ndarray:
    """Hashes mixed with columns of numbers; those that all lack change nothing."""
    for place, name in enumerate(names):
        column = batch.column(name)
        there = ~column.is_null().to_numpy(zero_copy_only=False)
        bits = column.fill_null(0).to_numpy(zero_copy_only=False).view(np.uint64) + np.uint64(place)
        hashes = np.where(there, mix64_array(hashes ^ mix64_array(bits)), hashes)
    return hashes


def _unique(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unique hashes, and for each row how many equal ones come before it."""
    order = np.argsort(hashes, kind="stable")
    ranked = hashes[order]
    first = np.searchsorted(ranked, ranked, side="left")
    copies = np.empty(len(hashes), np.int32)
    copies[order] = np.arange(len(hashes)) - first
    return np.where(copies > 0, mix64_array(hashes + copies.astype(np.uint64)), hashes), copies


# ---- what the files say ---------------------------------------------------------------------------------------------


def _probed(root: Path, batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch with sizes, lengths and rates out of the files' headers, where records have none."""
    columns = batch.to_pydict()
    for row, path in enumerate(columns["path"]):
        is_image = suffix_of(path or "") in IMAGES
        wanted = ("height", "width") if is_image else ("height", "width", "num_frames", "fps")
        if path is not None and any(columns[name][row] is None for name in wanted):
            for name, value in zip(wanted, _facts(root, path, is_image), strict=False):
                columns[name][row] = value if columns[name][row] is None else columns[name][row]
    return pa.record_batch([pa.array(columns[name], SCHEMA.field(name).type) for name in SCHEMA.names], schema=SCHEMA)


def _facts(root: Path, path: str, is_image: bool) -> tuple[Any, ...]:
    """Height and width as shown, frames and frames a second; nothing of what cannot be read: the plan says so."""
    from data import video
    from data.annotations import resolved
    from data.pictures import WEB_FORMATS, decoded
    from data.samples import BadSample

    file = resolved(path, root)
    if file is None:
        return ()
    try:
        if is_image:
            width, height = decoded(file, path, formats=WEB_FORMATS).size
            return height, width
        packets = video.scan(file)
    except (video.Unreadable, BadSample):
        return ()
    times = packets.times()
    rate = (len(times) - 1) / float(times[-1]) if len(times) > 1 and times[-1] > 0 else None
    height, width = video.shown_size(packets.height, packets.width, packets.pixel_aspect, lambda h, w: (h, w))
    return height, width, len(times), rate

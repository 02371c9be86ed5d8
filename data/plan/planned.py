"""A plan on disk: for every record its reason or its bucket, as a memory-mapped Arrow file, and the table of it all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from core.errors import UserError
from core.hashing import hash_of, mix64_array
from core.slots.slot import to_json
from data.cache import cached
from data.plan import declared
from data.plan.records import Records, records_of
from data.plan.rules import CODES, KEPT, REASONS, Columns, Planner, Shapes, clip_length, picture
from data.plan.sources import sources

if TYPE_CHECKING:
    from data.bucketed_slots import BucketedVideos

VERSION = 1  # of the plan: raise it when its files change
NOT_PLANNED_WITH = {"source", "fetch", "root", "captioning", "buckets", "decoder", "max_bad_share"}
NOT_PLANNED_WITH |= {"split", "held_out_split", "held_out_share"}
SCHEMA = pa.schema({"reason": pa.int8(), "image": pa.bool_(), "bucket": pa.int32()})


class Planned:
    """The plan of a slot. `shapes`: (buckets, 3) int64 frames, height, width; `counts`: kept records in each."""

    def __init__(self, slot: BucketedVideos):
        found = sources(_data_txt(slot))
        self.slot = slot
        self.records = records_of(found, slot.probe)
        self.table = table_of(slot)
        key = {name: value for name, value in to_json(slot).items() if name not in NOT_PLANNED_WITH}
        tabled = {name: getattr(slot.buckets, name) for name in ("declared_rules", "frame_interval", "fps_max")}
        parts = {"records": self.records.folder.name, **key, **tabled, "declared": self.table and self.table.cells}
        try:
            self.folder = cached("plan", VERSION, parts, self._write)
        except OSError as error:
            raise UserError(f"cannot write a plan to the cache ({error}): name another with REGISTRY_CACHE.") from None
        self.about: dict[str, Any] = json.loads((self.folder / "about.json").read_text())
        self.shapes = np.array(self.about["shapes"], np.int64).reshape(-1, 3)
        self.counts = np.array(self.about["counts"], np.int64)
        if not self.counts.sum():
            raise UserError(self._nothing())

    @property
    def columns(self) -> Any:
        """The Arrow file: reason, image, bucket of every record."""
        with pa.ipc.open_file(pa.memory_map(str(self.folder / "plan.arrow"))) as file:
            return file.get_batch(0)

    def kept(self) -> np.ndarray:
        """(n,) int64 rows of the records that are trained on, without those of other splits."""
        kept = np.flatnonzero(self.columns.column("reason").to_numpy() == CODES[KEPT])
        slot = self.slot
        if slot.split == "all" or not slot.held_out_share:
            return kept
        salted = mix64_array(self.records.paths[kept] ^ np.uint64(hash_of("held out")))
        held = (salted >> np.uint64(11)) * 2.0**-53 < slot.held_out_share
        chosen = kept[held if slot.split == slot.held_out_split else ~held]
        if not len(chosen):
            raise UserError(
                f"split {slot.split!r} has no records: held_out_share={slot.held_out_share} of {len(kept)} are held "
                "out. Choose another share, or split=all."
            )
        return chosen

    def fingerprint(self) -> str:
        """Of what the records say and how they are planned."""
        return f"{hash_of(self.records.about['digest'], self.folder.name, self.slot.split):016x}"

    # -------------------------------------------------------------------------------------------------------- table

    def dropped(self) -> dict[str, int]:
        """Reason, with an example → how many."""
        return {
            f"{REASONS[name][0]} (the first: {example[:80]!r})": count
            for name, (count, example) in self.about["dropped"].items()
        }

    def lines(self) -> Iterator[str]:
        """The table for people: buckets, then reasons."""
        total, kept = len(self.records), int(self.counts.sum())
        images = int(self.about["images"])
        kinds = f"{images:,} images, {kept - images:,} videos"
        yield f"planned: {kept:,} of {total:,} records ({kinds}), {int((self.counts > 0).sum())} buckets"
        yield f"  {'frames x height x width':<26}{'samples':>12}{'share':>9}{'tokens a sample':>18}"
        for bucket in np.argsort(-self.counts, kind="stable"):
            if self.counts[bucket]:
                shape = shape_name(self.shapes[bucket])
                share, tokens = self.counts[bucket] / kept, self.tokens()[bucket]
                yield f"  {shape:<26}{self.counts[bucket]:>12,}{share:>9.1%}{tokens:>18,}"
        yield f"dropped: {total - kept:,} records"
        for name, (count, example) in self.about["dropped"].items():
            yield f"  {count:>10,}  {REASONS[name][0]}, the first: {example}; set by {REASONS[name][1]}"

    def tokens(self) -> np.ndarray:
        """(buckets,) tokens of a sample."""
        frames, height, width = self.shapes.T
        size = self.slot.buckets.token_size
        return ((frames - 1) // self.slot.time_stride + 1) * -(-height // size) * -(-width // size)

    def _nothing(self) -> str:
        reasons = sorted(self.about["dropped"].items(), key=lambda item: -item[1][0])
        told = "; ".join(
            f"{count:,} {REASONS[name][0]} (the first: {example}): change {REASONS[name][1]}"
            for name, (count, example) in reasons[:4]
        )
        return f"no bucket has a sample: all {len(self.records):,} records were dropped. {told}."

    # ------------------------------------------------------------------------------------------------------- making

    def _write(self, folder: Path) -> None:
        reason, image, shapes = [], [], []
        hashes, planner = np.asarray(self.records.hashes), Planner(self.slot)
        for first, batch in self.records.chunks():
            part = hashes[first : first + len(batch)]
            columns = Columns.of(batch, exact=planner.compat)
            try:
                found = planner.shapes(batch, part) if self.table is None else self._placed(planner, columns)
            except UserError as error:
                raise UserError(f"records from {first} on: {error}") from None
            reason.append(found.reason)
            image.append(columns.is_image)
            shapes.append(np.stack([found.frames, found.height, found.width], axis=1))
        reasons, bucket, rows = np.concatenate(reason), *self._buckets(np.concatenate(reason), np.concatenate(shapes))
        counts = np.bincount(bucket[bucket >= 0], minlength=len(rows))
        kept = np.flatnonzero(bucket >= 0)
        small = kept[counts[bucket[kept]] < self.slot.min_bucket]
        reasons[small], bucket[small] = CODES["minority"], -1
        images = np.concatenate(image)
        with pa.ipc.new_file(str(folder / "plan.arrow"), SCHEMA) as file:
            columns_of = [pa.array(reasons), pa.array(images), pa.array(bucket.astype(np.int32))]
            file.write_batch(pa.record_batch(columns_of, schema=SCHEMA))
        about = {
            "shapes": rows.tolist(),
            "counts": np.bincount(bucket[bucket >= 0], minlength=len(rows)).tolist(),
            "images": int((images & (bucket >= 0)).sum()),
            "dropped": {
                name: (int((reasons == code).sum()), self.records.name(int(np.argmax(reasons == code))))
                for name, code in CODES.items()
                if name != KEPT and (reasons == code).any()
            },
        }
        (folder / "about.json").write_text(json.dumps(about))

    def _buckets(self, reason: np.ndarray, shapes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n,) the bucket of each record, -1 for none, and (buckets, 3) the shapes."""
        if self.table is not None:
            return np.where(reason == 0, shapes[:, 0], -1), shapes_of(self.table, self.slot)
        codes = (shapes[:, 0].astype(np.int64) << 40) | (shapes[:, 1].astype(np.int64) << 20) | shapes[:, 2]
        bucket = np.full(len(reason), -1)
        found, bucket[reason == 0] = np.unique(codes[reason == 0], return_inverse=True)
        return bucket, np.stack([found >> 40, (found >> 20) & 0xFFFFF, found & 0xFFFFF], axis=1)

    def _placed(self, planner: Planner, columns: Columns) -> Shapes:
        """Declared buckets: every record in the one that it goes to when the dice favour it; `frames` is its number."""
        reason = planner.own(columns)
        clips = clips_of(columns, self.slot)
        rows = np.flatnonzero(reason == 0)
        assert self.table is not None
        favoured = declared.place(
            self.table, declared.Clips(*(c[rows] for c in clips)), self.slot.buckets.frame_interval, self._favour
        )
        reason[rows[favoured < 0]] = CODES["no_bucket"]
        number = np.zeros(len(reason), np.int32)
        number[rows] = np.maximum(favoured, 0)
        nothing = np.zeros_like(number)
        return Shapes(reason, number, nothing, nothing, clips.frames)

    def _favour(self, rows: np.ndarray, number: int, which: int) -> np.ndarray:
        assert self.table is not None
        skips = self.table.rules == "2.0" and self.table.cells[number].length is not None and which == 0
        return np.full(len(rows), 1.0 if skips else 0.0)


def table_of(slot: BucketedVideos) -> declared.Table | None:
    """The declared table of a slot; its lengths must be ones that the autoencoder knows."""
    if slot.buckets.declared is None:
        return None
    found = declared.table(declared.read(slot.buckets.declared), slot.buckets.declared_rules)
    for cell in found.cells:
        if (cell.frames - 1) % slot.time_stride:
            near = (cell.frames - 1) // slot.time_stride * slot.time_stride + 1
            raise UserError(
                f"{slot.buckets.declared}: {cell.frames} frames at {cell.resolution}: lengths are {slot.time_stride} k "
                f"+ 1 for the autoencoder; take {near}."
            )
    return found


def shapes_of(table: declared.Table, slot: BucketedVideos) -> np.ndarray:
    """(buckets, 3) of a declared table, with sides cut to the stride."""
    rows = table.buckets()
    rows[:, 1:] = rows[:, 1:] // slot.hw_stride * slot.hw_stride
    if not rows.all():
        raise UserError(f"a resolution of the declared table is smaller than data.hw_stride = {slot.hw_stride}.")
    return rows


def clips_of(columns: Columns, slot: BucketedVideos) -> declared.Clips:
    """What a declared table looks at."""
    length = np.nan_to_num(clip_length(columns.numbers, False)).astype(np.int64)
    if slot.buckets.declared_rules == "2.0":
        fps = np.nan_to_num(columns.numbers["fps"], nan=slot.buckets.fps_max)
        length = declared.sampled(length, fps, slot.buckets.fps_max)
    height, width = picture(columns.numbers, False)
    return declared.Clips(np.where(columns.is_image, 1, length), np.nan_to_num(height), np.nan_to_num(width))


def shape_name(shape: np.ndarray) -> str:
    """93x352x640."""
    return "x".join(map(str, shape.tolist()))


def _data_txt(slot: BucketedVideos) -> Path:
    if slot.root is None:
        raise UserError("no data were named: --data-root takes data.txt, a line ROOT,ANNOTATION for each source.")
    file = slot.root / "data.txt" if slot.root.is_dir() else slot.root
    if not file.is_file():
        raise UserError(f"{file} is not there; expected data.txt, a line ROOT,ANNOTATION for each source.")
    return file


__all__ = ["Planned", "Records", "shape_name"]

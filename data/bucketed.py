"""The dataset of planned images and videos: every sample comes in the shape of its bucket.

Items are numbered so that one says which bucket it is read for: item = record + records · (bucket + 1). A plain number
below `len` is the record in the bucket that its own shape gives.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from core.hashing import hash_of, mix64_array
from data import video
from data.annotations import resolved
from data.pictures import WEB_FORMATS, decoded
from data.plan import declared
from data.plan.captions import caption
from data.plan.frames import NoClip, clip_of, indices, spaced
from data.plan.kinds import IMAGES, suffix_of
from data.plan.planned import Planned, clips_of, shape_name
from data.plan.records import Record
from data.plan.rules import Columns, resized
from data.plan.updates import Micro, Updates, costs, micro_of, update_sizes
from data.samples import BadSample, Sample, Samples

if TYPE_CHECKING:
    from data.bucketed_slots import BucketedVideos

FRAMES_AT_ONCE = 8
"""Frames that are resized at a time: they are float meanwhile."""


class Names(Sequence[str]):
    """Names of items, read when asked for."""

    def __init__(self, planned: Planned, rows: np.ndarray):
        self.planned, self.rows = planned, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: Any) -> Any:
        if isinstance(item, slice):
            return [self[number] for number in range(*item.indices(len(self)))]
        return self.planned.records.name(int(self.rows[item % len(self.rows)]))


class BucketedClips(Samples):
    """The dataset of a `BucketedVideos` slot.

    A sample: `pixel_values` float32 (3, T, H, W) in [-1, 1] of its bucket's shape, `caption`, and `bucket` ("TxHxW").
    Raises UserError for data.txt and annotations that cannot be read, and where no bucket has a sample.
    """

    def __init__(self, slot: BucketedVideos):
        self.slot = slot
        self.planned = Planned(slot)
        self.rows = self.planned.kept()
        self.shapes = self.planned.shapes
        plan = self.planned.columns
        self.own = plan.column("bucket").to_numpy()[self.rows]  # (n,) int32
        self._hashes = np.asarray(self.planned.records.hashes)[self.rows]
        kinds = plan.column("image").to_numpy(zero_copy_only=False)[self.rows]
        self._images = np.zeros(len(self.shapes), bool)
        self._images[self.own[kinds]] = True
        table = self.planned.table
        self.fixed = table is None or table.fixed
        names = Names(self.planned, self.rows)
        super().__init__(names, fingerprint=self.planned.fingerprint(), dropped=self.planned.dropped())

    # ------------------------------------------------------------------------------------------------------ updates

    def updates(self, seed: int, global_batch: int) -> Updates:
        """The stream of updates for the loop. Raises UserError where sizes do not fit."""
        slot, cost = self.slot.buckets, costs(self.slot.buckets, self.planned.tokens())
        table = self.planned.table
        names = [shape_name(shape) for shape in self.shapes]
        sizes = update_sizes(slot, names, cost, global_batch, None if table is None else table.batches())
        found = Updates(self, slot, sizes, cost, seed)
        found.update((0, 0))  # a plan without an update is refused here
        return found

    def micro(self, micro_batch: int, memory: int | None) -> Micro:
        """What one rank holds at a time of samples of a cost. `memory`: bytes of its device, None where unknown."""
        return micro_of(self.slot.buckets, micro_batch, memory)

    def lines(self) -> Iterator[str]:
        """The table of buckets and dropped records, for people."""
        return self.planned.lines()

    def hashes(self) -> np.ndarray:
        """(n,) uint64, one a sample."""
        return self._hashes

    id_hashes = hashes

    def images(self) -> np.ndarray:
        """(buckets,) whether a bucket's samples are images."""
        return self._images

    def item(self, number: np.ndarray, bucket: int) -> np.ndarray:
        """Items of samples that are read for a bucket."""
        return number + len(self) * (bucket + 1)

    def buckets(self, seed: int, epoch: int) -> np.ndarray:
        """(n,) the bucket of each sample in an epoch, -1 for none: its own, or what the declared table draws."""
        table = self.planned.table
        if table is None or self.fixed:
            return self.own
        salt = hash_of("bucket", seed, epoch)

        def chance(rows: np.ndarray, number: int, which: int) -> np.ndarray:
            mixed = mix64_array(self._hashes[rows] ^ np.uint64(hash_of(salt, number, which)))
            return (mixed >> np.uint64(11)) * 2.0**-53

        return declared.place(table, self._clips, self.slot.buckets.frame_interval, chance)

    @functools.cached_property
    def _clips(self) -> declared.Clips:
        parts = [clips_of(Columns.of(batch, exact=False), self.slot) for _, batch in self.planned.records.chunks()]
        return declared.Clips(*(np.concatenate(column)[self.rows] for column in zip(*parts, strict=True)))

    # ------------------------------------------------------------------------------------------------------ reading

    def read(self, index: int, rng: np.random.Generator) -> Sample:
        """Frames, then a crop of the file's picture, then the resize to the bucket's shape; then the caption."""
        number, bucket = index % len(self), index // len(self) - 1
        record = self.planned.records[int(self.rows[number])]
        shape = self.shapes[int(self.own[number]) if bucket < 0 else bucket]
        is_image = suffix_of(record.path) in IMAGES
        frames = self._picture(record) if is_image else self._frames(record, int(shape[0]), rng)  # (T, h, w, 3) uint8
        pixels = shaped(self._cropped(record, frames), shape, self.slot)
        text = caption(
            record.captions or [""], is_image, record.aesthetic, self.slot.captioning, rng, bool(self.slot.compat)
        )
        return {"pixel_values": pixels, "caption": text, "bucket": shape_name(shape)}

    def stand_in(self, index: int, chance: int) -> int:
        """Another sample of the same bucket: one that has its shape by itself."""
        number, bucket = index % len(self), index // len(self) - 1
        order, starts = self._by_own
        wanted = int(self.own[number]) if bucket < 0 else bucket
        first, last = int(starts[wanted]), int(starts[wanted + 1])
        other = int(order[first + chance % (last - first)]) if last > first else number
        return int(self.item(np.array(other), wanted))

    @functools.cached_property
    def _by_own(self) -> tuple[np.ndarray, np.ndarray]:
        order = np.argsort(self.own, kind="stable")
        return order, np.searchsorted(self.own[order], np.arange(len(self.shapes) + 1))

    def describe(self) -> dict[str, str | int]:
        """The base's figures, and the buckets."""
        used = int((np.bincount(self.own, minlength=len(self.shapes)) > 0).sum())
        return super().describe() | {"buckets": used, "plan": str(self.planned.folder)}

    def _picture(self, record: Record) -> np.ndarray:
        return np.asarray(decoded(self._file(record), record.path, formats=WEB_FORMATS))[None]

    def _frames(self, record: Record, planned: int, rng: np.random.Generator) -> np.ndarray:
        clip = clip_of(record.cut, record.num_frames, record.fps, bool(self.slot.compat))
        try:
            packets = video.scan(self._file(record))
            if not self.slot.compat:  # annotations are often a frame or two off
                clip = clip.within(len(packets.stamps))
            if self.planned.table is None:
                chosen = indices(clip, planned, self.slot, rng)
            else:
                chosen = spaced(clip, planned, self.slot, rng)
            if (last := int(chosen.max())) >= len(packets.stamps):
                raise NoClip(f"has {len(packets.stamps)} frames, and the annotation counts on frame {last + 1}")
            return video.decode(
                self._file(record), packets, chosen, lambda h, w: (h, w), strict=self.slot.decoder == "pyav"
            )
        except (video.Unreadable, NoClip) as fault:
            raise BadSample(record.path, str(fault)) from None

    def _cropped(self, record: Record, frames: np.ndarray) -> np.ndarray:
        """The record's part of the picture; its size must be what was planned with."""
        if record.crop is not None:
            x0, x1, y0, y1 = record.crop
            if x1 > frames.shape[2] or y1 > frames.shape[1]:
                raise BadSample(record.path, f"is {list(frames.shape[1:3])}, and its crop goes to {[y1, x1]}")
            frames = frames[:, y0:y1, x0:x1]
        by_crop = record.crop is not None and not self.slot.compat
        if not by_crop and record.size is not None and record.size != frames.shape[1:3]:
            raise BadSample(record.path, f"is {list(frames.shape[1:3])}, and the annotation says {list(record.size)}")
        return frames

    def _file(self, record: Record) -> Path:
        path = resolved(record.path, record.root)
        if path is None:
            raise BadSample(record.path, "is a link that leaves the root")
        if not path.is_file():
            raise BadSample(record.path, "is not a file" if path.exists() else "does not exist")
        return path

    def __getstate__(self) -> dict[str, Any]:
        """Workers map the plan for themselves."""
        return {name: value for name, value in super().__getstate__().items() if name not in ("_clips", "_by_own")}


# ---- geometry -------------------------------------------------------------------------------------------------------


def shaped(frames: np.ndarray, shape: np.ndarray, slot: BucketedVideos) -> Tensor:
    """(T, h, w, 3) uint8 → float32 (3, T, H, W) in [-1, 1] (Open-Sora sheet §4.3): a bilinear resize with antialiasing
    and aligned corners, and a centre crop; after the resize, or before it with force_resolution.
    """
    high, wide = int(shape[1]), int(shape[2])
    if slot.force_resolution and slot.buckets.declared is None:
        frames = fitting(frames, high / wide)
        sides = (high, wide)
    else:
        sides = covering(frames.shape[1], frames.shape[2], high, wide, slot)
    top, left = (sides[0] - high) // 2, (sides[1] - wide) // 2
    out = torch.empty(3, len(frames), high, wide)
    for start in range(0, len(frames), FRAMES_AT_ONCE):
        part = torch.from_numpy(np.array(frames[start : start + FRAMES_AT_ONCE]))  # crops are no whole arrays
        pixels = part.permute(0, 3, 1, 2).float() / 255  # (t, 3, h, w)
        if tuple(pixels.shape[-2:]) != sides:
            pixels = functional.interpolate(pixels, sides, mode="bilinear", align_corners=True, antialias=True)
        cropped = pixels[..., top : top + high, left : left + wide]
        out[:, start : start + len(part)] = cropped.transpose(0, 1)
    return out.mul_(2).sub_(1)


def covering(height: int, width: int, high: int, wide: int, slot: BucketedVideos) -> tuple[int, int]:
    """Sides after the resize, of which the bucket's shape is the centre."""
    if slot.buckets.declared is None:
        sides = resized(np.array([float(height)]), np.array([float(width)]), slot)
        return int(sides[0][0]), int(sides[1][0])
    scale = max(high / height, wide / width)
    return max(high, round(height * scale)), max(wide, round(width * scale))


def fitting(frames: np.ndarray, aspect: float) -> np.ndarray:
    """The largest centre of a height to width of `aspect`."""
    height, width = frames.shape[1:3]
    high, wide = (int(width * aspect), width) if height / width > aspect else (height, int(height / aspect))
    top, left = round((height - high) / 2), round((width - wide) / 2)
    return frames[:, top : top + high, left : left + wide]

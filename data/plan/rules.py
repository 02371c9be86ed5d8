"""Which records are trained on, and in which shape: the rules of the planner, over columns (Open-Sora sheet §4.3-4).

`compat="osp-1.3"` is the original's arithmetic, test by test; without it the sheet's fixes hold.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from core.errors import UserError
from core.hashing import hash_of, mix64_array
from data.plan.kinds import IMAGES, VIDEOS

if TYPE_CHECKING:
    from data.bucketed_slots import BucketedVideos

SEED = 42  # of the original's draws for short clips
FPS = 24.0  # of a record without one, as the original plans it
DEFAULT_FRAMES = 29
"""The shortest clip that the original trains on, in frames after resampling."""
SMALL = 1e-6
"""Of a pixel or a frame: what is that near below a whole number counts as it."""

KEPT = "kept"
REASONS: dict[str, tuple[str, str]] = {
    KEPT: ("kept", ""),
    "no_path": ("no path", "the annotations"),
    "path_leaves_root": ("a path that leaves the root", "the annotations"),
    "unknown_kind": ("neither an image nor a video by its ending", "the annotations"),
    "no_cap": ("no caption", "the annotations"),
    "bad_crop": ("a crop that is not x0, x1, y0, y1 within the picture", "the annotations"),
    "no_resolution": ("no resolution", "data.probe (True asks the files)"),
    "bad_cut": ("a cut that is not start, end with 0 <= start < end", "the annotations"),
    "no_num_frames": ("a video without num_frames", "data.probe (True asks the files)"),
    "aesthetic": ("an aesthetic score out of bounds", "data.min_aesthetic"),
    "tech": ("a technical score out of bounds", "data.min_tech"),
    "motion": ("a motion score out of bounds", "data.min_motion and data.max_motion"),
    "res_mismatch_stride": ("smaller than one stride", "data.hw_stride"),
    "res_too_small": ("too few pixels", "data.min_hxw"),
    "side_too_short": ("a side too short", "data.min_height and data.min_width"),
    "aspect_mismatch": ("too wide or too high", "data.max_aspect"),
    "too_long": ("too long", "data.too_long"),
    "too_short": ("too short", "data.num_frames, data.min_frames and data.drop_short_ratio"),
    "no_bucket": ("in no bucket of the table", "data.buckets.declared"),
    "minority": ("in a bucket of too few", "data.min_bucket"),
}
"""Reason → what it means, and what to change. The order is that of the tests."""
CODES = {name: code for code, name in enumerate(REASONS)}


Drop = Callable[[str, np.ndarray], None]


class Columns(NamedTuple):
    """Columns of a batch as arrays: NaN for what is missing, so that a comparison with it is False."""

    is_image: np.ndarray
    is_video: np.ndarray
    has_path: np.ndarray
    leaves_root: np.ndarray
    has_captions: np.ndarray
    numbers: dict[str, np.ndarray]

    @classmethod
    def of(cls, batch: pa.RecordBatch, exact: bool) -> Columns:
        """`exact`: .jpg and .mp4 alone are kinds, in small letters."""
        path = batch.column("path").fill_null("")
        lower = path if exact else pc.utf8_lower(path)
        images, videos = ((".jpg",), (".mp4",)) if exact else (IMAGES, VIDEOS)
        names = [field.name for field in batch.schema if field.name not in ("source", "path", "captions")]
        floats = (batch.column(name).cast(pa.float64()).fill_null(float("nan")) for name in names)
        return cls(
            is_image=_ends(lower, images),
            is_video=_ends(lower, videos),
            has_path=_array(pc.not_equal(path, "")),
            leaves_root=_array(pc.match_substring_regex(path, r"^/|(^|/)\.\.(/|$)|\x00|^[A-Za-z][A-Za-z0-9+.-]*://")),
            has_captions=_array(batch.column("captions").is_valid()),
            numbers={name: column.to_numpy(zero_copy_only=False) for name, column in zip(names, floats, strict=True)},
        )


def _array(mask: pa.Array) -> np.ndarray:
    return mask.to_numpy(zero_copy_only=False).astype(bool)


def _ends(paths: pa.Array, endings: tuple[str, ...]) -> np.ndarray:
    return np.logical_or.reduce([_array(pc.ends_with(paths, ending)) for ending in endings])


class Shapes(NamedTuple):
    """(n,) each: the code of a reason, and what a kept record is trained as; `resampled` is its frames before they
    are cut to a length."""

    reason: np.ndarray  # int8
    frames: np.ndarray  # int32
    height: np.ndarray  # int32
    width: np.ndarray  # int32
    resampled: np.ndarray  # int64


class Planner:
    """Shapes for batch after batch of records; it counts the draws of the original's generator."""

    def __init__(self, rules: BucketedVideos):
        self.rules, self.compat = rules, rules.compat == "osp-1.3"
        self.draws = np.random.RandomState(SEED)

    def shapes(self, batch: pa.RecordBatch, hashes: np.ndarray) -> Shapes:
        """The batch's shapes. Under `compat` raises UserError where the original fails."""
        columns = Columns.of(batch, exact=self.compat)
        reason = self.own(columns)
        drop = functools.partial(_drop, reason)
        height, width = (np.where(np.isnan(side), 1, side) for side in picture(columns.numbers, self.compat))
        with np.errstate(invalid="ignore", divide="ignore"):
            planned = self._spatial(height, width, drop, reason)
        if self.compat and (odd := (reason == 0) & ~(columns.is_image | columns.is_video)).any():
            raise UserError(
                f"record {int(np.argmax(odd))} of a batch is neither .jpg nor .mp4, on which the original fails"
            )
        frames, count = self._temporal(columns, hashes, drop, reason)
        high, wide = (np.where(reason == 0, side, 0).astype(np.int32) for side in planned)
        return Shapes(reason, np.where(reason == 0, frames, 0).astype(np.int32), high, wide, count)

    def own(self, columns: Columns) -> np.ndarray:
        """(n,) int8: what fails before shapes are asked for."""
        reason = np.zeros(len(columns.is_image), np.int8)
        drop = functools.partial(_drop, reason)
        if not self.compat:
            drop("no_path", ~columns.has_path)
            drop("path_leaves_root", columns.leaves_root)
            drop("unknown_kind", ~(columns.is_image | columns.is_video))
        drop("no_cap", ~columns.has_captions)
        if not self.compat:
            drop("bad_crop", ~np.isnan(columns.numbers["x0"]) & outside(columns.numbers))
        height, width = picture(columns.numbers, self.compat)
        drop("no_resolution", np.isnan(height) | np.isnan(width))
        if not self.compat:
            drop("no_resolution", (height <= 0) | (width <= 0))
            self._refused(columns, drop)
        return reason

    def _refused(self, columns: Columns, drop: Drop) -> None:
        """What the original never looks at."""
        rules, has = self.rules, columns.numbers
        drop("bad_cut", ~np.isnan(has["cut_start"]) & ~((has["cut_start"] >= 0) & (has["cut_end"] > has["cut_start"])))
        drop("no_num_frames", columns.is_video & ~(clip_length(has, False) > 0))
        for name, low, high in (
            ("aesthetic", rules.min_aesthetic, None),
            ("tech", rules.min_tech, None),
            ("motion", rules.min_motion, rules.max_motion),
        ):
            if low is not None:
                drop(name, ~(has[name] >= low) & ~(columns.is_image & (name == "motion")))
            if high is not None:
                drop(name, ~(has[name] <= high) & ~(columns.is_image & (name == "motion")))

    # -------------------------------------------------------------------------------------------------------- space

    def _spatial(
        self, height: np.ndarray, width: np.ndarray, drop: Drop, reason: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        rules = self.rules
        if rules.force_resolution:
            target_height, target_width = rules.target()
            if self.compat and ((reason == 0) & (width == 0)).any():
                raise UserError("a record has a width of 0, on which the original fails")
            wanted, shape = target_height / target_width, height / width
            drop("aspect_mismatch", ~((shape >= wanted / rules.max_aspect) & (shape <= wanted * rules.max_aspect)))
            return np.full(len(height), target_height), np.full(len(height), target_width)
        drop("no_resolution", (height <= 0) | (width <= 0))
        high, wide = resized(height, width, rules)
        high, wide = high // rules.hw_stride * rules.hw_stride, wide // rules.hw_stride * rules.hw_stride
        drop("res_mismatch_stride", (high <= 0) | (wide <= 0))
        drop("res_too_small", high * wide < rules.least_area())
        tested = high / wide if self.compat else height / width  # the original tests what its rounding left
        drop("aspect_mismatch", ~((tested >= 1 / rules.max_aspect) & (tested <= rules.max_aspect)))
        drop("side_too_short", (high < (rules.min_height or 0)) | (wide < (rules.min_width or 0)))
        return high, wide

    # --------------------------------------------------------------------------------------------------------- time

    def _temporal(
        self, columns: Columns, hashes: np.ndarray, drop: Drop, reason: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Frames of each clip, and how many it has after resampling."""
        rules, video = self.rules, columns.is_video
        length = clip_length(columns.numbers, self.compat)
        if self.compat and ((reason == 0) & video & np.isnan(length)).any():
            raise UserError("a video has no num_frames, on which the original fails")
        interval = intervals(columns.numbers["fps"], rules)
        ratio = np.nan_to_num(columns.numbers["fps"], nan=self._missing_fps()) / rules.train_fps
        if rules.too_long is not None:
            drop("too_long", video & (length > rules.too_long * rules.num_frames * ratio * rules.speed_factor))
        count = np.where(video, resampled(np.nan_to_num(length), interval, self.compat), 1).astype(np.int64)
        short = video & (count < rules.num_frames)
        drop("too_short", short & (self._chances(short & (reason == 0), hashes) < rules.drop_short_ratio))
        frames = legal(np.minimum(count, rules.num_frames), rules)
        drop("too_short", video & (frames < 1))
        return np.where(video, frames, 1), count

    def _missing_fps(self) -> float:
        """A record without a rate is taken as it is, frame by frame; the original plans it with 24."""
        return FPS if self.compat else self.rules.train_fps

    def _chances(self, asked: np.ndarray, hashes: np.ndarray) -> np.ndarray:
        """A uniform number for each short clip: a record's own, or the original's next."""
        if not self.compat:
            return (mix64_array(hashes ^ np.uint64(hash_of("short", SEED))) >> np.uint64(11)) * 2.0**-53
        numbers = np.ones(len(hashes))
        words = self.draws.randint(0, 2**32, int(asked.sum()), dtype=np.uint32)
        numbers[asked] = (words & np.uint32(0xFFFFFF)) / 2.0**24  # as torch makes a float of 32 random bits
        return numbers


def _drop(reason: np.ndarray, name: str, mask: np.ndarray) -> None:
    """The first test that a record fails is its reason."""
    reason[(reason == 0) & mask] = CODES[name]


def picture(has: dict[str, np.ndarray], compat: bool) -> tuple[np.ndarray, np.ndarray]:
    """Height and width that are planned with: the crop's, where there is one. The original never looks at the crop."""
    if compat:
        return has["height"], has["width"]
    cropped = ~np.isnan(has["x0"])
    return (
        np.where(cropped, has["y1"] - has["y0"], has["height"]),
        np.where(cropped, has["x1"] - has["x0"], has["width"]),
    )


def outside(has: dict[str, np.ndarray]) -> np.ndarray:
    """Crops that are no part of the picture. `resolution` may be that of the cropped picture already, as the original
    wants it written; then the file alone can say.
    """
    odd = (has["x0"] < 0) | (has["y0"] < 0) | ~(has["x0"] < has["x1"]) | ~(has["y0"] < has["y1"])
    whole = (has["x1"] - has["x0"] == has["width"]) & (has["y1"] - has["y0"] == has["height"])
    found: np.ndarray = odd | ((has["x1"] > has["width"]) | (has["y1"] > has["height"])) & ~whole
    return found


def clip_length(has: dict[str, np.ndarray], compat: bool) -> np.ndarray:
    """Frames of the file that a clip may take, from the cut's start; the original ignores the cut's end."""
    if compat:
        return has["num_frames"]
    cut = has["cut_end"] - has["cut_start"]
    return np.fmin(has["num_frames"], cut)


def intervals(fps: np.ndarray, rules: BucketedVideos) -> np.ndarray:
    """Frames of the file to a frame of the clip; 1 where the rates are within 0.1 of each other."""
    rate = np.nan_to_num(fps, nan=FPS if rules.compat else rules.train_fps)
    return np.where(np.abs(rate - rules.train_fps) < 0.1, 1.0, rate / rules.train_fps)


def resampled(length: np.ndarray, interval: np.ndarray, compat: bool) -> np.ndarray:
    """How many frames `length` frames of the file give."""
    return np.ceil(length / interval - (0.0 if compat else SMALL)).astype(np.int64)


def legal(frames: np.ndarray, rules: BucketedVideos) -> np.ndarray:
    """The largest length of at most `frames` that the autoencoder and the sequence groups can split; 0 for none.

    (y - 1) is a multiple of the time stride, and the latent frames one of the ranks that share a sequence.
    """
    step = rules.time_stride * rules.sequence
    first = 1 + rules.time_stride * (rules.sequence - 1)  # the shortest: as many latent frames as ranks
    found = np.where(frames >= first, (frames - first) // step * step + first, 0)
    return np.where(found >= rules.least_frames(), found, 0)


def resized(height: np.ndarray, width: np.ndarray, rules: BucketedVideos) -> tuple[np.ndarray, np.ndarray]:
    """Whole sides after the resize and before the crop to the stride. Nothing is made larger."""
    scale = np.sqrt(rules.max_hxw / (height * width)) if rules.max_hxw else np.ones(len(height))
    if rules.compat:
        larger = height * width > (rules.max_hxw or 0)
        return np.where(larger, np.trunc(height * scale), height), np.where(larger, np.trunc(width * scale), width)
    if rules.max_height is not None:
        scale = np.minimum(scale, rules.max_height / height)
    if rules.max_width is not None:
        scale = np.minimum(scale, rules.max_width / width)
    scale = np.minimum(scale, 1.0)
    return np.floor(height * scale + SMALL), np.floor(width * scale + SMALL)

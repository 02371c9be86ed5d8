"""Which frames of a file a clip is made of (Open-Sora sheet §4.4, §4.5)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from data.plan.rules import SMALL, intervals, legal, resampled

if TYPE_CHECKING:
    from data.bucketed_slots import BucketedVideos


class Clip(NamedTuple):
    """What the annotation says of a clip: its first frame in the file, its length there, and the file's rate."""

    start: int
    length: int
    fps: float | None

    def within(self, frames: int) -> Clip:
        """What of it a file of so many frames has. Raises NoClip."""
        if self.start >= frames:
            raise NoClip(f"has {frames} frames, and its cut starts at frame {self.start}")
        return self._replace(length=min(self.length, frames - self.start))


class NoClip(ValueError):
    """The reason why a clip cannot be read as it was planned."""


def clip_of(cut: tuple[int, int] | None, num_frames: int | None, fps: float | None, compat: bool) -> Clip:
    """The clip of a record that was planned. The original ignores where the cut ends."""
    start, end = (0, None) if cut is None else cut
    ends = [num_frames] if compat or end is None else [num_frames, end - start]
    return Clip(start, min(count for count in ends if count is not None), fps)


def indices(clip: Clip, planned: int, rules: BucketedVideos, rng: np.random.Generator) -> np.ndarray:
    """(planned,) frames of the file: resampled to the rate, thinned out by the speed factor, a window that `rng` draws.

    Raises NoClip where the original fails, under `compat` alone.
    """
    if rules.compat:
        found = every(clip, rules, at_read=True)
        last = max(0, len(found) - rules.num_frames - 1)  # one too early: the last legal start is never drawn
        start = int(rng.integers(0, last + 1)) if len(found) > rules.num_frames else 0
        return cut_to_length(found[start : start + rules.num_frames], planned, rules)
    found = every(clip, rules, at_read=True)
    if len(found) < planned:
        raise NoClip(f"has {len(found)} frames after resampling, and {planned} were planned")
    start = int(rng.integers(0, len(found) - planned + 1))
    return found[start : start + planned]


def every(clip: Clip, rules: BucketedVideos, *, at_read: bool) -> np.ndarray:
    """All frames that a window may be taken from; the original plans without its speed factor."""
    interval = float(intervals(np.array([np.nan if clip.fps is None else clip.fps]), rules)[0])
    if rules.compat:
        if at_read and clip.fps is None:
            raise NoClip("has no fps, without which the original cannot read it")
        found = np.arange(clip.start, clip.start + clip.length, interval).astype(np.int64)
    else:
        count = int(resampled(np.array([clip.length], float), np.array([interval]), False)[0])
        found = clip.start + np.floor(np.arange(count) * interval + SMALL).astype(np.int64)
        found = np.minimum(found, clip.start + clip.length - 1)
    if at_read and rules.speed_factor > 1 and len(found) > rules.num_frames:
        found = found[np.linspace(0, len(found) - 1, _sped_up(len(found), rules), dtype=np.int64)]
    return found


def _sped_up(count: int, rules: BucketedVideos) -> int:
    """Frames that are left of `count`. The original's quotient of a quotient can be one less than num_frames."""
    if rules.compat:
        return int(count / min(rules.speed_factor, count / rules.num_frames))
    if count <= rules.num_frames * rules.speed_factor:
        return rules.num_frames
    return int(count / rules.speed_factor + SMALL)


def cut_to_length(window: np.ndarray, planned: int, rules: BucketedVideos) -> np.ndarray:
    """The window cut to a legal length, which must be the planned one. Raises NoClip."""
    if len(window) < rules.num_frames and rules.drop_short_ratio == 1:
        raise NoClip(f"is read with {len(window)} frames, and num_frames is {rules.num_frames}")
    length = int(legal(np.array([len(window)]), rules)[0])
    if not length:
        raise NoClip(f"is read with {len(window)} frames, too few for any length")
    if length != planned:
        raise NoClip(f"is read with {length} frames, and {planned} were planned")
    return window[:length]


def spaced(clip: Clip, planned: int, rules: BucketedVideos, rng: np.random.Generator) -> np.ndarray:
    """(planned,) frames of the file for a declared bucket, at whole intervals; the window's start is drawn."""
    slot = rules.buckets
    interval = slot.frame_interval
    if slot.declared_rules == "2.0":
        interval = math.ceil(clip.fps / slot.fps_max) if clip.fps is not None and clip.fps > slot.fps_max else 1
    room = clip.length - (planned - 1) * interval
    if room < 1:
        raise NoClip(f"has {clip.length} frames, too few for {planned} at an interval of {interval}")
    return clip.start + int(rng.integers(0, room)) + np.arange(planned) * interval

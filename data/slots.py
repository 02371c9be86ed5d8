"""Data slots: where samples come from, and how a clip is cut from them. Nothing here imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from core.slots import Data
from data.bucketed_slots import BucketedVideos, Buckets, Captioning

__all__ = ["Base64Parts", "BucketedVideos", "Buckets", "CaptionedVideos", "Captioning", "FrameFolders"]


class FrameFolders(Data):
    """Clips as folders of frame images, in the layout of Sky Timelapse or UCF-101."""

    root: Path | None = None
    """Folder of the dataset. None: a small synthetic sky, made on first use."""
    layout: Literal["sky", "ucf101"] = "sky"
    """sky: root/split/video/clip/frames; ucf101: root/split/v_Class_g01_c01/frames."""
    split: str = "train"
    """Sub-folder: train, test, all (both), or empty (none)."""
    held_out_split: str = "test"
    """The split of validation, unless it has data of its own."""
    num_frames: int = 16
    """Frames of a clip, in pixels' time."""
    frame_stride: int = 1
    """Take every this many frames."""
    resolution: int = 256
    """Height and width of a clip."""
    spatial_transform: Literal["center_crop_resize", "resize", "random_crop", "none"] = "center_crop_resize"
    """center_crop_resize: shorter side to the resolution, then the centre; random_crop: one crop a clip, not resized.
    """
    temporal_transform: Literal["rand_clips", "windows"] = "rand_clips"
    """rand_clips: one random window of a clip folder; windows: all windows, one after the other."""
    clip_step: int | None = None
    """windows: frames from one window's start to the next. None: the length of a window."""
    max_bad_share: float = 0.05
    """The run stops when more than this share of the samples cannot be read."""

    def check(self) -> None:
        for name in ("num_frames", "frame_stride", "resolution"):
            if getattr(self, name) < 1:
                self.refuse(name, "must be at least 1")
        if self.clip_step is not None and self.clip_step < 1:
            self.refuse("clip_step", "must be at least 1")
        if not 0.0 <= self.max_bad_share <= 1.0:
            self.refuse("max_bad_share", "must be in [0, 1]")

    def build(self) -> Any:
        from data.frames import FrameClips

        return FrameClips(self)

    def held_out(self) -> Self:
        return self.but(split=self.held_out_split)

    def clip_shape(self) -> tuple[int, int, int]:
        return self.num_frames, self.resolution, self.resolution

    def needs(self) -> Path | None:
        return self.root


class CaptionedVideos(Data):
    """Captioned video files in the manner of WebVid: a table of captions and paths, or a folder of videos."""

    since: ClassVar[dict[str, Any]] = {
        "missing": "replace",
        "max_samples": None,
        "subset": "random",
        "subset_seed": 0,
        "short_clips": "reject",
        "horizontal_flip": 0.0,
        "flip_sided": False,
    }

    root: Path | None = None
    """Folder of the videos. None: small synthetic clouds with captions, made on first use."""
    annotations: Path | None = None
    """Table of captions and paths; {split} in its name stands for the split. None: <split>.csv or <split>.jsonl in the
    root, else the only table there, else the root's videos with their sidecars (clip.mp4, clip.txt)."""
    layout: Literal["auto", "csv", "jsonl", "folder"] = "auto"
    """What the annotations are. auto: looked up and told."""
    path: str | None = None
    """Column of the path below the root, or a template of columns ({page_dir}/{videoid}.mp4). None: contentUrl in csv,
    afs_path in json-lines."""
    caption: str = "name"
    """Column of the caption."""
    split: str = "train"
    """The part that is read; all: everything."""
    held_out_split: str = "test"
    """The split of validation, unless it has data of its own."""
    held_out_share: float = 0.05
    """Where nothing on disk is split: the share of the videos that is held out, by a hash of their paths."""
    missing: Literal["replace", "leave_out"] = "replace"
    """Rows whose file is not there. replace: bad samples when they are read; leave_out: found at the start, counted."""
    max_samples: int | None = None
    """Train on exactly this many rows, or on all where there are fewer; held-out ones are not counted. None: all."""
    subset: Literal["random", "head"] = "random"
    """max_samples: those lowest by a hash of their paths, so that more include fewer; or the first rows of the table.
    """
    subset_seed: int = 0
    """subset random: another seed, another subset."""
    num_frames: int = 16
    """Frames of a clip, in pixels' time."""
    frame_stride: int = 1
    """Take every this many frames, of the file or of fps."""
    fps: float | None = None
    """Frames a second before the stride, by time stamp. None: as the file has them."""
    short_clips: Literal["reject", "stretch"] = "reject"
    """Videos shorter than a clip. reject: bad samples, counted; stretch: their whole length, spread over the clip."""
    resolution: int | tuple[int, int] = 256
    """Height and width of a clip; one number for a square."""
    spatial_transform: Literal["center_crop_resize", "random_crop_resize", "resize", "random_crop", "none"] = (
        "center_crop_resize"
    )
    """…_crop_resize: as small as covers the resolution, then one crop; resize: squashed; random_crop: not resized."""
    horizontal_flip: float = 0.0
    """Probability that a training clip is mirrored, all its frames together."""
    flip_sided: bool = False
    """Mirror also clips whose captions speak of sides: left, right, clockwise."""
    decoder: Literal["decord", "pyav"] = "decord"
    """decord: where it finds frames exactly, else PyAV; pyav: always, which also refuses damaged frames."""
    max_bad_share: float = 0.05
    """The run stops when more than this share of the samples cannot be read."""

    def check(self) -> None:
        for name in ("num_frames", "frame_stride"):
            if getattr(self, name) < 1:
                self.refuse(name, "must be at least 1")
        if min(self.clip_shape()) < 1:
            self.refuse("resolution", "must be at least 1")
        if self.fps is not None and self.fps <= 0:
            self.refuse("fps", "must be above 0")
        if self.max_samples is not None and self.max_samples < 1:
            self.refuse("max_samples", "must be at least 1, or None for all")
        for name in ("max_bad_share", "held_out_share", "horizontal_flip"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                self.refuse(name, "must be in [0, 1]")
        if self.layout == "folder" and self.annotations is not None:
            self.refuse("annotations", "a plain folder has none: leave it out, or choose another layout")

    def build(self) -> Any:
        from data.captioned import CaptionedClips

        return CaptionedClips(self)

    def held_out(self) -> Self:
        return self.but(split=self.held_out_split, max_samples=None, horizontal_flip=0.0)

    def clip_shape(self) -> tuple[int, int, int]:
        sides = self.resolution if isinstance(self.resolution, tuple) else (self.resolution, self.resolution)
        return self.num_frames, *sides

    def needs(self) -> Path | None:
        return self.root


class Base64Parts(Data):
    """Pictures with captions in parts of text lines (LAION-400M's: caption and base64), or in tar shards."""

    root: Path | None = None
    """Folder that all parts are below; a list of lists, a glob of parts, or one part. None: small synthetic pictures
    with captions, made on first use."""
    file_list: Path | None = None
    """List of file lists, each with a weight and a format if wanted; {split} in its name stands for the split. None:
    <split>.filelist.list in the root, else the only *.filelist.list there, else all parts below the root."""
    format: str = "laion400m"
    """Of lists that state none: laion400m, laion_aes, webdataset (tar), or columns from 0: caption=0,image=2."""
    split: str = "train"
    """The part that is read; all: everything."""
    held_out_split: str = "test"
    """The split of validation, unless it has data of its own."""
    held_out_share: float = 0.01
    """Where nothing on disk is split: the share of the records that is held out, by a hash of part and line."""
    resolution: int = 256
    """Height and width of a picture; smaller pictures are bad samples."""
    crop_share: float = 0.9
    """The shorter side is resized to int(resolution / crop_share), then a place is drawn for the crop."""
    max_bad_share: float = 0.05
    """The run stops when more than this share of the samples, or of the parts, cannot be read."""

    def check(self) -> None:
        from data.formats import parse_format

        if self.resolution < 1:
            self.refuse("resolution", "must be at least 1")
        if not 0.1 <= self.crop_share <= 1.0:
            self.refuse("crop_share", "must be in [0.1, 1]")
        for name in ("max_bad_share", "held_out_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                self.refuse(name, "must be in [0, 1]")
        try:
            parse_format(self.format)
        except ValueError as error:
            self.refuse("format", str(error))

    def build(self) -> Any:
        from data.base64_parts import PartRecords

        return PartRecords(self)

    def held_out(self) -> Self:
        return self.but(split=self.held_out_split)

    def clip_shape(self) -> tuple[int, int, int]:
        return 1, self.resolution, self.resolution

    def needs(self) -> Path | None:
        """The root; of a glob, the folder above its first wildcard."""
        from data.formats import split_glob

        return None if self.root is None else split_glob(self.root)[0]

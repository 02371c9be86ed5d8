"""Data slots: where samples come from, and how a clip is cut from them. Nothing here imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from core.slots import Data


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

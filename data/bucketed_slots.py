"""The data slot of planned images and videos, and its parts. Nothing here imports torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from core.slots import Data, Slot


class Captioning(Slot):
    """How the caption of a sample is made of its record's (Open-Sora sheet §4.7)."""

    clean: bool = True
    """The cleaner of DeepFloyd's captions: small letters, no addresses, mark-up, file names. Prompts get the same."""
    chinese: bool = True
    """Keep Chinese characters, as for mT5; other encoders' captions lose them."""
    scores: bool = True
    """Say a high or low aesthetic score in words, before or after the caption."""
    low: float = 4.25
    """Aesthetic scores up to this one are low."""
    high: float = 5.75
    """Aesthetic scores from this one on are high."""
    dropout: float = 0.0
    """Probability of an empty caption; 0 where the condition drops captions by itself."""

    def check(self) -> None:
        if self.low >= self.high:
            self.refuse("low", f"must be below high = {self.high}")
        if not 0.0 <= self.dropout <= 1.0:
            self.refuse("dropout", "must be in [0, 1]")

    def prompt(self, text: str) -> str:
        """A prompt as the captions were cleaned in training."""
        from data.plan.captions import cleaned

        return cleaned(text, self.chinese) if self.clean else text


class Buckets(Slot):
    """How planned shapes become updates: all samples of an update have one shape, on every rank."""

    declared: Path | None = None
    """A bucket_config: resolution, frames, probability and batch size, as .json, or as a .py that assigns one (read,
    not run). None: the shapes that come out of the data."""
    declared_rules: Literal["1.2", "2.0"] = "2.0"
    """Whose rules the declared table follows. 1.2: more frames than the bucket's, the second probability stays; 2.0: at
    least as many, the second probability skips."""
    frame_interval: int = 1
    """1.2: frames of the file to a frame of the clip."""
    fps_max: float = 24.0
    """2.0: faster files are thinned out by the rounded-up quotient."""
    batch: Literal["samples", "tokens", "table"] = "samples"
    """Samples an update. samples: loop.global_batch in every bucket; tokens: as many as `budget` allows; table: `sizes`
    or, without them, the declared table's."""
    budget: int | None = None
    """tokens: cost of an update at most, over all ranks."""
    sizes: tuple[str, ...] = ()
    """table: samples an update by shape, the first that fits: 93x352x640=8 1x*=64 *=16."""
    multiple: int = 1
    """Samples an update are a multiple of this, so that as many ranks can share them. A declared table's sizes are
    those of one of so many ranks."""
    rank_budget: int | None = None
    """Cost of what one rank holds at a time; the rest of its share follows one after the other. None: by the device's
    memory where `bytes_per_token` is given, else loop.micro_batch samples."""
    bytes_per_token: float | None = None
    """Activations of one token in a training step, measured; with the device's memory it gives the rank's budget."""
    reserve_gb: float = 0.0
    """Memory of the device that weights, optimizer and encoders take."""
    token_size: int = 16
    """Side of a token in pixels: the autoencoder's stride times the patch."""
    attention_tokens: int | None = None
    """Length of a sequence at which attention costs as much as all the rest. None: cost is tokens."""
    image_share: float | None = None
    """Share of images among the samples of an epoch; what is in excess changes from epoch to epoch. None: all."""
    remainder: Literal["carry", "drop", "short"] = "carry"
    """What is left of a bucket at the end of an epoch. carry: it begins the next update of the bucket; drop: it is not
    seen in that epoch; short: a smaller update, of a multiple of `multiple`."""

    def check(self) -> None:
        for name in ("multiple", "token_size", "frame_interval"):
            if getattr(self, name) < 1:
                self.refuse(name, "must be at least 1")
        for name in ("budget", "rank_budget", "attention_tokens", "bytes_per_token", "fps_max"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                self.refuse(name, "must be above 0")
        if self.batch == "tokens" and self.budget is None:
            self.refuse("budget", "batch=tokens needs the cost of an update")
        if self.batch == "table" and not self.sizes and self.declared is None:
            self.refuse("sizes", "batch=table needs sizes by shape, 93x352x640=8, or a declared table")
        for size in self.sizes:
            shape, _, number = size.partition("=")
            if not shape or not number.isdecimal() or int(number) < 1:
                self.refuse("sizes", f"{size!r} is not SHAPE=SAMPLES, as 93x352x640=8")
        if self.image_share is not None and not 0.0 < self.image_share < 1.0:
            self.refuse("image_share", "must be between 0 and 1; to leave a kind out, leave it out of data.txt")


class BucketedVideos(Data):
    """Images and videos of many shapes and lengths, planned into buckets, in the manner of Open-Sora-Plan."""

    many_shapes: ClassVar[bool] = True
    root: Path | None = None
    """data.txt, or the folder that it lies in: a line for each source, ROOT,ANNOTATION."""
    split: str = "train"
    """The part that is read; all: everything."""
    held_out_split: str = "test"
    """The split of validation, unless it has data of its own."""
    held_out_share: float = 0.0
    """The share of the files that is held out, by a hash of their paths."""
    probe: bool = False
    """Ask the files for sizes, lengths and rates that records lack; slow for many."""
    compat: Literal["osp-1.3"] | None = None
    """osp-1.3: the arithmetic of Open-Sora-Plan v1.3, mistakes and all; docs/opensora.md lists them."""
    num_frames: int = 65
    """Frames of a clip at most; 1 for images."""
    min_frames: int | None = None
    """Frames of a clip at least, after resampling. None: 29, or num_frames where that is less."""
    train_fps: float = 24.0
    """Frames a second of the clips; slower files repeat frames."""
    speed_factor: float = 1.0
    """Clips longer than num_frames are thinned out by at most this."""
    drop_short_ratio: float = 1.0
    """Probability that a clip shorter than num_frames is dropped; 0: shorter ones get buckets of their own."""
    too_long: float | None = 5.0
    """Clips of more than this many times num_frames (in seconds: at their rate) are dropped. None: no limit."""
    time_stride: int = 4
    """The autoencoder's stride in time: lengths are a multiple of it, and one."""
    sequence: int = 1
    """Ranks that share a sample; they must be able to split its latent frames."""
    max_hxw: int | None = None
    """Pixels of a frame at most: larger ones are resized. None: no limit, but with compat it must be given."""
    min_hxw: int | None = None
    """Pixels of a planned frame at least. None: a quarter of max_hxw."""
    max_height: int | None = None
    """Height at most; with force_resolution the height."""
    max_width: int | None = None
    """Width at most; with force_resolution the width."""
    min_height: int | None = None
    """Height of a planned frame at least."""
    min_width: int | None = None
    """Width of a planned frame at least."""
    force_resolution: bool = False
    """Crop to the aspect of max_height x max_width, and resize to it, also up."""
    hw_stride: int = 32
    """Both sides are cropped to a multiple of this."""
    max_aspect: float = 2.0
    """Neither side may be more than this many times the other; with force_resolution, relative to the target's."""
    min_aesthetic: float | None = None
    """Aesthetic score at least."""
    min_tech: float | None = None
    """Technical score at least."""
    min_motion: float | None = None
    """Motion score of a video at least."""
    max_motion: float | None = None
    """Motion score of a video at most."""
    min_bucket: int = 1
    """Samples of a bucket at least; the original deletes shapes with fewer than four global batches."""
    captioning: Captioning = Captioning()
    """How captions are made."""
    buckets: Buckets = Buckets()
    """How shapes become updates."""
    decoder: Literal["decord", "pyav"] = "decord"
    """decord: where it finds frames exactly, else PyAV; pyav: always, which also refuses damaged frames."""
    max_bad_share: float = 0.05
    """The run stops when more than this share of the samples cannot be read."""

    def check(self) -> None:
        for name in ("num_frames", "time_stride", "sequence", "hw_stride", "min_bucket"):
            if getattr(self, name) < 1:
                self.refuse(name, "must be at least 1")
        for name in ("min_frames", "max_hxw", "max_height", "max_width", "min_height", "min_width"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                self.refuse(name, "must be at least 1, or None")
        for name in ("drop_short_ratio", "held_out_share", "max_bad_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                self.refuse(name, "must be in [0, 1]")
        if self.train_fps <= 0:
            self.refuse("train_fps", "must be above 0")
        if self.speed_factor < 1:
            self.refuse("speed_factor", "must be at least 1: clips are thinned out, never slowed down")
        if self.max_aspect < 1:
            self.refuse("max_aspect", "must be at least 1")
        if (self.num_frames - 1) % self.time_stride:
            near = (self.num_frames - 1) // self.time_stride * self.time_stride + 1
            self.refuse("num_frames", f"must be {self.time_stride} k + 1 for the autoencoder: {near} or {near + 4}")
        if self.force_resolution and None in (self.max_height, self.max_width):
            self.refuse("force_resolution", "needs max_height and max_width, the size")
        if self.compat and not self.force_resolution and self.max_hxw is None:
            self.refuse("max_hxw", "compat needs the pixels of a frame at most; the original fails without")
        if self.compat and self.buckets.declared is not None:
            self.refuse("compat", "a declared table has its own shapes; take it without compat")
        self._check_sides()

    def _check_sides(self) -> None:
        for side in ("height", "width"):
            low, high = getattr(self, f"min_{side}"), getattr(self, f"max_{side}")
            if low is not None and high is not None and low > high:
                self.refuse(f"min_{side}", f"is above max_{side} = {high}")
            if self.force_resolution and high % 8:
                self.refuse(f"max_{side}", "must be a multiple of 8")
        if self.min_hxw is not None and self.max_hxw is not None and self.min_hxw > self.max_hxw:
            self.refuse("min_hxw", f"is above max_hxw = {self.max_hxw}")

    def target(self) -> tuple[int, int]:
        """Height and width under force_resolution."""
        return self.max_height or 0, self.max_width or 0

    def least_area(self) -> int:
        """Pixels of a planned frame at least."""
        return (self.max_hxw or 0) // 4 if self.min_hxw is None else self.min_hxw

    def least_frames(self) -> int:
        """Frames of a clip at least."""
        if self.min_frames is not None:
            return self.min_frames
        return 29 if self.compat else min(29, self.num_frames)

    def build(self) -> Any:
        from data.bucketed import BucketedClips

        return BucketedClips(self)

    def held_out(self) -> Self:
        return self.but(split=self.held_out_split)

    def clip_shape(self) -> tuple[int, int, int]:
        """The largest clip, for a plan of memory: num_frames at the forced size, else a square of max_hxw."""
        if self.force_resolution:
            return self.num_frames, *self.target()
        side = math.isqrt(self.max_hxw or (self.max_height or 256) * (self.max_width or 256))
        side = max(side // self.hw_stride, 1) * self.hw_stride
        return self.num_frames, side, side

    def needs(self) -> Path | None:
        return self.root

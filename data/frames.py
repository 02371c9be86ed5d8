"""Clips as folders of frame images: the layouts of Sky Timelapse and UCF-101 (LVDM sheet §8.1).

One pass over the folders gives names, counts and a fingerprint; which frames are read is decided per sample.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from core.errors import UserError, did_you_mean
from data.pictures import FORMATS, FRAME_PIXELS, decoded
from data.samples import BadSample, Sample, Samples

if TYPE_CHECKING:
    from data.slots import FrameFolders

IMAGES = tuple(ext for low in (".jpg", ".jpeg", ".png", ".ppm", ".bmp") for ext in (low, low.upper()))
VIDEOS = (".mp4", ".avi", ".webm", ".mov", ".mkv")
UCF_CLASSES = "ucfTrainTestlist/classInd.txt"
UCF_SKIPPED = frozenset(("_broken_clips", "ucfTrainTestlist"))
UCF_NAME = re.compile(r"v_(?P<name>\w+)_g\d+_c\d+")
DEPTH = {"sky": 2, "ucf101": 1}  # folders between a split and its images
EXPECTED = {
    "sky": "<root>/<split>/<video>/<clip>/*.jpg",
    "ucf101": "<root>/<split>/v_<Class>_gXX_cYY/*.jpg and <root>/" + UCF_CLASSES,
}
CLIP_PIXELS = 2**28
"""Pixels of all frames of a sample at most: 16 of 4096 x 4096, or 129 of 1920 x 1080; 805 MB decoded."""
LIST_LIMIT = 2**16
"""Bytes of a list of classes; UCF-101's has 1,993."""
LINKS_OUT = "links that leave the root"


class Clip(NamedTuple):
    """A folder of frames: its name relative to the root, how many frames, and a hash of their names and sizes."""

    name: str
    frames: int
    digest: bytes


class FrameClips(Samples):
    """The dataset of a `FrameFolders` slot.

    A sample: `pixel_values` float32 (3, T, s, s) in [-1, 1], `class_id` int64 (), and `caption` for UCF-101.
    Raises UserError when the folder is missing, empty, in another layout, or has no clip that is long enough.
    """

    def __init__(self, slot: "FrameFolders"):
        self.slot = slot
        self.root = _root_of(slot)
        self.span = (slot.num_frames - 1) * slot.frame_stride + 1  # source frames that one sample covers
        scan = Scan(self.root, slot.layout)
        try:
            found = [clip for split in _split_folders(slot, self.root) for clip in scan.clips(split)]
        except OSError as error:
            raise UserError(f"cannot read {error.filename}: {error.strerror}.") from None
        if not any(clip.frames for clip in found):
            raise UserError(_explain_layout(slot, self.root, scan.dropped))
        self.clips = sorted((clip for clip in found if clip.frames >= self.span), key=lambda clip: clip.name)
        if not self.clips:
            raise UserError(_explain_length(slot, self.root, self.span, found))
        if short := len(found) - len(self.clips):
            scan.dropped[f"shorter than {self.span} frames"] = short
        self.classes = _ucf_classes(self.root, self.clips) if slot.layout == "ucf101" else _sky_classes(found)
        self.windows = self._windows() if slot.temporal_transform == "windows" else None
        if slot.spatial_transform == "random_crop":
            self._refuse_small_images()
        super().__init__(self._names(), fingerprint=_fingerprint(found), dropped=dict(scan.dropped))

    def read(self, index: int, rng: np.random.Generator) -> Sample:
        """Frames start, start + stride, …: a uniform start (rand_clips), or the window's own."""
        clip, start = self._place(index, rng)
        names = self._frame_names(clip)[start : start + self.span : self.slot.frame_stride]
        frames = _decode(self.root, [f"{clip.name}/{name}" for name in names])
        if self.slot.spatial_transform == "random_crop" and min(frames.shape[-2:]) < self.slot.resolution:
            raise BadSample(clip.name, f"has frames of {list(frames.shape[-2:])}, smaller than the crop")
        frames = _spatial(frames, self.slot.spatial_transform, self.slot.resolution, rng)  # (T, 3, s, s) uint8
        return {"pixel_values": to_unit_range(frames)} | self._label(clip)

    def describe(self) -> dict[str, str | int]:
        """The base's figures, and how many clips of how many classes the samples are cut from."""
        return super().describe() | {"layout": self.slot.layout, "clips": len(self.clips), "classes": len(self.classes)}

    def _place(self, index: int, rng: np.random.Generator) -> tuple[Clip, int]:
        """The clip and its first frame."""
        if self.windows is not None:
            owner, start = self.windows[index]
            return self.clips[owner], int(start)
        clip = self.clips[index]
        return clip, int(rng.integers(0, clip.frames - self.span + 1))

    def _frame_names(self, clip: Clip) -> list[str]:
        """The clip's frames, listed again (a million names are too much to hand to every worker)."""
        try:
            names = [name for name, _ in _frames(self.root / clip.name, self.root, Counter())]
        except OSError as error:
            raise BadSample(clip.name, f"cannot be listed: {error.strerror}") from None
        if len(names) != clip.frames:
            raise BadSample(clip.name, f"had {clip.frames} frames when the run began and has {len(names)} now")
        return names

    def _label(self, clip: Clip) -> Sample:
        name = _class_name(clip.name, self.slot.layout)
        index, caption = self.classes[name]
        label: Sample = {"class_id": torch.tensor(index)}
        return label if self.slot.layout == "sky" else label | {"caption": caption}

    def _windows(self) -> np.ndarray:
        """(windows, 2): clip and first frame. By default they do not overlap, and the remainder is left out."""
        step = self.slot.clip_step or self.slot.num_frames * self.slot.frame_stride
        starts = [np.arange(0, clip.frames - self.span + 1, step, dtype=np.int64) for clip in self.clips]
        owners = np.repeat(np.arange(len(starts)), [len(of_clip) for of_clip in starts])
        return np.stack([owners, np.concatenate(starts)], axis=1)

    def _names(self) -> list[str]:
        if self.windows is None:
            return [clip.name for clip in self.clips]
        return [f"{self.clips[owner].name}@{start}" for owner, start in self.windows.tolist()]

    def _refuse_small_images(self) -> None:
        """A crop cannot be larger than the images; the first one is taken as typical, others are checked when read."""
        clip, size = self.clips[0], self.slot.resolution
        path = f"{clip.name}/{self._frame_names(clip)[0]}"
        try:
            with Image.open(self.root / path, formats=FORMATS) as image:
                width, height = image.size
        except Exception:  # noqa: BLE001  as in decoded, which will say so
            return
        if min(width, height) < size:
            raise UserError(
                f"random_crop takes {size}x{size} out of each frame, and {path} is {width}x{height}: lower the "
                "resolution, or use spatial_transform=center_crop_resize, which resizes first."
            )


# ---- scanning -------------------------------------------------------------------------------------------------------


class Scan:
    """One pass over a root: the clips of a split, and a count of what was left out and why."""

    def __init__(self, root: Path, layout: str):
        self.root, self.layout = root, layout
        self.dropped: Counter[str] = Counter()

    def clips(self, split: Path) -> Iterator[Clip]:
        """Every clip folder of the split, empty ones too."""
        for video in _folders(split, self.root, self.dropped):
            if self.layout == "sky":
                yield from map(self._clip, _folders(video, self.root, self.dropped))
            elif video.name not in UCF_SKIPPED:
                yield self._clip(video)

    def _clip(self, folder: Path) -> Clip:
        frames = _frames(folder, self.root, self.dropped)
        text = "\0".join(f"{name}\0{size}" for name, size in frames)
        name = folder.relative_to(self.root).as_posix()
        return Clip(name, len(frames), blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).digest())


def _folders(folder: Path, root: Path, dropped: Counter[str]) -> list[Path]:
    """Sub-folders in lexicographic order, without hidden ones and links that leave the root."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_dir() and _belongs(entry, root, dropped)]
    return [folder / name for name in sorted(names)]


def _frames(folder: Path, root: Path, dropped: Counter[str]) -> list[tuple[str, int]]:
    """Name and size of the images in a folder, in lexicographic order."""
    with os.scandir(folder) as entries:
        images = (entry for entry in entries if entry.name.endswith(IMAGES))
        kept = (entry for entry in images if _belongs(entry, root, dropped) and entry.is_file())
        return sorted((entry.name, entry.stat().st_size) for entry in kept)


def _belongs(entry: os.DirEntry[str], root: Path, dropped: Counter[str]) -> bool:
    """False for hidden entries, and for links that lead out of the root, which are counted."""
    if entry.name.startswith("."):
        return False
    if not entry.is_symlink() or Path(os.path.realpath(entry)).is_relative_to(root):
        return True
    dropped[LINKS_OUT] += 1
    return False


def _fingerprint(clips: list[Clip]) -> str:
    """Over names and sizes of all clips found, long enough or not: two recipes on the same files share it."""
    total = blake2b(digest_size=16)
    for clip in sorted(clips, key=lambda clip: clip.name):
        total.update(clip.name.encode("utf-8", "surrogateescape") + b"\0" + clip.digest)
    return total.hexdigest()


def _root_of(slot: "FrameFolders") -> Path:
    """The resolved root; the synthetic sky when none was named."""
    if slot.root is None:
        from data.synthetic import sky_root

        return sky_root().resolve()
    if not slot.root.is_dir():
        what = "is a file" if slot.root.exists() else "does not exist"
        near = did_you_mean(slot.root.name, entries(slot.root.parent))
        raise UserError(f"the data folder {slot.root} {what}{near}. Expected {EXPECTED[slot.layout]}.")
    return slot.root.resolve()


def _split_folders(slot: "FrameFolders", root: Path) -> list[Path]:
    names = ["train", "test"] if slot.split == "all" else [slot.split]
    for name in names:
        if not (root / name).is_dir():
            raise UserError(_explain_split(slot, root, name))
        target = (root / name).resolve()
        if not target.is_relative_to(root):
            raise UserError(f"the split {name!r} of {root} leads out of it, to {target}: name that as the root.")
    return [root / name for name in names]


# ---- classes --------------------------------------------------------------------------------------------------------


def _class_name(clip: str, layout: str) -> str:
    """Sky: the video's folder. UCF-101: the class in v_<Class>_gXX_cYY, lower case, because UCF-101 itself spells
    HandstandPushups in its list and HandStandPushups in its file names."""
    parts = clip.split("/")
    if layout == "sky":
        return parts[-2]
    match = UCF_NAME.fullmatch(parts[-1])
    return (match["name"] if match else parts[-1]).lower()


def _sky_classes(clips: list[Clip]) -> dict[str, tuple[int, str]]:
    """Video folder -> its index in the sorted list of all splits that are read."""
    videos = sorted({_class_name(clip.name, "sky") for clip in clips})
    return {video: (index, "") for index, video in enumerate(videos)}


def _ucf_classes(root: Path, clips: list[Clip]) -> dict[str, tuple[int, str]]:
    """Lower-case class -> index from 0, and caption ("ApplyEyeMakeup" -> "apply eye makeup"), from classInd.txt."""
    path = root / UCF_CLASSES
    if not path.is_file():
        raise UserError(f"{path} is missing: layout ucf101 takes the classes from it ('1 ApplyEyeMakeup', …).")
    rows = _rows(path)
    if len(rows) != 101 or {row[0] for row in rows} != {str(number) for number in range(1, 102)}:
        raise UserError(f"{path} must list 101 classes, one '<index from 1> <Name>' a line; it has {len(rows)} lines.")
    classes = {name.lower(): (int(number) - 1, _caption(name)) for number, name in rows}
    for clip in clips:
        if (name := _class_name(clip.name, "ucf101")) not in classes:
            raise UserError(f"{clip.name}: its class {name!r} is not in {UCF_CLASSES}{did_you_mean(name, classes)}.")
    return classes


def _rows(path: Path) -> list[list[str]]:
    """The words of each line with two of them. Raises UserError for what is no short text."""
    try:
        if path.stat().st_size > LIST_LIMIT:
            raise ValueError("it is too long for a list of classes")
        lines = path.read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return [words for words in map(str.split, lines) if len(words) == 2]


def _caption(name: str) -> str:
    return re.sub("(?<!^)(?=[A-Z])", " ", name).lower()


# ---- pixels ---------------------------------------------------------------------------------------------------------


def _decode(root: Path, paths: list[str]) -> torch.Tensor:
    """The frames of a sample, of bounded size together: uint8 (T, 3, H, W), channels last in memory: a resize of that
    is ten times as fast as one of floats.
    """
    most = min(FRAME_PIXELS, CLIP_PIXELS // len(paths))
    frames = [np.asarray(decoded(root / path, path, most=most)) for path in paths]
    for path, frame in zip(paths, frames, strict=True):
        if frame.shape != frames[0].shape:
            (height, width), (h, w) = frames[0].shape[:2], frame.shape[:2]
            raise BadSample(path, f"is {w}x{h} where the clip's first frame is {width}x{height}")
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def _spatial(frames: torch.Tensor, how: str, size: int, rng: np.random.Generator) -> torch.Tensor:
    """(T, 3, H, W) -> (T, 3, size, size); `none` leaves the shape."""
    height, width = frames.shape[-2:]
    if how == "none":
        return frames
    if how == "resize":
        return _resize(frames, size, size)
    if how == "random_crop":
        return _crop(frames, int(rng.integers(0, height - size + 1)), int(rng.integers(0, width - size + 1)), size)
    short = min(height, width)
    frames = _resize(frames, size * height // short, size * width // short)
    height, width = frames.shape[-2:]
    return _crop(frames, round((height - size) / 2), round((width - size) / 2), size)


def _resize(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Bilinear without antialias, as the original; on uint8, so within one grey level of a resize in floats."""
    if frames.shape[-2:] == (height, width):
        return frames
    return functional.interpolate(frames, (height, width), mode="bilinear", align_corners=False, antialias=False)


def _crop(frames: torch.Tensor, top: int, left: int, size: int) -> torch.Tensor:
    return frames[..., top : top + size, left : left + size]


def to_unit_range(frames: torch.Tensor) -> torch.Tensor:
    """uint8 (T, 3, h, w) -> float32 (3, T, h, w) in [-1, 1]; 0 and 255 are exactly -1 and 1."""
    clip = frames.permute(1, 0, 2, 3).to(torch.float32, memory_format=torch.contiguous_format)
    return clip.div_(127.5).sub_(1.0)


# ---- explanations ---------------------------------------------------------------------------------------------------


def entries(folder: Path, limit: int = 200) -> list[str]:
    """The first names in a folder; none if it cannot be listed."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in islice(entries, limit))


def listing(folder: Path) -> str:
    names = entries(folder)
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "") if names else "nothing"


def _explain_split(slot: "FrameFolders", root: Path, name: str) -> str:
    """The split is missing: is the root a level off, or is the name misspelt?"""
    if near := did_you_mean(name, entries(root)):
        hint = near
    elif (root.parent / name).is_dir():
        hint = f" It looks one level too deep: {root.parent} has the splits."
    elif inner := next((sub for sub in entries(root) if (root / sub / name).is_dir()), None):
        hint = f" It looks one level too shallow: {root / inner} has a folder {name!r}."
    elif _image_depth(root)[0] == DEPTH[slot.layout]:
        hint = ' It has videos, but no splits: use an empty split (split="").'
    else:
        hint = ""
    return f"no folder {name!r} in {root}.{hint} Expected {EXPECTED[slot.layout]}; found {listing(root)}."


def _explain_layout(slot: "FrameFolders", root: Path, dropped: Counter[str]) -> str:
    """No frame at the layout's depth: where are they?"""
    top = root / ("train" if slot.split == "all" else slot.split)
    depth, example = _image_depth(top)
    hint = "No image files in it." if depth is None else _depth_hint(slot.layout, depth, example)
    if depth is None and any(name.lower().endswith(VIDEOS) for name in _files_below(top)):
        hint = "It holds video files, and this layout is of images: use a dataset of videos."
    links = f" ({dropped[LINKS_OUT]} {LINKS_OUT} were ignored.)" if dropped[LINKS_OUT] else ""
    expected = f"Expected {EXPECTED[slot.layout]}; found {listing(top)}."
    return f"{top} has no clips in the layout {slot.layout}. {expected} {hint}{links}"


def _depth_hint(layout: str, depth: int, example: str) -> str:
    where = f"Its images lie at {example}:"
    other = "ucf101" if layout == "sky" else "sky"
    if depth == DEPTH[other] and (other == "sky" or UCF_NAME.fullmatch(example.split("/")[0])):
        return f"{where} that is the layout {other} (--data.layout {other})."
    off = depth - DEPTH[layout]
    too = "deep: name a folder further down as the root" if off > 0 else "shallow: name a folder further up as the root"
    return f"{where} {abs(off)} level{'s' if abs(off) > 1 else ''} too {too}, or move them."


def _files_below(top: Path) -> Iterator[str]:
    """File paths relative to `top`, of at most 200 folders: enough to tell a layout."""
    for folder, subs, files in islice(os.walk(top), 200):
        subs[:] = sorted(set(subs) - UCF_SKIPPED)
        yield from ((Path(folder) / name).relative_to(top).as_posix() for name in sorted(files))


def _image_depth(top: Path) -> tuple[int | None, str]:
    """How many folders lie between `top` and its first image, and that image's path."""
    for path in _files_below(top):
        if path.endswith(IMAGES):
            return path.count("/"), path
    return None, ""


def _explain_length(slot: "FrameFolders", root: Path, span: int, found: list[Clip]) -> str:
    longest = max(found, key=lambda clip: clip.frames)
    return (
        f"none of the {len(found)} clips in {root} has the {span} frames that num_frames={slot.num_frames} with "
        f"frame_stride={slot.frame_stride} needs: the longest, {longest.name}, has {longest.frames}."
    )

"""Captioned video files: WebVid's csv, LVDM's json-lines, or a plain folder (LVDM sheet §8.2).

What the original ignored is done here: the stride, the frames' times, the aspect ratio, and every file that fails.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from core.errors import UserError, did_you_mean
from data import video
from data.annotations import COLUMNS, Source, index_of, recognise, resolved
from data.frames import LINKS_OUT, VIDEOS, entries, listing, to_unit_range
from data.index import Dropped, Index, Names, index_of_rows
from data.rows import chosen
from data.samples import BadSample, Sample, Samples

if TYPE_CHECKING:
    from data.slots import CaptionedVideos

TABLES = (".csv", ".jsonl", ".list", ".json", ".ndjson")
SIDES = re.compile(r"\b(?:left|right)(?:wards?|most|hand(?:ed)?)?\b|\b(?:anti|counter)?-?clockwise\b", re.IGNORECASE)
LOOKED_FOR = 24  # videos that are looked for at the start: with none of them there, the root is wrong


class Found(NamedTuple):
    """Where the samples come from. `split` says whether the files are already those of the split alone."""

    table: Index
    layout: str
    told: str
    split: bool


def speaks_of_sides(caption: str) -> bool:
    """Whether a caption says what a mirror turns round: left, right, clockwise."""
    return SIDES.search(caption) is not None


class CaptionedClips(Samples):
    """The dataset of a `CaptionedVideos` slot.

    A sample: `pixel_values` float32 (3, T, H, W) in [-1, 1] and `caption` (str). Raises UserError when folder or table
    are missing, empty, or not what was expected; whether each video is there shows when it is read.
    """

    def __init__(self, slot: CaptionedVideos):
        self.slot = slot
        self.root = _root_of(slot)
        self.found = _find(slot, self.root)
        first, last = _part(slot, self.found)
        rows = chosen(slot, self.found.table, first, last, self.root)
        self.names, self.told = rows.names, rows.told
        dropped = dict(self.found.table.about["dropped"]) | rows.dropped
        super().__init__(self.names, fingerprint=rows.fingerprint, dropped=dropped)
        if slot.missing == "replace" or not len(self):
            self._look_for_videos(Names(self.found.table, first, last))

    def id_hashes(self) -> np.ndarray:
        """Straight from the index: nothing is hashed, and nothing kept."""
        return self.names.hashes()

    def read(self, index: int, rng: np.random.Generator) -> Sample:
        """A start that `rng` draws, then the crop's place, then whether the clip is mirrored."""
        name, caption = self.found.table.row(self.names.place(index))
        path = self._file(name)
        if self.found.layout == "folder":
            caption = self._sidecar(name)
        try:
            frames = self._frames(path, rng)  # (T, h, w, 3) uint8
        except video.Unreadable as fault:
            raise BadSample(name, str(fault)) from None
        clip = torch.from_numpy(self._cropped(name, frames, rng)).permute(0, 3, 1, 2)  # (T, 3, H, W)
        clip = clip.flip(-1) if self._mirrored(caption, rng) else clip
        return {"pixel_values": to_unit_range(clip), "caption": caption}

    def describe(self) -> dict[str, str | int]:
        """The base's figures, and what was recognised as what."""
        return super().describe() | {"layout": self.found.told} | self.told

    def _frames(self, path: Path, rng: np.random.Generator) -> np.ndarray:
        slot, packets = self.slot, video.scan(path)
        chosen = video.choose(
            packets.times(), slot.num_frames, slot.frame_stride, slot.fps, rng, stretch=slot.short_clips == "stretch"
        )
        return video.decode(path, packets, chosen, self._size, strict=slot.decoder == "pyav")

    def _size(self, height: int, width: int) -> tuple[int, int]:
        """The size that a picture of this height and width is decoded at."""
        _, high, wide = self.slot.clip_shape()
        if self.slot.spatial_transform in ("random_crop", "none"):
            return height, width
        if self.slot.spatial_transform == "resize":
            return high, wide
        scale = max(high / height, wide / width)  # the smallest that covers the clip
        return max(high, round(height * scale)), max(wide, round(width * scale))

    def _cropped(self, name: str, frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(T, h, w, 3) -> (T, H, W, 3); one crop for the whole clip."""
        _, high, wide = self.slot.clip_shape()
        down, right = frames.shape[1] - high, frames.shape[2] - wide
        if self.slot.spatial_transform == "none":
            return frames
        if down < 0 or right < 0:
            raise BadSample(name, f"has frames of {list(frames.shape[1:3])}, smaller than the crop of {[high, wide]}")
        if self.slot.spatial_transform.startswith("random_crop"):
            top, left = int(rng.integers(0, down + 1)), int(rng.integers(0, right + 1))
        else:
            top, left = round(down / 2), round(right / 2)
        return frames[:, top : top + high, left : left + wide]

    def _mirrored(self, caption: str, rng: np.random.Generator) -> bool:
        """One draw a clip. What is said of sides would be wrong of a mirrored clip."""
        probability = self.slot.horizontal_flip
        return (
            probability > 0
            and float(rng.random()) < probability
            and (self.slot.flip_sided or not speaks_of_sides(caption))
        )

    def _file(self, name: str) -> Path:
        """The real file of a path of the table, which stays in the root."""
        path = resolved(name, self.root)
        if path is None:
            raise BadSample(name, "is a link that leaves the root")
        if not path.is_file():
            raise BadSample(name, "is not a file" if path.exists() else "does not exist")
        return path

    def _sidecar(self, name: str) -> str:
        """The caption beside a video, on one line; empty where there is none."""
        text = str(Path(name).with_suffix(".txt"))
        path = resolved(text, self.root)
        if path is None:
            raise BadSample(text, "is a link that leaves the root")
        try:
            return " ".join(path.read_text(encoding="utf-8-sig").split())
        except FileNotFoundError:
            return ""
        except (OSError, UnicodeDecodeError) as error:
            raise BadSample(text, f"cannot be read: {error}") from None

    def _look_for_videos(self, rows: Names) -> None:
        """A root that holds none of the table's videos is a wrong root."""
        places = np.unique(np.linspace(0, len(rows) - 1, LOOKED_FOR, dtype=np.int64)).tolist()
        paths = [rows.table.row(rows.place(place))[0] for place in places]
        if not len(self) or not any((self.root / path).is_file() for path in paths):
            raise UserError(_explain_root(self.root, paths))


# ---- what is there --------------------------------------------------------------------------------------------------


def _root_of(slot: CaptionedVideos) -> Path:
    """The resolved root; the synthetic clouds when none was named."""
    if slot.root is None:
        from data.synthetic_captions import clouds_root

        return clouds_root().resolve()
    if not slot.root.is_dir():
        what = "is a file; name the folder of the videos" if slot.root.exists() else "does not exist"
        raise UserError(f"the data folder {slot.root} {what}{_near(slot.root)}.")
    return slot.root.resolve()


def _find(slot: CaptionedVideos, root: Path) -> Found:
    """The table that was named, else the root's own, else the root's videos."""
    tables, split = _tables(slot, root)
    if not tables:
        return _folder(slot, root)
    layout = recognise(tables[0]) if slot.layout == "auto" else slot.layout
    path = slot.path or COLUMNS[layout][0]
    index = index_of(*(Source(table, layout, path, slot.caption, root) for table in tables))
    if not len(index):
        raise UserError(_explain_empty(tables[0], layout, path, slot.caption, index.about["dropped"]))
    names = ", ".join(table.name for table in tables)
    return Found(index, layout, f"{layout} ({names}: {slot.caption}, {path})", split)


def _tables(slot: CaptionedVideos, root: Path) -> tuple[list[Path], bool]:
    """The annotation files, and whether they are those of the split alone. None: the root is a plain folder."""
    if slot.layout == "folder":
        return [], False
    if slot.annotations is not None:
        table, split = _named_table(slot.annotations, slot.split, root)
        return [table], split
    tables = sorted(path for path in root.iterdir() if path.suffix in TABLES and path.is_file())
    own = [path for path in tables if path.stem == slot.split]
    if len(own) == 1:
        return own, True
    if len(tables) > 1 and slot.split != "all":
        names = ", ".join(path.name for path in tables[:5])
        raise UserError(
            f"{root} has several tables ({names}), and not one called {slot.split}: name it as annotations."
        )
    if slot.layout != "auto" and not tables:
        raise UserError(f"no {slot.layout} table in {root}; name it as annotations.")
    return tables, False


def _named_table(named: Path, split: str, root: Path) -> tuple[Path, bool]:
    name = str(named).replace("{split}", split)
    for path in (Path(name), root / name):
        if path.is_file():
            return path.resolve(), name != str(named)
    raise UserError(f"the annotations {name} do not exist, neither here nor in {root}{_near(Path(name))}.")


def _folder(slot: CaptionedVideos, root: Path) -> Found:
    """The videos below the root, or below its folder of the split's name."""
    inner = root / slot.split
    split = bool(slot.split) and slot.split != "all" and inner.is_dir() and inner.resolve().is_relative_to(root)
    dropped, rows = Dropped(), []
    captions = 0
    for path, has_caption, size in _videos(inner if split else root, root, dropped):
        rows.append((path, str(size)))
        captions += has_caption
    rows.sort()
    if not rows:
        raise UserError(_explain_no_videos(inner if split else root))
    index = index_of_rows(rows, dropped)
    return Found(index, "folder", f"folder ({captions} of {len(rows)} videos with a caption beside them)", split)


def _videos(top: Path, root: Path, dropped: Dropped) -> Iterator[tuple[str, bool, int]]:
    """Path relative to the root, whether a .txt lies beside it, and size, of every video file."""
    for folder, subs, files in os.walk(top):
        subs[:] = [name for name in subs if not name.startswith(".")]
        beside = {Path(name).stem for name in files if name.endswith(".txt")}
        for name in files:
            if not name.lower().endswith(VIDEOS) or name.startswith("."):
                continue
            path = (Path(folder) / name).relative_to(root).as_posix()
            if not path.isprintable() and _not_utf8(path):
                dropped.add("names that are not UTF-8", repr(path))
            elif resolved(path, root) is None:
                dropped.add(LINKS_OUT, path)
            elif (root / path).is_file():
                yield path, Path(name).stem in beside, (root / path).stat().st_size
            else:
                dropped.add("names of videos that are no files", path)


def _not_utf8(text: str) -> bool:
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def _part(slot: CaptionedVideos, found: Found) -> tuple[int, int]:
    """First and last place of the split among the rows sorted by hash: the held-out ones come first."""
    total = len(found.table)
    if found.split or slot.split == "all":
        return 0, total
    border = found.table.below(slot.held_out_share) if slot.held_out_share else 0
    first, last = (0, border) if slot.split == slot.held_out_split else (border, total)
    if first >= last:
        raise UserError(
            f"split {slot.split!r} has no videos: of {total} rows, held_out_share={slot.held_out_share} holds out "
            f"{border}. Choose another share, or split=all."
        )
    return first, last


# ---- explanations ---------------------------------------------------------------------------------------------------


def _near(path: Path) -> str:
    return did_you_mean(path.name, entries(path.parent))


def _explain_root(root: Path, paths: list[str]) -> str:
    """None of the table's videos is there: is the root a level off?"""
    inner = next((name for name in entries(root) if any((root / name / path).is_file() for path in paths)), None)
    if inner is not None:
        hint = f" They are in {root / inner}: name that as the root."
    elif any((root.parent / path).is_file() for path in paths):
        hint = f" They are in {root.parent}: name that as the root."
    else:
        hint = ""
    return (
        f"none of {len(paths)} videos that the table names was found in {root}: expected {root / paths[0]}; the folder "
        f"holds {listing(root)}.{hint}"
    )


def _explain_empty(table: Path, layout: str, path: str, caption: str, dropped: dict[str, int]) -> str:
    why = "".join(f" Left out: {count} {reason}." for reason, count in dropped.items())
    hint = (
        ' Name the path by a template of columns: --data.path "{page_dir}/{videoid}.mp4".' if "addresses" in why else ""
    )
    return f"{table} has no rows that can be used; expected {layout} with {caption} and {path}.{why}{hint}"


def _explain_no_videos(folder: Path) -> str:
    return (
        f"no videos ({', '.join(VIDEOS)}) and no table of captions below {folder}; it holds {listing(folder)}. "
        "Expected a csv with name and contentUrl, json-lines with name and afs_path, or video files."
    )

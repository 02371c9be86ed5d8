"""A declared table of buckets: resolution x frames → probability and batch size (`bucket_config` of Open-Sora).

Rules of 1.2 and of 2.0 (Open-Sora sheet §5.2), over columns; the chance of each record and bucket is handed in.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core.errors import UserError
from data.plan.aspects import aspects

NEAR = 0.8
"""A picture with this share of a resolution's pixels is large enough for it."""

Chance = Callable[[np.ndarray, int, int], np.ndarray]
"""(rows, number of the bucket, which draw of it) → uniform numbers in [0, 1)."""


class Cell(NamedTuple):
    """A bucket before its aspect. `take`: probability of the resolution; `length`: that of the length, of a pair."""

    resolution: str
    frames: int
    take: float
    length: float | None
    batch: int | None


class Table(NamedTuple):
    """The cells from large to small, long to short, and the shapes of each resolution."""

    rules: str
    cells: list[Cell]
    pixels: dict[str, int]
    shapes: dict[str, np.ndarray]  # (aspects, 2) height, width
    tall: dict[str, np.ndarray]  # (aspects,) height / width as the rules compare it

    @property
    def fixed(self) -> bool:
        """Whether nothing depends on chance."""
        return all(cell.take in (0.0, 1.0) and cell.length in (None, 1.0 if self.rules == "1.2" else 0.0)
                   for cell in self.cells)  # fmt: skip

    def first(self, number: int) -> int:
        """The place of a cell's first aspect in the list of all buckets."""
        return sum(len(self.shapes[cell.resolution]) for cell in self.cells[:number])

    def buckets(self) -> np.ndarray:
        """(buckets, 3) frames, height and width."""
        rows = [(cell.frames, *shape) for cell in self.cells for shape in self.shapes[cell.resolution].tolist()]
        return np.array(rows, np.int64)

    def batches(self) -> list[int]:
        """Batch size a rank of each bucket; 0 for one that nothing may go to."""
        return [cell.batch or 0 for cell in self.cells for _ in self.shapes[cell.resolution]]


def read(file: Path) -> Any:
    """The bucket_config of a .json, or the literal that a .py assigns to that name; nothing is run."""
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix != ".py":
            found = json.loads(text)
            return found.get("bucket_config", found) if isinstance(found, dict) else found
        for node in ast.parse(text).body:
            if isinstance(node, ast.Assign) and any(getattr(t, "id", "") == "bucket_config" for t in node.targets):
                return ast.literal_eval(node.value)
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise UserError(f"the table of buckets {file} cannot be read: {error}") from None
    raise UserError(f"{file} assigns no bucket_config.")


def table(config: Any, rules: str) -> Table:
    """The table of a bucket_config. Raises UserError that names the entry."""
    if not isinstance(config, dict) or not config:
        raise UserError("a bucket_config is {resolution: {frames: [probability, batch size]}}, with an entry at least.")
    found = {str(name): aspects(str(name), rules) for name in config}
    ranked = sorted(found, key=lambda name: -found[name][0])
    cells = []
    for name in ranked:
        entries = {str(key): value for key, value in config.items()}[name]
        if not isinstance(entries, dict):
            raise UserError(f"bucket_config[{name!r}] is {entries!r}; expected {{frames: [probability, batch size]}}.")
        cells += sorted((_cell(name, *entry) for entry in entries.items()), key=lambda cell: -cell.frames)
    shapes = {name: np.array(list(found[name][1].values())) for name in ranked}
    if rules == "2.0":
        tall = {name: _ratios(list(found[name][1])) for name in ranked}
    else:
        tall = {name: np.array([float(key) for key in found[name][1]]) for name in ranked}
    return Table(rules, cells, {name: found[name][0] for name in ranked}, shapes, tall)


def _ratios(names: list[str]) -> np.ndarray:
    """Height to width of names that say width:height."""
    return np.array([float(high) / float(wide) for wide, _, high in (name.partition(":") for name in names)])


def _cell(resolution: str, frames: Any, entry: Any) -> Cell:
    try:
        probability, batch = entry
        pair = isinstance(probability, (list, tuple))
        take, length = probability if pair else (probability, None)
        chances = [float(take)] if length is None else [float(take), float(length)]
        if not all(0.0 <= chance <= 1.0 for chance in chances) or not (batch is None or int(batch) >= 1):
            raise ValueError
        if batch is None and chances[0] > 0:
            raise ValueError
        return Cell(resolution, int(frames), chances[0], chances[1] if pair else None, batch and int(batch))
    except (TypeError, ValueError):
        raise UserError(
            f"bucket_config[{resolution!r}][{frames!r}] is {entry!r}; expected [probability, batch size], the "
            "probability a number in [0, 1] or a pair of them; 0 and None: nothing goes there."
        ) from None


# ---- where a record goes --------------------------------------------------------------------------------------------


class Clips(NamedTuple):
    """Columns of what is to be placed: frames that a clip may have, and sides."""

    frames: np.ndarray
    height: np.ndarray
    width: np.ndarray


def sampled(frames: np.ndarray, fps: np.ndarray, fps_max: float) -> np.ndarray:
    """2.0: frames that are left at an interval of ceil(fps / fps_max)."""
    return frames // np.where(fps > fps_max, np.ceil(fps / fps_max), 1).astype(np.int64)


def place(found: Table, clips: Clips, interval: int, chance: Chance) -> np.ndarray:
    """(n,) the bucket of each clip, -1 for none. `interval` is that of 1.2; frames are `sampled` already in 2.0."""
    cell = np.full(len(clips.frames), -1)
    waiting = np.ones(len(cell), bool)
    numbered = list(enumerate(found.cells))
    for resolution, pixels in found.pixels.items():
        large = waiting & (clips.height * clips.width >= NEAR * pixels)
        cells = [(number, c) for number, c in numbered if c.resolution == resolution]
        taken = _images(cells, large & (clips.frames == 1), chance, cell)
        taken |= _videos(found.rules, cells, clips.frames, large & (clips.frames != 1), interval, chance, cell)
        waiting &= ~taken
    return _with_aspect(found, clips, cell)


def _images(cells: list[tuple[int, Cell]], mask: np.ndarray, chance: Chance, cell: np.ndarray) -> np.ndarray:
    taken = np.zeros_like(mask)
    for number, entry in cells:
        if entry.frames == 1:
            rows = np.flatnonzero(mask)
            rows = rows[chance(rows, number, 0) < entry.take]
            cell[rows], taken[rows] = number, True
    return taken


def _videos(
    rules: str,
    cells: list[tuple[int, Cell]],
    frames: np.ndarray,
    mask: np.ndarray,
    interval: int,
    chance: Chance,
    cell: np.ndarray,
) -> np.ndarray:
    """A length first; then whether the resolution takes it, which a probability of 1 does without a draw."""
    taken, left = np.zeros_like(mask), mask.copy()
    for number, entry in cells:
        if entry.frames == 1:
            continue
        long_enough = frames > entry.frames * interval if rules == "1.2" else frames >= entry.frames
        rows = np.flatnonzero(left & long_enough)
        if entry.length is not None:
            stays = chance(rows, number, 0) < entry.length
            rows = rows[stays if rules == "1.2" else ~stays]
        left[rows] = False
        if entry.take < 1:
            rows = rows[chance(rows, number, 0 if entry.length is None else 1) < entry.take]
        cell[rows], taken[rows] = number, True
    return taken


def _with_aspect(found: Table, clips: Clips, cell: np.ndarray) -> np.ndarray:
    """The bucket of each cell whose height / width is nearest."""
    bucket = np.full(len(cell), -1)
    for number, entry in enumerate(found.cells):
        rows = np.flatnonzero(cell == number)
        shape = clips.height[rows] / clips.width[rows]
        far = np.abs(shape[:, None] - found.tall[entry.resolution])
        bucket[rows] = found.first(number) + far.argmin(axis=1)
    return bucket

"""Sampled clips as files: each as mp4, gif and a strip of frames, all as a grid, and the json that says what made them.

Clips are written as they come and not kept, but for the few of the grid. A file is whole or absent, and the json is
there before the first clip, so that a call that was killed can go on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from core.errors import UserError
from core.files import read_json, whole, write_atomic
from core.media import enlarged, overview, sheet, tiled, write_gif, write_mp4
from core.preflight import writable
from core.requests import Request

GRID = 16
"""Clips of the grid: the first ones."""
STRIP = 16
"""Frames of a strip."""
JSON = "samples.json"
LIMIT = 2**30
"""Bytes of it, at most: a hundred for each clip, and its prompt."""


def fresh_folder(wanted: Path | None, default: Path) -> Path:
    """Where clips go: `wanted`, or the first of `default`, `default-2`, … that is not there."""
    out, n = wanted or default, 1
    while wanted is None and out.exists():
        n += 1
        out = default.with_name(f"{default.name}-{n}")
    writable(out)
    return out


def goes_on(out: Path, told: dict[str, Any]) -> bool:
    """Whether a call that was killed had begun to make the clips that `told` tells of in this folder. Raises UserError
    where it holds other samples, or has them all.
    """
    if not (out / JSON).exists():
        return False
    try:
        there = read_json(out / JSON, LIMIT)
    except (OSError, ValueError):
        there = None
    if there == json.loads(json.dumps(told)):
        return True
    raise UserError(f"--output-dir {out} holds {_what_is_other(there, told)}: name another folder")


def _what_is_other(there: Any, told: dict[str, Any]) -> str:
    """In which words samples are not those that were wanted."""
    if not isinstance(there, dict):
        return f"a {JSON} that is none of ours"
    wanted = json.loads(json.dumps(told | {"complete": True}))
    other = [name for name in wanted if there.get(name) != wanted[name]]
    return f"samples that differ in {', '.join(other)}" if other else "these samples already"


def is_there(out: Path, entry: dict[str, Any]) -> bool:
    """Whether all files of a clip are."""
    return all((out / name).exists() for name in entry["files"])


def kinds_of(formats: Sequence[str], frames: int) -> tuple[str, ...]:
    """The formats that are written: a picture, a clip of one frame, is a png."""
    return tuple(formats) if frames > 1 else ("png",)


def entry_of(request: Request, formats: Sequence[str]) -> dict[str, Any]:
    """What the json says of a clip: number, prompt, and files."""
    return {**request._asdict(), "files": [f"{request.name}.{kind}" for kind in formats]}


def write_clip(out: Path, entry: dict[str, Any], frames: np.ndarray, fps: int) -> None:
    """Write one clip, (T, H, W, 3) uint8, into the files of its entry."""
    moving = enlarged(frames)
    write = {
        ".mp4": lambda path: write_mp4(path, moving, fps),
        ".gif": lambda path: write_gif(path, moving, fps),
        ".png": lambda path: sheet(frames[None], columns=STRIP).save(path),
    }
    for name in entry["files"]:
        _whole(out / name, write[Path(name).suffix])


def _whole(path: Path, write: Callable[[Path], object]) -> None:
    """A file that a reader finds whole or not at all."""
    with whole(path) as partial:
        write(partial)


def write_overview(out: Path, clips: list[np.ndarray], fps: int, formats: tuple[str, ...]) -> None:
    """The first clips side by side as one moving grid, and as a sheet of their frames."""
    frames = np.stack(clips)
    moving = enlarged(tiled(frames))
    _whole(out / "sheet.png", overview(frames).save)
    if len(moving) == 1:
        return
    if "mp4" in formats:
        _whole(out / "grid.mp4", lambda path: write_mp4(path, moving, fps))
    if "gif" in formats:
        _whole(out / "grid.gif", lambda path: write_gif(path, moving, fps))


def write_json(out: Path, told: dict[str, Any]) -> None:
    """What made the clips, and which they are."""
    write_atomic(out / JSON, json.dumps(told, indent=1, ensure_ascii=False) + "\n")

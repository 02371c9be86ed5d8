"""Sampled clips as files: each as mp4, gif and a strip of frames, all as a grid, and the json that says what made them.

Clips are written as they come and not kept, but for the few of the grid.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from core.errors import UserError
from core.media import enlarged, overview, sheet, tiled, write_gif, write_mp4
from core.preflight import writable
from core.requests import Request
from core.run_facts import run_facts

GRID = 16
"""Clips of the grid: the first ones."""
STRIP = 16
"""Frames of a strip."""
JSON = "samples.json"


def fresh_folder(wanted: Path | None, default: Path) -> Path:
    """Where clips go: `wanted`, or the first of `default`, `default-2`, … that is not there. Raises UserError when the
    wanted one has samples in it.
    """
    if wanted is not None and (wanted / JSON).exists():
        raise UserError(f"--output-dir {wanted} holds samples already: name another folder")
    out, n = wanted or default, 1
    while wanted is None and out.exists():
        n += 1
        out = default.with_name(f"{default.name}-{n}")
    writable(out)
    return out


def write_clip(out: Path, request: Request, frames: np.ndarray, fps: int, formats: tuple[str, ...]) -> dict[str, Any]:
    """Write one clip, (T, H, W, 3) uint8, in each format; a picture, a clip of one frame, as png. Returns its entry in
    the json.
    """
    paths = {kind: out / f"{request.name}.{kind}" for kind in (formats if len(frames) > 1 else ("png",))}
    moving = enlarged(frames)
    if "mp4" in paths:
        write_mp4(paths["mp4"], moving, fps)
    if "gif" in paths:
        write_gif(paths["gif"], moving, fps)
    if "png" in paths:
        sheet(frames[None], columns=STRIP).save(paths["png"])
    return {**request._asdict(), "files": [path.name for path in paths.values()]}


def write_overview(out: Path, clips: list[np.ndarray], fps: int, formats: tuple[str, ...]) -> None:
    """The first clips side by side as one moving grid, and as a sheet of their frames."""
    frames = np.stack(clips)
    moving = enlarged(tiled(frames))
    overview(frames).save(out / "sheet.png")
    if len(moving) == 1:
        return
    if "mp4" in formats:
        write_mp4(out / "grid.mp4", moving, fps)
    if "gif" in formats:
        write_gif(out / "grid.gif", moving, fps)


def write_json(out: Path, made_by: dict[str, Any], clips: list[dict[str, Any]]) -> None:
    """What made the clips, and each clip: its number, prompt, and files."""
    text = json.dumps(
        {**made_by, "clips": sorted(clips, key=lambda clip: clip["number"])}, indent=1, ensure_ascii=False
    )
    (out / JSON).write_text(text + "\n", encoding="utf-8")


def log_to_run(run: Path, out: Path, store: str | None) -> None:
    """Log the folder of samples to the MLflow run that they are from. A store that does not take them is a warning."""
    from core.tracking import client, first_line, store_of

    facts = run_facts(run)
    if not facts.get("run_id"):
        return
    try:
        client(store_of(facts, store)).log_artifacts(facts["run_id"], str(out), f"samples/{out.name}")
    except Exception as error:  # noqa: BLE001  whatever the store does, the samples are there
        warnings.warn(f"the samples are in {out}, but MLflow did not take them ({first_line(error)})", stacklevel=2)

"""The generated set on disk: one lossless file an item, written whole or not at all, so that an evaluation that was
stopped goes on where it was.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from core.errors import UserError
from core.files import read_json, whole, write_atomic
from core.hashing import hash_of
from core.preflight import writable
from core.requests import Request, prompts_in, slug

FACTS = "made-by.json"
COLUMNS = ("caption_en", "caption", "name", "text")
"""Names that tables of captions give their column, the first that is there."""
FREE = ("versions", "notes", "device", "fps")
"""What may differ between the parts of one set."""
PATHS = ("run", "checkpoint", "weights")
"""So may these, where the hash of the weights says that they are the same."""


def captions_in(file: Path) -> list[str]:
    """The captions of a text file, one a line, or of a .csv or .tsv with a column for them."""
    if file.suffix not in (".csv", ".tsv"):
        return prompts_in(file, "--captions")
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            table = csv.DictReader(stream, delimiter="\t" if file.suffix == ".tsv" else ",")
            column = next((name for name in COLUMNS if name in (table.fieldnames or ())), None)
            rows = [row[column] for row in table] if column else []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--captions {file}: cannot be read as a table ({error})") from None
    found = [text.strip() for text in rows if text and text.strip()]
    if not found:
        raise UserError(f"--captions {file}: no caption in it; expected a column called {' or '.join(COLUMNS)}")
    return found


def begin(out: Path, facts: Mapping[str, Any], restart: bool) -> None:
    """Make `out` the place of a set made by `facts`, or go on with the one in it. Raises UserError when what is there
    was made by something else; with `restart` that is removed.
    """
    file = out / FACTS
    writable(out)
    if restart:
        for path in [*out.glob("guidance-*/*.png"), *out.glob("guidance-*/*.npy"), file]:
            path.unlink(missing_ok=True)
    free = FREE + PATHS * bool(facts["weights_hash"])
    ours = json.loads(json.dumps({name: value for name, value in facts.items() if name not in free}))
    if file.is_file():
        theirs = _read(file)
        if other := sorted(name for name in ours | theirs if ours.get(name) != theirs.get(name)):
            raise UserError(
                f"{out} holds a set that something else made (differs in {', '.join(other)}): --restart removes it, "
                "--output-dir names another folder"
            )
    write_atomic(file, json.dumps(ours, indent=1) + "\n")


def _read(file: Path) -> dict[str, Any]:
    try:
        found = read_json(file, 2**20)
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}); --restart begins anew") from None
    return found if isinstance(found, dict) else {}


def place_of(out: Path, scale: float, request: Request, still: bool) -> Path:
    """The file of an item. It is found again by caption and copy, wherever the caption stands in its file."""
    name = f"{slug(request.prompt)[:40]}-{hash_of(request.id):016x}"
    return out / f"guidance-{scale:g}" / f"{name}.{'png' if still else 'npy'}"


def write_item(path: Path, frames: np.ndarray) -> None:
    """One clip, (T, H, W, 3) uint8; a picture is a png."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    if path.suffix == ".png":
        Image.fromarray(frames[0]).save(content, "PNG")
    else:
        np.save(content, frames)
    with whole(path) as partial, partial.open("wb") as file:
        file.write(content.getbuffer())
        file.flush()
        os.fsync(file.fileno())


def read_item(path: Path) -> np.ndarray:
    """The clip in a file, (T, H, W, 3) uint8. Raises UserError for a damaged one."""
    try:
        if path.suffix == ".png":
            with Image.open(path) as picture:
                return np.asarray(picture.convert("RGB"))[None]
        return np.asarray(np.load(path, allow_pickle=False), np.uint8)
    except (OSError, ValueError, UnidentifiedImageError, EOFError) as error:
        raise UserError(f"{path}: damaged ({error}); remove it, and it is made again") from None

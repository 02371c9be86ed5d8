"""The manifest of a checkpoint: size and hash of each of its files, written last. Without one it is half-written."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from core.files import synced_digest, write_atomic

NAME = "manifest.json"
LIMIT = 64 * 2**20
"""Bytes of a manifest or state file that are read at most; ours have some hundred kilobytes."""


def digests(folder: Path, part: int = 0, parts: int = 1) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every `parts`-th file in `folder`, synced to the disk. The ranks share the work."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name != NAME)
    return {p.name: {"bytes": p.stat().st_size, "sha256": synced_digest(p)} for p in files[part::parts]}


def write(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """Write the manifest; with it the folder is complete."""
    write_atomic(folder / NAME, json.dumps({"files": files}, indent=1))


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The files that the manifest names. Raises ValueError for one that is damaged, OSError where there is none."""
    path = folder / NAME
    if path.stat().st_size > LIMIT:
        raise ValueError("it is larger than any manifest")
    content = json.loads(path.read_text())
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not files:
        raise ValueError("it names no files")
    for name, entry in files.items():
        if Path(name).name != name or not isinstance(entry, dict) or not isinstance(entry.get("sha256"), str):
            raise ValueError(f"its entry {name!r} is not a file of the checkpoint with a hash")
    return files


def damage(folder: Path) -> str | None:
    """What is wrong with the checkpoint in `folder`, in a few words, or None when every byte is as it was written."""
    try:
        files = read(folder)
    except FileNotFoundError:
        return f"half-written: it has no {NAME}"
    except (OSError, ValueError, RecursionError) as error:
        return f"its {NAME} cannot be read ({error})"
    for name, entry in files.items():
        path = folder / name
        if not path.is_file() or path.is_symlink():
            return f"{name} is missing"
        if path.stat().st_size != entry.get("bytes"):
            return f"{name} has {path.stat().st_size} bytes, not {entry.get('bytes')}"
        try:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if found != entry["sha256"]:
            return f"{name} does not have the hash that it was written with"
    return None

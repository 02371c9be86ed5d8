"""The manifest of a checkpoint: size and hash of each of its files, written last. Without one it is half-written."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from core.files import read_json, synced_digest, write_atomic

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
    content = read_json(folder / NAME, LIMIT)
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not files:
        raise ValueError("it names no files")
    for name, entry in files.items():
        if not _is_name(name) or not isinstance(entry, dict) or not _is_entry(entry):
            raise ValueError(f"its entry {name!r} is not a file of the checkpoint with size and hash")
    return files


def _is_name(name: str) -> bool:
    """Of a file within the folder, and one that a terminal can show."""
    return Path(name).name == name and name.isprintable() and len(name) < 256


def _is_entry(entry: dict[str, Any]) -> bool:
    size = entry.get("bytes")
    return isinstance(entry.get("sha256"), str) and isinstance(size, int) and 0 <= size < 2**63


def damage(folder: Path) -> str | None:
    """What is wrong with the checkpoint in `folder`, in a few words, or None when every byte is as it was written."""
    try:
        files = read(folder)
    except FileNotFoundError:
        return f"half-written: it has no {NAME}"
    except (OSError, ValueError) as error:
        return f"its {NAME} cannot be read ({error})"
    for name, entry in files.items():
        path = folder / name
        if not path.is_file() or path.is_symlink():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, not {entry['bytes']}"
        try:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if found != entry["sha256"]:
            return f"{name} does not have the hash that it was written with"
    return None

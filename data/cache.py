"""Data sets that are made, not downloaded: written once to a cache that every run of the machine shares."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from core.hashing import hash_of


def cached(name: str, version: int, parameters: Mapping[str, object], write: Callable[[Path], None]) -> Path:
    """The folder of a data set, filled by `write(folder)` on first use; several processes may ask at once.

    It lies in `$REGISTRY_CACHE`, else in `video-experiment-registry` of `$XDG_CACHE_HOME` or `~/.cache`. The folder's
    name holds a hash of version and parameters, so another version never reads this one's files.
    """
    folder = place(name, version, parameters)
    if not folder.is_dir():
        write_once(folder, write)
    return folder


def place(name: str, version: int, parameters: Mapping[str, object]) -> Path:
    """Where `cached` puts a data set."""
    words = [str(part) for item in sorted(parameters.items()) for part in item]
    return cache() / f"{name}-{hash_of(name, version, *words):016x}"


def cache() -> Path:
    """The folder of everything that is made on first use."""
    if named := os.environ.get("REGISTRY_CACHE"):
        return Path(named).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "video-experiment-registry"


def write_once(folder: Path, write: Callable[[Path], None]) -> None:
    """Written beside its place and renamed: nobody sees half a set, and who comes second takes the first one's."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    half = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        write(half)
        half.chmod(0o755)
        half.replace(folder)
    except OSError:
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(half, ignore_errors=True)

"""Two small files beside the journal: `run.json`, which run this is, and `synced.json`, how much of it which store has.

Both are replaced whole, so that whoever reads them finds the old text or the new one.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from core.files import read_json

FILE_NAME, SYNCED = "run.json", "synced.json"
LIMIT = 2**20
"""Bytes of such a file, at most."""


def run_facts(folder: Path) -> dict[str, Any]:
    """uid, MLflow run id, store (without password) and run name of the run in `folder`; empty where there is none."""
    facts = _load(folder / FILE_NAME)
    return facts if all(isinstance(v, bool) or (isinstance(v, str) and v.isprintable()) for v in facts.values()) else {}


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Replace run.json."""
    _replace(folder / FILE_NAME, facts, durable=True)


class Synced:
    """How far the journal went into one store: the run there, and the offset behind the last event it took."""

    def __init__(self, folder: Path, store: str) -> None:
        self._path, self._store = folder / SYNCED, store
        entry = _load(self._path).get(store, {})
        entry = entry if _is_entry(entry) else {}
        self.run_id, self.offset = str(entry.get("run_id", "")), int(entry.get("offset", 0))
        self.owed: list[int] = list(entry.get("owed", []))
        """Where events begin that the store did not take while it took others: files, when only the artifact store is
        down.
        """
        journal = folder / "journal.jsonl"
        if journal.is_file() and self.offset > journal.stat().st_size:  # another journal, or one that lost its end
            self.offset, self.owed = 0, []

    def belong(self, run_id: str) -> None:
        """Say which run it is; one that is not the run of before has nothing yet."""
        if run_id != self.run_id:
            self.run_id, self.offset, self.owed = run_id, 0, []

    def advance(self, offset: int) -> None:
        """Everything before `offset` is in the store."""
        self.offset = offset
        self._write()

    def owe(self, starts: list[int]) -> None:
        """The events that begin at these offsets are to be sent again one day."""
        self.owed = starts
        self._write()

    def _write(self) -> None:
        entry = {"run_id": self.run_id, "offset": self.offset, "owed": self.owed}
        _replace(self._path, _load(self._path) | {self._store: entry})


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("owed"), list):
        return False
    offsets = [entry.get("offset"), *entry["owed"]]
    return isinstance(entry.get("run_id"), str) and all(type(n) is int and 0 <= n < 2**62 for n in offsets)


def _load(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path, LIMIT)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _replace(path: Path, value: dict[str, Any], durable: bool = False) -> None:
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        if durable:
            os.fsync(file.fileno())
    partial.replace(path)

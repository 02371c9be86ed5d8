"""The tables of old flags, read from the TOML files beside this module."""

from __future__ import annotations

import functools
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Row:
    """What became of one old flag; lvdm.toml explains the fields."""

    name: str
    cells: tuple[str, ...]
    here: str
    remark: str
    to: tuple[str, ...] = ()
    words: dict[str, str] = field(default_factory=dict)
    recipes: dict[str, str] = field(default_factory=dict)
    known: tuple[str, ...] | None = None
    unset: tuple[str, ...] = ()
    unless: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    default: tuple[str, ...] = ()
    status: str = ""
    extra: tuple[str, ...] = ()
    do: str = ""
    page_only: bool = False

    @property
    def says(self) -> str:
        """What is said of it in one line."""
        return re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", self.remark or self.here).replace("`", "")

    def targets(self) -> tuple[str, ...]:
        """Flags of ours: fields (`optim.lr`) or with dashes (`--steps`), perhaps with a value (`--precision fp16`)."""
        found = re.match(r"`([^`]+)`", self.here)
        return self.to or ((found[1],) if found else ())


@functools.cache
def read(name: str) -> dict[str, Any]:
    """A TOML file of this folder, by its name without the suffix."""
    return tomllib.loads((FOLDER / f"{name}.toml").read_text("utf-8"))


@functools.cache
def rows(table: str) -> dict[str, Row]:
    """The rows of a table (`lvdm.training`) by the old flag."""
    file, part = table.split(".")
    made = [Row(**{_field(key): _frozen(value) for key, value in row.items()}) for row in read(file)[part]["rows"]]
    return {row.name: row for row in made}


def _field(key: str) -> str:
    return "extra" if key == "with" else key


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def page_table(table: str) -> str:
    """The table as a page of the documentation has it."""
    file, part = table.split(".")
    head = read(file)[part]["head"]
    lines = []
    for row in rows(table).values():
        name = row.name if row.name.startswith("fixed ") else f"`{row.name}`"
        cells = " | ".join([name, *row.cells, row.here, row.remark])
        lines.append(f"| {cells} |".replace("|  |", "| |").replace("|  |", "| |"))
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *lines])

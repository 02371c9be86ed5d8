"""`diff`: two recipes field by field, only what differs. Says what a run was against what it was meant to be."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

from core.recipe_file import load, read
from core.slots.recipe import Recipe
from core.slots.slot import flatten, to_json
from core.verbs.printing import Line, columns, emit, show_value

ABSENT = "-"
"""Shown where one side has no such field, because its slot is of another class."""


class Difference(NamedTuple):
    """A field that differs; a side without that field has no value in `sides`."""

    path: str
    sides: dict[str, Any]


def side(text: str, store: str | None, names: Collection[str], get: Callable[[str], Recipe]) -> Recipe:
    """What one side means: `run:<id>`, a recipe.json, an output directory, or a recipe's name with overrides."""
    if text.startswith("run:"):
        from core.tracking import fetch_recipe_json

        return load(fetch_recipe_json(text.removeprefix("run:"), store), text)
    name = text.partition(" ")[0]
    if name not in names and ("/" in name or name.endswith(".json") or os.path.exists(text)):  # noqa: PTH110
        return read(Path(text))
    return get(text)


def differences(a: Recipe, b: Recipe) -> list[Difference]:
    """The fields, by dotted path in the order of the slots, whose values or slot classes differ. Names do not count."""
    left, right = flatten(a), flatten(b)
    found = []
    for path in sorted(left.keys() | right.keys(), key=_order(list(left) + list(right))):
        sides = {side: leaves[path] for side, leaves in (("a", left), ("b", right)) if path in leaves}
        if len(sides) == 1 or sides["a"] != sides["b"] or type(sides["a"]) is not type(sides["b"]):
            found.append(Difference(path, sides))
    return found


def _order(paths: list[str]) -> Any:
    """Sort key: slots in their order of first mention, what belongs to a slot together and after it."""
    first: dict[str, int] = {}
    for i, path in enumerate(paths):
        parts = path.split(".")
        for n in range(1, len(parts) + 1):
            first.setdefault(".".join(parts[:n]), i)
    return lambda path: [first[".".join(path.split(".")[:n])] for n in range(1, path.count(".") + 2)]


def print_diff(a: Recipe, b: Recipe, labels: tuple[str, str], as_json: bool = False) -> int:
    """Print what differs between the two; returns 1 where something does, else 0."""
    found = differences(a, b)
    if as_json:
        rows = [{"field": d.path} | {side: to_json(value) for side, value in d.sides.items()} for d in found]
        print(json.dumps({"a": labels[0], "b": labels[1], "equal": not found, "differences": rows}, indent=2))
    else:
        emit(_lines(found, labels) if found else [(f"no field differs between {labels[0]} and {labels[1]}", "")])
    return int(bool(found))


def _lines(found: list[Difference], labels: tuple[str, str]) -> list[Line]:
    rows, styles = [("", *labels)], ["bold"]
    slot = ""
    for difference in found:
        head, _, rest = difference.path.partition(".")
        if head != slot and rest:
            rows.append((head, "", ""))
            styles.append("bold")
        slot = head
        left, right = (show_value(difference.sides[s]) if s in difference.sides else ABSENT for s in ("a", "b"))
        rows.append((f"  {rest}" if rest else head, left, right))
        styles.append("" if rest else "bold")
    return list(zip(columns(rows), styles, strict=True))

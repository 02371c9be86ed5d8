"""`diff`: two recipes field by field, only what differs; or the flags, or the child recipe, that lead from one to the
other. Says what a run was against what it was meant to be.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple, cast

from core.cli import parse
from core.errors import UserError, did_you_mean
from core.recipe_file import delta_flags, load, read
from core.recipe_source import child_source
from core.slots.recipe import RECIPES, Recipe
from core.slots.slot import Slot, field_types, flatten, named_like, to_json
from core.swap import item_kinds, slot_kinds
from core.verbs.flags import StoreFlags, taken
from core.verbs.printing import Line, columns, emit, show_value

ABSENT = "-"
"""Shown where one side has no such field, because its slot is of another class."""


STYLES = {frozenset("a"): "red", frozenset("b"): "green", frozenset("ab"): "yellow"}
"""Colour of a field by the sides that have it."""


class Difference(NamedTuple):
    """A field that differs; a side without that field has no value in `sides`."""

    path: str
    sides: dict[str, Any]


AT_COMMIT = re.compile(r"[a-z0-9][a-z0-9.-]*@\S")
"""How a side begins that is a recipe at a commit."""
FORMS = ("table", "flags", "recipe")


def diff(words: list[str], names: Collection[str], get: Callable[[str], Recipe], as_json: bool) -> int:
    """Print what differs between two sides, the first two words; returns 1 where something does, else 0. With `--as
    flags` or `--as recipe` it prints what leads from the first to the second, and returns 0.
    """
    labels, rest = (words[0], words[1]), words[2:]
    form, name = taken(rest, "--as") or "table", taken(rest, "--name")
    if form not in FORMS:
        raise UserError(f"--as {form}: expected one of {', '.join(FORMS)}{did_you_mean(form, FORMS)}")
    if as_json and form != "table":
        raise UserError(f"--json and --as {form} are two forms of one answer: give one of them")
    if name and form != "recipe":
        raise UserError("--name is the name of the recipe that --as recipe prints: give both")
    (flags,) = parse(rest, StoreFlags())
    a, b = (side(label, flags.store, names, get) for label in labels)
    if form == "table":
        return print_diff(a, b, labels, as_json)
    if form == "flags":
        print(shlex.join(delta_flags(b, a)))
    else:
        print(child_source(parent_of(a), b, name or f"{a.name}-variant"), end="")
    return 0


def parent_of(recipe: Recipe) -> type[Recipe]:
    """The registered class of a recipe's name. Raises UserError where there is none."""
    if recipe.name not in RECIPES:
        raise UserError(f"no recipe is called {recipe.name!r} here, so there is nothing to derive a child from")
    return RECIPES[recipe.name]


def side(text: str, store: str | None, names: Collection[str], get: Callable[[str], Recipe]) -> Recipe:
    """What one side means: `run:<id>`, a recipe.json, an output directory, a recipe's name with overrides, or that at
    a commit, `NAME@REVISION`.
    """
    if text.startswith("run:"):
        from core.tracking import fetch_recipe_json

        return load(fetch_recipe_json(text.removeprefix("run:"), store), text)
    if AT_COMMIT.match(text) and not os.path.exists(text):  # noqa: PTH110
        from core.at_commit import recipe_at

        return recipe_at(text)
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


def apply(found: list[Difference], a: Recipe) -> Recipe:
    """`a` with the values of side b where `found` has one, in the class and with the name of `a`.

    `apply(differences(a, b), a)` has the fields of b. Raises SlotError where the fields do not go together.
    """
    leaves = flatten(a) | {path: sides["b"] for path, sides in found if "b" in sides}
    return named_like(a, cast(Recipe, _made(type(a), leaves, "")))


def _made(cls: type[Slot], leaves: dict[str, Any], prefix: str) -> Slot:
    """The slot of this class whose leaves, by dotted path, are those below `prefix`."""
    return cls(**{name: _value(hint, leaves, prefix + name) for name, hint in field_types(cls).items()})


def _value(hint: Any, leaves: dict[str, Any], path: str) -> Any:
    value = leaves[path]
    if slot_kinds(hint) and isinstance(value, str):
        return _made(Slot.by_name[value], leaves, f"{path}.")
    if item_kinds(hint) and isinstance(value, str):
        count = int(value.partition(" ")[0])
        return tuple(_made(Slot.by_name[leaves[f"{path}.{i}"]], leaves, f"{path}.{i}.") for i in range(count))
    return value


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
        styles.append(STYLES[frozenset(difference.sides)])
    return list(zip(columns(rows), styles, strict=True))

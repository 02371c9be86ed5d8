"""Recipes as text: `recipe.json` beside every checkpoint, its hash, and the flags that lead from one recipe to another.

A recipe file names classes but imports nothing: whoever loads one has imported the recipes and data slots before
(the registry does). Nothing in it is run, so a file from elsewhere is data.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from core.cli import ALIASES, dashed
from core.errors import UserError
from core.files import read_text
from core.slots.recipe import RECIPES, Recipe
from core.slots.slot import Slot, field_types, from_json, to_json
from core.swap import class_names, item_kinds, options, slot_kinds, spots, swapped

FORMAT = 1
FILE_NAME = "recipe.json"
MAX_BYTES = 1_000_000
"""A recipe of 200 fields is about 8 kB."""


def dump(recipe: Recipe) -> str:
    """The recipe as JSON: `{"format": 1, "recipe": name, "fields": {…}}`. ASCII, so that no encoding can spoil it."""
    return json.dumps({"format": FORMAT, "recipe": recipe.name, "fields": _fields(recipe)}, indent=2) + "\n"


def _fields(recipe: Recipe) -> dict[str, Any]:
    return {name: to_json(getattr(recipe, name)) for name in field_types(type(recipe))}


def load(text: str, where: str) -> Recipe:
    """The inverse of `dump`, exactly; `where` names the text in errors.

    A recipe whose name is no longer registered comes back as a plain `Recipe` that keeps its name and fields. Raises
    UserError for what is no recipe, comes from a newer format, or has unknown or missing fields.
    """
    try:
        return _load(_json(text, where), where)
    except RecursionError:
        raise UserError(f"{where} is no recipe: it is nested too deeply") from None


def _json(text: str, where: str) -> dict[str, Any]:
    if len(text) > MAX_BYTES:
        raise UserError(f"{where} is no recipe: it is larger than {MAX_BYTES:,} bytes")
    try:
        value = json.loads(text, object_pairs_hook=_no_doubles)
    except ValueError as error:  # JSONDecodeError, a doubled key, or an integer of thousands of digits
        raise UserError(f"{where} is no recipe: not valid JSON ({error})") from None
    if not isinstance(value, dict) or "format" not in value:
        raise UserError(f'{where} is no recipe: expected {{"format": {FORMAT}, "recipe": …, "fields": …}}')
    return value


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(k for k in keys if keys.count(k) > 1)!r} stands twice in one object")
    return value


def _load(value: dict[str, Any], where: str) -> Recipe:
    version, name, fields = value["format"], value.get("recipe"), value.get("fields")
    if type(version) is not int or version < 1:
        raise UserError(f"{where}: format {version!r} is not known; expected {FORMAT}")
    if version > FORMAT:
        raise UserError(f"{where} has format {version}, this version reads up to {FORMAT}: upgrade the project")
    if not isinstance(name, str) or not isinstance(fields, dict) or "is" in fields:
        raise UserError(f'{where} is no recipe: "recipe" must be a name and "fields" an object of fields')
    cls = RECIPES.get(name, Recipe)
    recipe = cast(Recipe, from_json(cls, {"is": cls.__name__, **fields}, where))
    if recipe.name != name:
        object.__setattr__(recipe, "name", name)  # the class has none for it
    return recipe


def read(path: Path) -> Recipe:
    """The recipe of a `recipe.json`, or of the output directory that holds one."""
    is_dir = os.path.isdir(path)  # noqa: PTH112  # unlike Path's, False for a name that is too long
    file = path / FILE_NAME if is_dir else path
    try:
        text = read_text(file, MAX_BYTES)
    except FileNotFoundError:
        raise UserError(f"{path} holds no {FILE_NAME}" if is_dir else f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as a recipe: {error}") from None
    return load(text, str(file))


def recipe_hash(recipe: Recipe) -> str:
    """SHA-256 (hex) of what is trained: the fields as canonical JSON, without name and tracking.

    Two recipes with the same hash train the same thing whatever they are called and wherever they are filed. The
    launch is no part of a recipe, so output directory, ranks and store do not count either.
    """
    fields = {name: value for name, value in _fields(recipe).items() if name != "tracking"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# -------------------------------------------------------------------------------------------------------------- flags


def delta_flags(recipe: Slot, base: Slot) -> list[str]:
    """The shortest flags that turn `base` into `recipe`: `core.cli.parse(delta_flags(r, b), b)` has the fields of r.

    Raises UserError for the few values that no flag can say, such as the text "None" where None is allowed.
    """
    swaps, state = _swaps(recipe, base)
    now, target = spots(state), spots(recipe)
    leaves = {path: value for path, (hint, value) in target.items() if _is_leaf(hint)}
    changed = {path: value for path, value in leaves.items() if now[path].value != value}
    for one, other in (("loop.max_steps", "loop.epochs"), ("loop.epochs", "loop.max_steps")):
        if changed.get(one) is not None and changed.get(other, 0) is None:
            del changed[other]  # follows by itself
    return swaps + [word for path, value in changed.items() for word in _words(path, now[path].hint, value)]


def _is_leaf(hint: Any) -> bool:
    return not slot_kinds(hint) and not item_kinds(hint)


def _swaps(recipe: Slot, state: Slot) -> tuple[list[str], Slot]:
    """Flags for the classes that differ, and the base with those classes; parents come before their parts."""
    flags = []
    for path, (hint, value) in spots(recipe).items():
        if _is_leaf(hint):
            continue
        names = class_names(value)
        if names != class_names(spots(state)[path].value):
            flags.append(f"--{dashed(path)}={names}")
            state = swapped(state, path, [names], flags[-1])
    return flags, state


def _words(path: str, hint: Any, value: Any) -> Iterator[str]:
    """One field as flag and value."""
    name = dashed(next((alias for alias, full in ALIASES.items() if full == path), path))
    if hint is bool and not value:
        head, _, last = name.rpartition(".")
        yield f"--{head}{'.' if head else ''}no-{last}"
        return
    items = value if isinstance(value, tuple) else (value,)
    words = [] if hint is bool else [_word(path, hint, item) for item in items]
    if words and words[0].startswith("-"):
        yield f"--{name}={words.pop(0)}"
    else:
        yield f"--{name}"
    if any(word.startswith("-") and not _is_number(word) for word in words):
        raise UserError(f"{path} = {value!r} cannot be written as a flag: only its first item may start with a dash")
    yield from words


def _word(path: str, hint: Any, item: Any) -> str:
    if isinstance(item, Path):
        text = item.as_posix()
        return f"./{text}" if text.startswith(("~", "-")) or text == "None" else text
    if item == "None" and type(None) in options(hint):
        raise UserError(f"{path} = 'None' cannot be written as a flag: there it means no value")
    return item if isinstance(item, str) else repr(item)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True

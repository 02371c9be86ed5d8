"""Which recipes `list` shows: words, tags and conditions on fields, all of which must hold."""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Callable, Iterable
from typing import Any

from core.errors import UserError, did_you_mean
from core.slots.recipe import Recipe
from core.slots.slot import flatten
from core.verbs.printing import show_value

COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
    "=": operator.eq,
}
Test = Callable[[Recipe], bool]


def matching(words: list[str], recipes: Iterable[Recipe]) -> list[Recipe]:
    """The recipes that the words ask for: `--tag KEY[=VALUE]`, `--where FIELD<VALUE`, and texts that stand in a
    recipe's name or docstring, whatever their case. Raises UserError for a condition that no recipe can be held
    against.
    """
    recipes = list(recipes)
    known = {path for recipe in recipes for path in flatten(recipe)}
    tests, words = [], list(words)
    while words:
        word = words.pop(0)
        flag, attached, value = word.partition("=")
        if not word.startswith("-"):
            tests.append(_says(word))
        elif flag not in ("--tag", "--where"):
            raise UserError(f"unknown flag {flag}{did_you_mean(flag, ['--json', '--tag', '--where', '--help'])}")
        elif not attached and not words:
            raise UserError(f"{flag} takes one value, got none")
        else:
            given = value if attached else words.pop(0)
            tests.append(_tagged(given) if flag == "--tag" else _condition(given, known))
    return [recipe for recipe in recipes if all(test(recipe) for test in tests)]


def _says(word: str) -> Test:
    return lambda recipe: word.lower() in f"{recipe.name}\n{inspect.getdoc(type(recipe))}".lower()


def _tagged(wanted: str) -> Test:
    """The experiment counts as a tag: both say where runs are filed."""
    key, valued, _ = wanted.partition("=")

    def test(recipe: Recipe) -> bool:
        tags = [f"experiment={recipe.tracking.experiment}", *recipe.tracking.tags]
        return wanted in tags if valued else key in (tag.partition("=")[0] for tag in tags)

    return test


def _condition(text: str, known: set[str]) -> Test:
    found = re.fullmatch(r"\s*([\w.-]+?)\s*(<=|>=|!=|<|>|==?)\s*(.*?)\s*", text)
    if not found:
        raise UserError(f"--where {text}: expected FIELD and <, <=, >, >=, = or != and a value, as 'optim.lr<1e-4'")
    path, sign, value = found[1].replace("-", "_"), found[2].replace("==", "="), found[3]
    if path not in known:
        raise UserError(f"--where {text}: no recipe has a field {path!r}{did_you_mean(path, known)}")
    wanted = _number(value)
    if sign not in ("=", "!=") and wanted is None:
        raise UserError(f"--where {text}: {sign} compares numbers, and {value!r} is none")

    def test(recipe: Recipe) -> bool:
        leaves = flatten(recipe)
        if path not in leaves:
            return False
        here = leaves[path]
        if wanted is not None and type(here) in (int, float):
            return COMPARE[sign](here, wanted)
        return sign in ("=", "!=") and COMPARE[sign](show_value(here), value)

    return test


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None

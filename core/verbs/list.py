"""`list`: every recipe in one line."""

from __future__ import annotations

import json
from collections.abc import Iterable

from core.slots.recipe import Recipe
from core.verbs.printing import columns, emit

HEAD = ("name", "system", "data", "what it is")


def summaries(recipes: Iterable[Recipe]) -> list[dict[str, str]]:
    """Name, class of system and data, and the first line of the docstring."""
    return [
        {
            "name": recipe.name,
            "system": type(recipe.system).__name__,
            "data": type(recipe.data).__name__,
            "about": (type(recipe).__doc__ or "").strip().partition("\n")[0].strip(),
        }
        for recipe in recipes
    ]


def print_list(recipes: Iterable[Recipe], as_json: bool = False) -> int:
    """Print the table, or with `as_json` a list of objects. Returns 1 where there is none, else 0."""
    rows = summaries(recipes)
    if as_json:
        print(json.dumps(rows, indent=2))
        return int(not rows)
    if not rows:
        print("no recipe is like that")
        return 1
    head, *lines = columns([HEAD, *(tuple(row.values()) for row in rows)])
    emit([(head, "bold"), *((line, "") for line in lines)])
    return 0

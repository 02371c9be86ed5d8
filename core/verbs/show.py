"""`show`: a recipe with every field resolved, and its docstring. The golden texts under tests/ are this output."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from core.recipe_file import dump, recipe_hash
from core.slots.recipe import Recipe
from core.slots.slot import flatten
from core.verbs.printing import Line, columns, emit, show_value


def text(recipe: Recipe) -> str:
    """What `show` prints."""
    return "\n".join(line for line, _ in _lines(recipe)) + "\n"


def print_recipe(recipe: Recipe, as_json: bool = False, origin: bool = False) -> None:
    """Print the recipe as an indented tree of slots, or with `as_json` as the `recipe.json` of a run; with `origin`
    every field with the place where it is set.
    """
    if origin:
        from core.verbs.origin import print_origins

        print_origins(recipe, as_json)
    elif as_json:
        print(dump(recipe), end="")
    else:
        emit(_lines(recipe))


def _lines(recipe: Recipe) -> Iterator[Line]:
    yield recipe.name, "bold"
    yield "", ""
    for line in (inspect.getdoc(type(recipe)) or "").splitlines():
        yield f"  {line}".rstrip(), "dim"
    yield "", ""
    yield f"class  {type(recipe).__module__}.{type(recipe).__qualname__}", ""
    yield f"hash   {recipe_hash(recipe)[:16]}  (of everything but name and tracking)", ""
    leaves = tree(recipe)
    for (path, _), line in zip(leaves, columns((label(path), value) for path, value in leaves), strict=True):
        if "." not in path:
            yield "", ""
        yield line, "" if "." in path else "bold"


def tree(recipe: Recipe) -> list[tuple[str, str]]:
    """Dotted path and shown value, every slot before what is in it."""
    leaves = flatten(recipe)
    order = {path: i for i, path in enumerate(leaves)}
    parents = {path: min(order[p] for p in leaves if p == path or p.startswith(f"{path}.")) for path in leaves}
    return [(path, show_value(leaves[path])) for path in sorted(leaves, key=lambda p: (parents[p], p.count(".")))]


def label(path: str) -> str:
    """The last part of a path, indented by its depth."""
    return "  " * path.count(".") + path.rpartition(".")[2]

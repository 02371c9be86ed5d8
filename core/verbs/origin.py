"""`show --origin`: where each field of a recipe is set, read from the source: the expressions of recipe files and the
defaults of slot classes. Nothing is run for it.
"""

from __future__ import annotations

import ast
import functools
import inspect
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from core.slots.recipe import RECIPES, Recipe
from core.slots.slot import Slot, field_types, flatten, to_json
from core.verbs.printing import Line, columns, emit
from core.verbs.show import label, tree

TYPED = "command line"


class Source(NamedTuple):
    """A module's text as a tree, and what its names stand for."""

    file: str
    classes: dict[str, ast.ClassDef]
    values: dict[str, ast.expr]
    imports: dict[str, tuple[str, str]]


class Origin(NamedTuple):
    """Where a value is written: in what (a class, or a name at the top of a file), and the expression."""

    owner: str
    module: str
    line: int
    node: ast.expr | None
    deeper: dict[str, Origin]
    """What `but` says of fields further down, by dotted path."""

    @property
    def place(self) -> str:
        """`recipes/lvdm.py:114`."""
        return f"{_source(self.module).file}:{self.line}" if self.line else self.module


@functools.cache
def _source(module: str) -> Source:
    file = Path(getattr(sys.modules.get(module), "__file__", None) or module)
    try:
        tree_ = ast.parse(file.read_text())
    except (OSError, SyntaxError, ValueError):
        return Source(module, {}, {}, {})
    values, imports = dict[str, ast.expr](), dict[str, tuple[str, str]]()
    for node in tree_.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            values[node.targets[0].id] = node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
            values[node.target.id] = node.value
        elif isinstance(node, ast.ImportFrom) and node.module:
            imports |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
    classes = {node.name: node for node in ast.walk(tree_) if isinstance(node, ast.ClassDef)}
    shown = os.path.relpath(file) if file.is_relative_to(Path.cwd()) else str(file)
    return Source(shown, classes, values, imports)


def origins(recipe: Recipe) -> dict[str, Origin]:
    """By dotted path, the place that gave each field of a registered recipe its value."""
    found: dict[str, Origin] = {}
    for name in field_types(type(recipe)):
        _walk(name, getattr(recipe, name), _default(type(recipe), name), found)
    return found


def _walk(path: str, value: Any, origin: Origin, found: dict[str, Origin]) -> None:
    found[path] = origin
    if isinstance(value, Slot):
        for name in field_types(type(value)):
            _walk(f"{path}.{name}", getattr(value, name), _field(origin, type(value), name), found)
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            if isinstance(item, Slot):
                _walk(f"{path}.{i}", item, _item(origin, i), found)


def _default(cls: type, name: str) -> Origin:
    """The nearest class that declares a field, and what it says there."""
    owner = next(c for c in cls.__mro__ if name in inspect.get_annotations(c))
    body = _source(owner.__module__).classes.get(owner.__name__)
    for node in body.body if body else ():
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == name:
            return Origin(owner.__name__, owner.__module__, node.lineno, node.value, {})
    return Origin(owner.__name__, owner.__module__, 0, None, {})


def _at(origin: Origin, node: ast.expr) -> Origin:
    return origin._replace(line=node.lineno, node=node, deeper={})


def _field(origin: Origin, cls: type[Slot], name: str) -> Origin:
    """Where a field of the slot, of class `cls`, is set that `origin` makes."""
    if name in origin.deeper:
        return origin.deeper[name]
    below = {p.removeprefix(f"{name}."): o for p, o in origin.deeper.items() if p.startswith(f"{name}.")}
    if below:
        inner = _field(origin._replace(deeper={}), cls, name)
        return inner._replace(deeper=inner.deeper | below)
    origin = _followed(origin._replace(deeper={}))
    node = origin.node
    if origin.deeper:
        return _field(origin, cls, name)
    if not isinstance(node, ast.Call):
        return origin._replace(node=None)
    given = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
    if name in given:
        return _at(origin, given[name])
    if isinstance(node.func, ast.Attribute) and node.func.attr == "but":
        deep = {path: _at(origin, value) for path, value in _dotted(node)}
        return _field(_at(origin, node.func.value)._replace(deeper=deep), cls, name)
    made_here = isinstance(node.func, ast.Name) and node.func.id == cls.__name__
    return _default(cls, name) if made_here else origin._replace(node=None)


def _dotted(call: ast.Call) -> Iterator[tuple[str, ast.expr]]:
    """What `but(**{"a.b": value})` says."""
    for keyword in call.keywords:
        if keyword.arg is None and isinstance(keyword.value, ast.Dict):
            for key, value in zip(keyword.value.keys, keyword.value.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(key.value, str):
                    yield key.value, value


def _item(origin: Origin, i: int) -> Origin:
    """Where an item of a tuple is set."""
    below = {p.removeprefix(f"{i}."): o for p, o in origin.deeper.items() if p.startswith(f"{i}.")}
    whole = _followed(origin._replace(deeper={}))
    known = isinstance(whole.node, ast.Tuple) and not any(isinstance(e, ast.Starred) for e in whole.node.elts)
    item = _at(whole, whole.node.elts[i]) if known else whole._replace(node=None)  # type: ignore[union-attr]
    return item._replace(deeper=below)


def _followed(origin: Origin) -> Origin:
    """Through names and attributes to the expression that they stand for."""
    node = origin.node
    if isinstance(node, ast.Name):
        source = _source(origin.module)
        if node.id in source.values:
            value = source.values[node.id]
            return _followed(Origin(node.id, origin.module, value.lineno, value, {}))
        if node.id in source.imports:
            module, name = source.imports[node.id]
            return _followed(Origin(name, module, node.lineno, ast.Name(name, lineno=node.lineno), {}))
    if isinstance(node, ast.Attribute):
        cls = _class(origin.module, node.value)
        if cls is not None and node.attr in field_types(cls):
            return _followed(_default(cls, node.attr))
    return origin


def _class(module: str, node: ast.expr) -> type[Slot] | None:
    """The slot class that a name in a module stands for."""
    value = getattr(sys.modules.get(module), node.id, None) if isinstance(node, ast.Name) else None
    return value if isinstance(value, type) and issubclass(value, Slot) else None


# --------------------------------------------------------------------------------------------------------------- output


def print_origins(recipe: Recipe, as_json: bool = False) -> None:
    """Print every field with its value and where that is set; what differs from the registered recipe was typed."""
    default: Any = RECIPES[recipe.name]
    registered = default()
    known, before, now = origins(registered), flatten(registered), flatten(recipe)
    where = {
        path: (known[path].owner, known[path].place) if path in known and before.get(path) == value else (TYPED, "")
        for path, value in now.items()
    }
    if as_json:
        rows = [
            {"field": p, "value": to_json(now[p]), "owner": where[p][0], "place": where[p][1]} for p, _ in tree(recipe)
        ]
        print(json.dumps(rows, indent=2))
    else:
        emit(_lines(recipe, where))


def _lines(recipe: Recipe, where: dict[str, tuple[str, str]]) -> Iterator[Line]:
    leaves = tree(recipe)
    for (path, _), line in zip(
        leaves, columns((label(path), _short(value), *where[path]) for path, value in leaves), strict=True
    ):
        yield line, "" if "." in path else "bold"


def _short(value: str) -> str:
    """Long values are shown whole by `show`; here the place counts."""
    return value if len(value) <= 40 else f"{value[:39]}…"

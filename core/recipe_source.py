"""A recipe as Python: the child class of a registered recipe that says what is different, and nothing else.

The text is laid out as ruff would (120 columns), and every name in it is imported from where recipes take it.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import textwrap
from collections.abc import Iterable
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from core.errors import UserError
from core.slots.recipe import RECIPES, Recipe
from core.slots.slot import Slot, field_types, flatten

WIDTH = 120
PUBLIC = ("core.slots", "data.slots")
"""Modules that recipes take slot classes from, where these have them; other classes come from their own module."""
OURS = ("core", "data", "recipes", "registry")


class Group(NamedTuple):
    """A call, a tuple or a dict: what opens and closes it, and its items, each with what stands before it."""

    opens: str
    items: list[tuple[str, Code]]
    closes: str


Code = str | Group
Names = dict[str, set[str]]
"""What is imported, by module."""


def child_source(parent: type[Recipe], recipe: Recipe, name: str, more: str = "") -> str:
    """A module with one recipe called `name`: `parent` with the fields of `recipe`. `more` is said in its docstring.

    Raises UserError for a name that no recipe can have, and for a parent that cannot be imported.
    """
    refuse_name(name)
    if "<locals>" in parent.__qualname__ or parent.__module__ == "__main__":
        raise UserError(f"{parent.name} is no class that can be imported, so it has no children in other files")
    names: Names = {"core.slots": {"register"}, parent.__module__: {parent.__qualname__.partition(".")[0]}}
    default: Any = parent
    base = default()
    lines, changed = [], []
    for field, hint in field_types(Recipe).items():
        old, new = getattr(base, field), getattr(recipe, field)
        if old == new:
            continue
        differ = _changes(old, new)
        changed += [field] if differ is None else [f"{field}.{path}" for path in differ]
        begin = f"    {field}: {_import(hint, names)} = "
        inherited = f"{parent.__qualname__}.{field}" if hasattr(parent, field) else None
        code = _written(new, names) if differ is None or inherited is None else _but(inherited, differ, names)
        lines.append(begin + _lay(code, 4, len(begin), 0))
    about = f"{parent.name} with {'other ' + ', '.join(changed) if changed else 'nothing changed'}."
    parts = [
        f'"""A variant of {parent.name}."""',
        _imports(names),
        f'\n@register("{name}")\nclass {_class_name(name)}({parent.__qualname__}):\n{_docstring(about, more)}',
    ]
    return "\n\n".join([*parts, *(["\n".join(lines)] if lines else [])]) + "\n"


def refuse_name(name: str) -> None:
    """Raise UserError for a name that no new recipe can have."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name):
        raise UserError(f"{name!r} is no name of a recipe: lower-case letters, digits, dots and dashes only")
    if name in RECIPES:
        raise UserError(f"a recipe is called {name!r} already: take another name")


def _class_name(name: str) -> str:
    words = "".join(word.capitalize() for word in re.split(r"[.-]+", name) if word)
    words = words if words[0].isalpha() else f"Recipe{words}"
    while words in Slot.by_name:
        words += "Recipe"
    return words


def _docstring(about: str, more: str) -> str:
    paragraphs = [about, *([more] if more else [])]
    filled = [textwrap.fill(p, WIDTH - 8, break_long_words=False, break_on_hyphens=False) for p in paragraphs]
    text = "\n\n".join(filled)
    several = "\n" in text
    return textwrap.indent(f'"""{text}\n"""' if several else f'"""{text}"""', "    ")


# --------------------------------------------------------------------------------------------------------- what differs


def _changes(old: Any, new: Any) -> dict[str, Any] | None:
    """Fields by dotted path that differ between two slots of one class; None where another class stands."""
    if type(old) is not type(new) or not isinstance(old, Slot):
        return None
    found: dict[str, Any] = {}
    for name in field_types(type(old)):
        a, b = getattr(old, name), getattr(new, name)
        if a != b:
            found |= _below(name, a, b)
    return found


def _below(name: str, a: Any, b: Any) -> dict[str, Any]:
    """What differs between two values of a field, as deep down as can be said."""
    if _alike(a, b) and a:
        items = [(f"{name}.{i}", *pair) for i, pair in enumerate(zip(a, b, strict=True))]
    else:
        items = [(name, a, b)]
    found: dict[str, Any] = {}
    for path, one, other in items:
        inner = _changes(one, other)
        if inner is None:
            return {name: b}
        found |= {f"{path}.{k}": v for k, v in inner.items()}
    return found


def _alike(a: Any, b: Any) -> bool:
    """Whether both are tuples of as many slots of the same classes."""
    both = isinstance(a, tuple) and isinstance(b, tuple)
    return both and list(map(type, a)) == list(map(type, b)) and all(isinstance(item, Slot) for item in a)


# ----------------------------------------------------------------------------------------------------------------- code


def _but(inherited: str, changes: dict[str, Any], names: Names) -> Code:
    items: list[tuple[str, Code]] = [(f"{k}=", _written(v, names)) for k, v in changes.items() if "." not in k]
    if deep := [(f'"{path}": ', _written(v, names)) for path, v in changes.items() if "." in path]:
        items.append(("**", Group("{", deep, "}")))
    return Group(f"{inherited}.but(", items, ")")


def _written(value: Any, names: Names) -> Code:
    """A value as code; a slot as the call that makes it, without the fields that are as by default."""
    if isinstance(value, Slot):
        defaults = {field.name: field.default for field in dataclasses.fields(value)}  # type: ignore[arg-type]
        given = [name for name in field_types(type(value)) if not _same(defaults[name], getattr(value, name))]
        items = [(f"{name}=", _written(getattr(value, name), names)) for name in given]
        return Group(f"{_import(type(value), names)}(", items, ")")
    if isinstance(value, tuple):
        return Group("(", [("", _written(item, names)) for item in value], ")")
    if isinstance(value, Path):
        names.setdefault("pathlib", set()).add("Path")
        return f"Path({'' if value == Path() else _text(value.as_posix())})"
    if isinstance(value, float):
        return _number(value)
    return _text(value) if isinstance(value, str) else repr(value)


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b) and flatten(a) == flatten(b)


def _number(value: float) -> str:
    """`1e-4` rather than `0.0001`, and without the zeros of `1e-05`."""
    code = re.sub(r"e([-+])0*", lambda e: "e" + e[1].strip("+"), repr(value))
    small = f"{Decimal(repr(value)).normalize():e}" if 0 < abs(value) < 1e-2 else code
    return min(code, small, key=len)


def _text(value: str) -> str:
    """In double quotes, but where that needs more backslashes."""
    code = repr(value)
    body = code[1:-1]
    if code[0] == '"' or body.count('"') > body.count("\\'"):
        return code
    return '"' + body.replace("\\'", "'").replace('"', '\\"') + '"'


def _import(cls: type, names: Names) -> str:
    """The name of a class in the text; it is noted where it is imported from."""
    homes = [home for home in PUBLIC if getattr(sys.modules.get(home), cls.__qualname__, None) is cls]
    names.setdefault((homes or [cls.__module__])[0], set()).add(cls.__qualname__.partition(".")[0])
    return cls.__qualname__


def _imports(names: Names) -> str:
    """The lines that import: the standard library, other packages, this project."""
    blocks: dict[int, list[str]] = {}
    for module in sorted(names):
        top = module.partition(".")[0]
        block = 0 if top in sys.stdlib_module_names else 2 if top in OURS else 1
        blocks.setdefault(block, []).append(_import_line(module, names[module]))
    return "\n\n".join("\n".join(lines) for _, lines in sorted(blocks.items()))


def _import_line(module: str, wanted: Iterable[str]) -> str:
    """One import; constants first, then classes, then functions."""
    kind = {name: 0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2 for name in wanted}
    ordered = sorted(kind, key=lambda name: (kind[name], name.lower(), name))
    line = f"from {module} import {', '.join(ordered)}"
    if len(line) <= WIDTH:
        return line
    return f"from {module} import (\n" + "".join(f"    {name},\n" for name in ordered) + ")"


# --------------------------------------------------------------------------------------------------------------- layout


def _flat(code: Code) -> str:
    if isinstance(code, str):
        return code
    return code.opens + _inside(code) + code.closes


def _inside(group: Group) -> str:
    inside = ", ".join(before + _flat(item) for before, item in group.items)
    return inside + "," * (group.opens == "(" and len(group.items) == 1)


def _lay(code: Code, indent: int, used: int, after: int) -> str:
    """Code on one line where that fits, `used` columns being taken before it and `after` behind it; else a call with
    its arguments on a line of their own, or with each item on one.
    """
    line = _flat(code)
    if isinstance(code, str) or used + len(line) + after <= WIDTH or not code.items:
        return line
    deep = indent + 4
    if code.opens[:-1] and deep + len(_inside(code)) <= WIDTH:
        return f"{code.opens}\n{' ' * deep}{_inside(code)}\n{' ' * indent}{code.closes}"
    comma = "" if [before for before, _ in code.items] == ["**"] else ","
    rows = [f"{' ' * deep}{before}{_lay(item, deep, deep + len(before), 1)}{comma}\n" for before, item in code.items]
    return f"{code.opens}\n{''.join(rows)}{' ' * indent}{code.closes}"

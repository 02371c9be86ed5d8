"""Slot trees by dotted path, and how a slot gets another class: what command line, recipe files and `diff` share.

Nothing is checked while a tree is half changed (`--optim=AdamW8bit --optim.betas 0.9 0.95` may pass through a state
that no one asked for); `rebuilt` runs every check at the end.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import types
from collections.abc import Sequence
from typing import Any, NamedTuple, Union, get_args, get_origin

from core.errors import UserError, did_you_mean
from core.slots.slot import Slot, field_types, fit, named_like, subclass_names


class Spot(NamedTuple):
    """A field of a slot tree: its type and its present value."""

    hint: Any
    value: Any


def spots(*slots: Slot) -> dict[str, Spot]:
    """Every field by dotted path, slots before what is in them; items of a tuple of slots are `path.0`, `path.1`, …"""
    found: dict[str, Spot] = {}
    for slot in slots:
        _walk(slot, "", found)
    return found


def _walk(slot: Slot, prefix: str, found: dict[str, Spot]) -> None:
    for name, hint in field_types(type(slot)).items():
        value = getattr(slot, name)
        found[prefix + name] = Spot(hint, value)
        if isinstance(value, Slot):
            _walk(value, f"{prefix}{name}.", found)
        elif isinstance(value, tuple):
            for i, item in enumerate(value):
                if isinstance(item, Slot):
                    _walk(item, f"{prefix}{name}.{i}.", found)


def options(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


@functools.cache
def slot_kinds(hint: Any) -> tuple[type[Slot], ...]:
    """The slot classes that a type asks for: `EMA | None` → (EMA,). Empty for plain fields."""
    return tuple(o for o in options(hint) if isinstance(o, type) and issubclass(o, Slot))


@functools.cache
def item_kinds(hint: Any) -> tuple[type[Slot], ...]:
    """The slot classes that the items of a tuple type ask for: `tuple[Condition, ...]` → (Condition,)."""
    items = [item for o in options(hint) if get_origin(o) is tuple for item in get_args(o)[:1]]
    return tuple(kind for item in items for kind in slot_kinds(item))


def allowed_classes(hint: Any) -> list[str]:
    """Names of the classes that may stand in a field of this type, `None` last. Empty for plain fields."""
    kinds = slot_kinds(hint) or item_kinds(hint)
    names = [
        name for kind in kinds for name in subclass_names(kind) if Slot.by_name[name] is not kind or field_types(kind)
    ]
    return names + ["None"] * (bool(kinds) and (type(None) in options(hint) or bool(item_kinds(hint))))


def class_names(value: Any) -> str:
    """The class of a slot as a flag says it: `AdamW`, `None`, for a tuple of slots `Text,FirstFrame`."""
    names = [type(v).__name__ for v in (value if isinstance(value, tuple) else (value,)) if v is not None]
    return ",".join(names) or "None"


def rebuilt(slot: Any) -> Any:
    """The same slot through its constructor, part by part, so that every check has run."""
    if isinstance(slot, tuple):
        return tuple(map(rebuilt, slot))
    if not isinstance(slot, Slot):
        return slot
    made = type(slot)(**{name: rebuilt(getattr(slot, name)) for name in field_types(type(slot))})
    return named_like(slot, made)


# -------------------------------------------------------------------------------------------------- class swaps


def swapped(slot: Slot, path: str, values: Sequence[str], typed: str) -> Slot:
    """`slot` with other classes at `path`: `["AdamW"]`, `["None"]`, for a tuple of slots also `["A,B"]`.

    Fields of the same name are kept. Nothing is checked here; a required field without a value is tyro.MISSING.
    """
    hint, old = spots(slot)[path]
    names = [name for value in values for name in value.split(",")] or [""]
    if item_kinds(hint):
        olds = (*(old if isinstance(old, tuple) else ()), *[None] * len(names))
        classes = [] if names in (["None"], ["()"]) else [_class_named(name, hint, typed) for name in names]
        new: Any = tuple(_fresh(cls, old) for cls, old in zip(classes, olds, strict=False))
    elif len(names) > 1:
        raise UserError(f"{typed} takes one class, got {', '.join(names)}")
    else:
        cls = _class_named(names[0], hint, typed)
        new = None if cls is None else _fresh(cls, old)
    return _replaced(slot, path.split("."), new)


def _class_named(name: str, hint: Any, typed: str) -> type[Slot] | None:
    allowed = allowed_classes(hint)
    if name not in allowed:
        wrong = f"{name!r} is no class for it" if name else "needs a class"
        raise UserError(f"{typed}: {wrong}{did_you_mean(name, allowed)}; allowed here: {', '.join(allowed)}")
    return None if name == "None" else Slot.by_name[name]


def _fresh(cls: type[Slot] | None, old: Any) -> Any:
    """An unchecked instance of `cls`: the old slot's values where name and type agree, else the defaults."""
    if cls is None or type(old) is cls:
        return old
    slot = object.__new__(cls)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        object.__setattr__(slot, field.name, _kept(field, field_types(cls)[field.name], old))
    return slot


def _kept(field: dataclasses.Field[Any], hint: Any, old: Any) -> Any:
    if isinstance(old, Slot) and field.name in field_types(type(old)):
        with contextlib.suppress(ValueError):
            return fit(hint, getattr(old, field.name))
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    import tyro

    return tyro.MISSING


def _replaced(slot: Any, path: list[str], new: Any) -> Any:
    if not path:
        return new
    if isinstance(slot, tuple):
        i = int(path[0])
        return (*slot[:i], _replaced(slot[i], path[1:], new), *slot[i + 1 :])
    made = copy.copy(slot)
    object.__setattr__(made, path[0], _replaced(getattr(slot, path[0]), path[1:], new))
    return made

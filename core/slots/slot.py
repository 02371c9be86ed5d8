"""The one pattern behind every recipe: a frozen, typed dataclass that checks itself, varies by `but`, and goes to JSON
and back.

A recipe is a composition of slots. Plain dataclasses would let several mistakes pass silently, so the base closes them:
an override without its annotation, an attribute that is no field, a string where a number belongs, a list as a default.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import types
import typing
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, Union, dataclass_transform, get_args, get_origin

from core.errors import UserError, did_you_mean


class SlotError(UserError, ValueError):
    """A slot was given something that does not fit; the message names class, field, value and what is allowed."""


@dataclass_transform(frozen_default=True, kw_only_default=True)
class Slot:
    """Base of every part of a recipe. Subclasses become frozen keyword-only dataclasses by themselves.

    A subclass may define `check(self)` and raise `SlotError` through `self.refuse(field, why)`.
    """

    by_name: ClassVar[dict[str, type[Slot]]] = {}
    since: ClassVar[dict[str, Any]] = {}
    """Fields that came later, with the value that a recipe.json without them means: runs of before go on. Only a field
    whose value leaves everything as it was can be one."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _refuse_silent_overrides(cls)
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        known = Slot.by_name.setdefault(cls.__name__, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(
                f"two slot classes are called {cls.__name__}: {known.__module__} and {cls.__module__}; rename one"
            )
        Slot.by_name[cls.__name__] = cls

    def __post_init__(self) -> None:
        hints = field_types(type(self))
        for name, hint in hints.items():
            value = getattr(self, name)
            try:
                fitted = fit(hint, value)
            except ValueError as error:
                raise SlotError(f"{type(self).__name__}.{name} = {value!r}: expected {error}") from None
            if fitted is not value:
                object.__setattr__(self, name, fitted)
        try:
            self.check()
        except ArithmeticError as error:  # a zero that a check divides by
            raise SlotError(f"{type(self).__name__}: {error}; one of its numbers must not be 0") from None

    def check(self) -> None:
        """What the types cannot say. Raises `SlotError`."""

    def refuse(self, field: str, why: str) -> typing.NoReturn:
        """Raise the error that names this class, the field, its value and `why`."""
        raise SlotError(f"{type(self).__name__}.{field} = {getattr(self, field)!r}: {why}")

    def but(self, **changes: Any) -> Self:
        """This slot with some fields changed, also deeper ones: `but(lr=1.0)`, `but(**{"objective.loss": "mse"})`.

        An unknown field is an error that names the nearest one.
        """
        whole, deep = {}, dict[str, dict[str, Any]]()
        for path, value in changes.items():
            name, _, rest = path.partition(".")
            if name not in field_types(type(self)):
                raise unknown_field(type(self), name)
            if rest:
                deep.setdefault(name, {})[rest] = value
            else:
                whole[name] = value
        for name, inner in deep.items():
            whole[name] = _changed(whole.get(name, getattr(self, name)), inner, f"{type(self).__name__}.{name}")
        made = dataclasses.replace(self, **whole)  # type: ignore[type-var]  # every Slot is a dataclass
        return named_like(self, made)


def _changed(value: Any, changes: dict[str, Any], where: str) -> Any:
    """A slot, or a tuple of slots whose items have numbers, with changes by dotted path."""
    if isinstance(value, Slot):
        return value.but(**changes)
    if not isinstance(value, tuple) or not all(isinstance(item, Slot) for item in value):
        raise SlotError(f"{where} = {value!r} holds no slot, so it has no field {next(iter(changes))!r}")
    items: dict[int, dict[str, Any]] = {}
    for path, new in changes.items():
        number, _, rest = path.partition(".")
        if not number.isdecimal() or int(number) >= len(value) or not rest:
            raise SlotError(f"{where} has {len(value)} parts: {path!r} is no field of one, as '0.name' is")
        items.setdefault(int(number), {})[rest] = new
    return tuple(item.but(**items.get(i, {})) for i, item in enumerate(value))


S = typing.TypeVar("S", bound=Slot)


def named_like(old: Slot, new: S) -> S:
    """`new`, with the name of `old` where that has one of its own: a recipe read from a file that is no longer
    registered.
    """
    if "name" in vars(old) and "name" not in field_types(type(old)):
        object.__setattr__(new, "name", vars(old)["name"])
    return new


def unknown_field(cls: type[Slot], name: str) -> SlotError:
    """The error for a field that `cls` does not have."""
    fields = field_types(cls)
    return SlotError(f"{cls.__name__} has no field {name!r}{did_you_mean(name, fields)}; it has {', '.join(fields)}")


def _refuse_silent_overrides(cls: type) -> None:
    """A class attribute without an annotation is no dataclass field: the override would be ignored without a word."""
    inherited = {name for base in cls.__mro__[1:] for name in getattr(base, "__dataclass_fields__", {})}
    annotated = inspect.get_annotations(cls)
    for name, value in list(vars(cls).items()):
        if name.startswith("_") or name in annotated or inspect.isroutine(value):
            continue
        if isinstance(value, (property, functools.cached_property)) and name not in inherited:
            continue
        hint = did_you_mean(name, inherited) if name not in inherited else ""
        raise TypeError(
            f"{cls.__name__}.{name} has no type annotation, so it would be ignored: write `{name}: <type> = ...`{hint}"
        )


_FIELD_TYPES: dict[type, dict[str, Any]] = {}


def field_types(cls: type[Slot]) -> dict[str, Any]:
    """Field name → type, in order, with string annotations resolved. Kept a class: resolving takes longer than all the
    rest.
    """
    if cls not in _FIELD_TYPES:
        hints = typing.get_type_hints(cls)
        _FIELD_TYPES[cls] = {field.name: hints[field.name] for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    return _FIELD_TYPES[cls]


# ---------------------------------------------------------------------------------------------- values against types


def describe_type(hint: Any) -> str:
    """A type as a person would say it: `a number`, `one of 'l1', 'mse'`, `a Denoiser`."""
    plain = {
        bool: "True or False",
        int: "a whole number",
        float: "a number",
        str: "a text",
        Path: "a path",
        type(None): "None",
    }
    if hint in plain:
        return plain[hint]
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(repr(a) for a in args)
    if origin in (Union, types.UnionType):
        return " or ".join(describe_type(a) for a in args)
    if origin is tuple:
        return "a tuple of " + (
            f"{describe_type(args[0])} each" if args[-1] is ... else ", ".join(map(describe_type, args))
        )
    return f"a {hint.__name__} ({', '.join(subclass_names(hint))})" if _is_slot(hint) else str(hint)


def _is_slot(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Slot)


def subclass_names(kind: type[Slot]) -> list[str]:
    """Names of the slot classes that may stand where `kind` is asked for (an empty kind itself is not one)."""
    found = [name for name, cls in Slot.by_name.items() if issubclass(cls, kind)]
    return [name for name in found if Slot.by_name[name] is not kind] or found


def fit(hint: Any, value: Any) -> Any:
    """`value` as the type asks for it (int → float, str → Path), or a ValueError that says what was expected."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _fit_union(args, value, hint)
    if origin is tuple:
        return _fit_tuple(args, value, hint)
    if origin is Literal:
        if any(value == a and type(value) is type(a) for a in args):
            return value
        raise ValueError(
            describe_type(hint) + (did_you_mean(value, [str(a) for a in args]) if isinstance(value, str) else "")
        )
    return _fit_plain(hint, value)


def _fit_plain(hint: Any, value: Any) -> Any:
    if hint is float and type(value) in (int, float):
        if not math.isfinite(value):
            raise ValueError("a finite number")
        return value if type(value) is float else float(value)
    if hint is Path and isinstance(value, (str, Path)):
        return Path(value)
    if hint in (int, bool, str) and type(value) is hint:
        return value
    if (_is_slot(hint) and isinstance(value, hint)) or (hint is type(None) and value is None):
        return value
    raise ValueError(describe_type(hint))


def _fit_union(options: tuple[Any, ...], value: Any, hint: Any) -> Any:
    for option in sorted(options, key=lambda o: o is float):  # an int stays an int where both are allowed
        try:
            return fit(option, value)
        except ValueError:
            continue
    raise ValueError(describe_type(hint))


def _fit_tuple(args: tuple[Any, ...], value: Any, hint: Any) -> tuple[Any, ...]:
    if not isinstance(value, tuple):
        raise ValueError(describe_type(hint) + (", not a list" if isinstance(value, list) else ""))
    hints = [args[0]] * len(value) if args[-1] is ... else list(args)
    if len(hints) != len(value):
        raise ValueError(describe_type(hint))
    fitted = tuple(fit(h, v) for h, v in zip(hints, value, strict=True))
    return value if all(a is b for a, b in zip(fitted, value, strict=True)) else fitted


# ------------------------------------------------------------------------------------------------------------- JSON


def to_json(value: Any) -> Any:
    """A slot as plain JSON: `{"is": "AdamW", "lr": 6e-05, …}`; tuples are lists, paths are texts. Exact both ways."""
    if isinstance(value, Slot):
        return {"is": type(value).__name__} | {name: to_json(getattr(value, name)) for name in field_types(type(value))}
    if isinstance(value, tuple):
        return [to_json(v) for v in value]
    return value.as_posix() if isinstance(value, Path) else value


def from_json(hint: Any, value: Any, where: str) -> Any:
    """The inverse of `to_json` for a value of type `hint`; `where` names the place in error messages.

    Raises SlotError for an unknown class, unknown or missing fields (each by name) and values of a wrong type. Classes
    are looked up among those already defined: nothing named in a file is imported or run.
    """
    if isinstance(value, dict) and "is" in value:
        return _slot_from_json(hint, value, where)
    if isinstance(value, list):
        return _tuple_from_json(hint, value, where)
    try:
        return fit(hint, value)
    except ValueError as error:
        raise SlotError(f"{where} = {value!r}: expected {error}") from None


def _slot_from_json(hint: Any, value: dict[str, Any], where: str) -> Slot:
    kinds = [h for h in (get_args(hint) or (hint,)) if _is_slot(h)]
    cls = Slot.by_name.get(str(value["is"]))
    if cls is None or not any(issubclass(cls, kind) for kind in kinds):
        allowed = [name for kind in kinds for name in subclass_names(kind)]
        raise SlotError(
            f"{where}: no slot class {value['is']!r} here{did_you_mean(str(value['is']), allowed)}; "
            f"known are {', '.join(allowed)}"
        )
    hints = field_types(cls)
    given = cls.since | {name: v for name, v in value.items() if name != "is"}
    unknown, missing = sorted(given.keys() - hints.keys()), sorted(hints.keys() - given.keys())
    if unknown or missing:
        parts = [
            f"{word} {', '.join(names)}"
            for word, names in (("unknown field", unknown), ("missing field", missing))
            if names
        ]
        raise SlotError(f"{where} ({cls.__name__}): {'; '.join(parts)}")
    return cls(**{name: from_json(hints[name], v, f"{where}.{name}") for name, v in given.items()})


def _tuple_from_json(hint: Any, value: list[Any], where: str) -> tuple[Any, ...]:
    for option in get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,):
        args = get_args(option)
        if get_origin(option) is tuple and (args[-1] is ... or len(args) == len(value)):
            hints = [args[0]] * len(value) if args[-1] is ... else args
            return tuple(from_json(h, v, f"{where}[{i}]") for i, (h, v) in enumerate(zip(hints, value, strict=True)))
    raise SlotError(f"{where} = {value!r}: expected {describe_type(hint)}")


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of a slot by dotted path; the class of every nested slot stands under its own path: `{"optim": "AdamW",
    "optim.lr": 6e-05}`.
    """
    if isinstance(value, tuple) and any(isinstance(v, Slot) for v in value):
        return {k: v for i, item in enumerate(value) for k, v in flatten(item, f"{prefix}.{i}").items()} | {
            prefix: f"{len(value)} part{'s' * (len(value) != 1)}"
        }
    if not isinstance(value, Slot):
        return {prefix: value}
    leaves = {prefix: type(value).__name__} if prefix else {}
    for name in field_types(type(value)):
        leaves |= flatten(getattr(value, name), f"{prefix}.{name}" if prefix else name)
    return leaves

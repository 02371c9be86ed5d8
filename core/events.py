"""What a line of a journal must hold to be an event. A journal may come from anywhere, and MLflow is told what it says:
so numbers are numbers, and a file that it names lies in the run's own folder.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any

Check = Callable[[Any], bool]
UID = re.compile(r"[\w.-]{1,100}")
"""It stands in a search of MLflow's."""
NON_FINITE = {"NaN", "Infinity", "-Infinity"}


def is_text(value: Any) -> bool:
    """A text that can be encoded."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def is_count(value: Any) -> bool:
    """A whole number that MLflow's 64 bits hold."""
    return type(value) is int and 0 <= value < 2**63


def is_value(value: Any) -> bool:
    """A number, or one of the texts that stand for those which JSON has not."""
    return (
        type(value) is float or (type(value) is int and abs(value) < 2**63) or (is_text(value) and value in NON_FINITE)
    )


def is_inner(value: Any) -> bool:
    """A path within the run's folder."""
    return (
        is_text(value) and "\0" not in value and not PurePosixPath(value).is_absolute() and ".." not in value.split("/")
    )


def are_values(value: Any) -> bool:
    """Numbers by name."""
    return isinstance(value, dict) and all(is_text(k) and is_value(v) for k, v in value.items())


def are_texts(value: Any) -> bool:
    """Texts, or what becomes one, by name."""
    return isinstance(value, dict) and all(
        is_text(k) and (is_text(v) or v is None or is_value(v)) for k, v in value.items()
    )


def are_sets(value: Any) -> bool:
    """Data sets as MLflow describes them."""
    return isinstance(value, list) and all(
        isinstance(each, dict)
        and all(is_text(each.get(k)) for k in ("name", "digest", "context"))
        and {"source", "profile"} <= each.keys()
        for each in value
    )


def are_points(value: Any) -> bool:
    """Metrics of a checkpoint, each with the data set that it is of."""
    return isinstance(value, list) and all(_is_point(each) for each in value)


def _is_point(each: Any) -> bool:
    return (
        isinstance(each, dict)
        and is_text(each.get("name"))
        and is_value(each.get("value"))
        and is_count(each.get("step"))
        and is_count(each.get("time"))
        and isinstance(each.get("dataset"), list)
        and len(each["dataset"]) == 2
        and all(map(is_text, each["dataset"]))
    )


KINDS: dict[str, dict[str, Check]] = {
    "run": {"uid": lambda v: is_text(v) and bool(UID.fullmatch(v)), "name": is_text, "experiment": is_text},
    "state": {"status": is_text},
    "metrics": {"step": is_count, "values": are_values},
    "tags": {"values": are_texts},
    "params": {"values": are_texts},
    "data": {"sets": are_sets},
    "artifact": {"path": is_inner, "folder": lambda v: v is None or is_inner(v)},
    "picture": {"path": is_inner, "key": is_text, "step": is_count},
    "hub": {"status": is_text, "repo": is_text, "what": is_text},
    "checkpoint": {
        "path": is_inner,
        "step": is_count,
        "name": is_text,
        "output_dir": is_text,
        "recipe_hash": is_text,
        "files": lambda v: True,
        "metrics": are_points,
    },
}
"""What each kind must hold; a kind of a newer version is not ours to judge."""


def is_event(value: Any) -> bool:
    """Whether this is an event, as a run writes them."""
    if not isinstance(value, dict) or not is_text(value.get("event")) or not is_count(value.get("time")):
        return False
    needed = KINDS.get(value["event"], {})
    return all(name in value and check(value[name]) for name, check in needed.items())

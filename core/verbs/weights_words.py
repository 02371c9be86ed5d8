"""The words of `weights`: what is to be done, to what, and the flags. A mistyped one is answered before torch is
imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from core.cli import parse
from core.errors import UserError, did_you_mean
from core.slots import Recipe
from core.verbs.flags import ExportFlags, ImportFlags, InfoFlags, PushFlags, VerbFlags

FLAGS: dict[str, type[VerbFlags]] = {
    "info": InfoFlags,
    "import": ImportFlags,
    "export": ExportFlags,
    "push": PushFlags,
}
KEYWORDS = {"--as": "--component", "--for": "--recipe"}
"""Flags of `import` that are Python's own words, so no names of fields."""


def read(words: list[str]) -> tuple[str, str, Any]:
    """What is to be done, to what, and the flags. Raises UserError."""
    what, where, *rest = words
    if what not in FLAGS:
        raise UserError(f"weights {what}: unknown{did_you_mean(what, FLAGS)}; info, import, export or push")
    (flags,) = parse([KEYWORDS.get(word, word) for word in rest] if what == "import" else rest, FLAGS[what]())
    return what, where, flags


def weights(words: list[str], get: Callable[[str], Recipe], recipes: Callable[[], Iterable[Recipe]]) -> int:
    """Do what the words say. `recipes` gives all there are."""
    what, where, flags = read(words)
    if what == "push":
        from core.verbs.push import push

        return push(where, **flags.arguments())
    from core.verbs.weights import export, print_import, print_info

    if what == "info":
        return print_info(where, recipes(), flags.json)
    return print_import(where, get, **flags.arguments()) if what == "import" else export(where, **flags.arguments())

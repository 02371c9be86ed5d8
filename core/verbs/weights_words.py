"""The words of `weights`: what is to be done, to what, and the flags. A mistyped one is answered before torch is
imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from core.cli import parse
from core.errors import UserError, did_you_mean
from core.slots import Recipe
from core.verbs.flags import ExportFlags, ImportFlags, VerbFlags

FLAGS: dict[str, type[VerbFlags]] = {"import": ImportFlags, "export": ExportFlags}
KEYWORDS = {"--as": "--component", "--for": "--recipe"}
"""Flags that are Python's own words, so no names of fields."""


def weights(words: list[str], get: Callable[[str], Recipe], recipes: Callable[[], Iterable[Recipe]]) -> int:
    """Do what the words say. `recipes` gives all there are."""
    what, where, *rest = words
    if what == "info":
        return _info(where, rest, recipes)
    if what not in FLAGS:
        raise UserError(f"weights {what}: unknown{did_you_mean(what, ['info', *FLAGS])}; info, import or export")
    (flags,) = parse([KEYWORDS.get(word, word) for word in rest] if what == "import" else rest, FLAGS[what]())
    from core.verbs.weights import export, print_import

    return print_import(where, get, **flags.arguments()) if what == "import" else export(where, **flags.arguments())


def _info(where: str, words: list[str], recipes: Callable[[], Iterable[Recipe]]) -> int:
    as_json = "--json" in words
    parse([word for word in words if word != "--json"], VerbFlags())
    from core.verbs.weights import print_info

    return print_info(where, recipes(), as_json)

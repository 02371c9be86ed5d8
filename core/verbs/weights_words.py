"""The words of `weights`: what is to be done, to what, and the flags. A mistyped one is answered before torch is
imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from core.cli import parse
from core.errors import UserError, did_you_mean
from core.slots import Recipe
from core.verbs.flags import ExportFlags, ImportFlags, InfoFlags, MergeFlags, PushFlags, VerbFlags

FLAGS: dict[str, type[VerbFlags]] = {
    "info": InfoFlags,
    "import": ImportFlags,
    "merge": MergeFlags,
    "export": ExportFlags,
    "push": PushFlags,
}
KEYWORDS = {"--as": "--component", "--for": "--recipe"}
"""Flags of `import` that are Python's own words, so no names of fields."""


def read(words: list[str]) -> tuple[str, list[str], Any]:
    """What is to be done, to what (a merge is of two), and the flags. Raises UserError."""
    what, *rest = words
    if what not in FLAGS:
        raise UserError(f"weights {what}: unknown{did_you_mean(what, FLAGS)}; {', '.join(FLAGS)} are known")
    count = 2 if what == "merge" else 1
    where, rest = rest[:count], rest[count:]
    if len(where) < count or any(word.startswith("-") for word in where):
        raise UserError("weights merge needs an adapter and a LoRA: weights merge ADAPTER LORA --to DIR")
    (flags,) = parse([KEYWORDS.get(word, word) for word in rest] if what == "import" else rest, FLAGS[what]())
    return what, where, flags


def weights(words: list[str], get: Callable[[str], Recipe], recipes: Callable[[], Iterable[Recipe]]) -> int:
    """Do what the words say. `recipes` gives all there are."""
    what, where, flags = read(words)
    if what == "merge":
        from core.verbs.motion import merge

        return merge(*where, **flags.arguments())
    (place,) = where
    if what == "push":
        from core.verbs.push import push

        return push(place, **flags.arguments())
    from core.verbs.weights import export, print_import, print_info

    if what == "info":
        return print_info(place, recipes(), flags.json)
    return print_import(place, get, **flags.arguments()) if what == "import" else export(place, **flags.arguments())

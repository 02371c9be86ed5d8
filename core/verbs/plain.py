"""Verbs that take flags and nothing before them: each is one function of its own file."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from core.cli import parse
from core.verbs.flags import DoctorFlags, UiFlags
from core.verbs.help import print_verb

DONE_BY: dict[str, tuple[Any, str]] = {"doctor": (DoctorFlags, "doctor"), "ui": (UiFlags, "serve")}
"""Flags, and the function of `core.verbs.<verb>`."""


def plain(verb: str, words: list[str]) -> int:
    """Do the verb, or print its help. Returns the exit code."""
    kind, function = DONE_BY[verb]
    if "--help" in words or "-h" in words:
        return print_verb([], verb, kind())
    (flags,) = parse(words, kind())
    done: int = getattr(import_module(f"core.verbs.{verb}"), function)(flags)
    return done

"""Output of the verbs that read: plain, aligned, untruncated; on a terminal coloured by rich (50 ms to import)."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Line = tuple[str, str]
"""A line of output and its rich style ("": none)."""


def show_value(value: Any) -> str:
    """A field's value as a person reads it; None for nothing, quotes only around an empty text."""
    if isinstance(value, tuple):
        return "(" + ", ".join(map(show_value, value)) + ("," if len(value) == 1 else "") + ")"
    if isinstance(value, str):
        return value or "''"
    return value.as_posix() if isinstance(value, Path) else repr(value)


def columns(rows: Iterable[Sequence[str]]) -> list[str]:
    """Rows of text as lines with aligned columns, two blanks apart."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def emit(lines: Iterable[Line]) -> None:
    """Print lines, in colour where stdout is a terminal."""
    if not sys.stdout.isatty():
        print("\n".join(text for text, _ in lines))
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True)
    for text, style in lines:
        console.print(Text(text, style), highlight=False)

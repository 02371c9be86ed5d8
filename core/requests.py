"""Which clips are wanted: prompts from the command line, a file or a terminal, how many of each, and their file names.

The noise of a clip depends on the seed, its prompt and its number among the clips of that prompt, on nothing else:
neither on what else is sampled nor on ranks and batches.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from core.errors import UserError

NAME_BYTES = 80
"""Length of a prompt in a file name; file systems take 255 bytes."""


class Request(NamedTuple):
    """One clip that is wanted."""

    number: int
    """Its place among all clips."""
    prompt: str
    copy: int
    """Its place among the clips of this prompt."""

    @property
    def id(self) -> str:
        """What its noise is drawn by."""
        return f"{self.copy} {self.prompt}"

    @property
    def name(self) -> str:
        """Its file name, without the ending."""
        return f"{slug(self.prompt)}-{self.number:03d}"


def wanted(prompts: Sequence[str], num: int, before: Sequence[Request] = ()) -> list[Request]:
    """`num` clips of each prompt, in order, counted on from those of `before`. A prompt that is given twice gets twice
    as many.
    """
    seen = Counter(request.prompt for request in before)
    made: list[Request] = []
    for prompt in prompts:
        for _ in range(num):
            made.append(Request(len(before) + len(made), prompt, seen[prompt]))
            seen[prompt] += 1
    return made


def slug(prompt: str) -> str:
    """A prompt as part of a file name: letters and digits of any script, the rest dashes; `clip` where none is left."""
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", prompt))
    cut = "-".join(words).encode()[:NAME_BYTES].decode(errors="ignore")
    return cut.strip("-") or "clip"


def prompts_in(file: Path, flag: str = "--prompts") -> list[str]:
    """The prompts of a text file, one a line; empty lines are none. Raises UserError for what is no such file."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise UserError(f"{flag} {file}: cannot be read as text ({why})") from None
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise UserError(f"{flag} {file}: there is no prompt in it; expected one a line")
    return found


def readable(text: str, where: str) -> str:
    """The text, if it is one. Raises UserError for bytes that are no UTF-8, which Python hands on in disguise."""
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise UserError(f"{where}: {text!r} is not UTF-8")
    return text


def typed() -> Iterator[str]:
    """Prompts as they are typed or piped in, one a line, up to the end of the input."""
    while True:
        if sys.stdin.isatty():
            print("prompt (Ctrl-D ends)> ", end="", file=sys.stderr, flush=True)
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError:
            raise UserError("--interactive: the input is not UTF-8") from None
        if not line:
            return
        if line.strip():
            yield readable(line.strip(), "--interactive")

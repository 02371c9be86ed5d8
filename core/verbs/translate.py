"""`translate`: a command line of the original systems in ours, flag by flag. What is printed is a shell script."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from core.cli import parse
from core.errors import UserError, printable
from core.slots import Launch, Recipe
from core.translate.program import Status
from core.translate.script import Piece, title
from core.translate.script import translate as translated
from core.translate.shell import LONGEST

WIDE = 100
QUOTE = """'"'"'"""
"""A quote within quotes, as shlex writes it."""


def translate(words: list[str], make: Callable[[str], Recipe]) -> int:
    """Print commands and what became of each flag. Exit code 1 when a flag is unknown or a command is refused."""
    pieces = translated(given(words), make)
    if not pieces:
        raise UserError("translate: there is no command in it")
    refused = 0
    for piece in pieces:
        print("\n".join(_comment(piece)))
        for words_of_ours in piece.new:
            if why := refusal(words_of_ours, make):
                refused += 1
                print(f"#   refused           {printable(why)}")
        print("\n".join([*map(_folded, piece.lines), ""]))
    counted = Counter(finding.status for piece in pieces for finding in piece.findings)
    order: tuple[Status, ...] = ("mapped", "implied", "no longer needed", "added", "unknown")
    commands = sum(len(piece.new) for piece in pieces)
    said = ", ".join(f"{counted[status]} {status}" for status in order)
    print(f"# {commands} command{'s' * (commands != 1)}; {said}{f', {refused} refused' if refused else ''}")
    return 1 if counted["unknown"] or refused else 0


def given(words: list[str]) -> str:
    """The text that is meant: a script file, or the command itself, in quotes or as words."""
    path = Path(words[0])
    if len(words) == 1 and len(words[0]) < 4096 and "\n" not in words[0] and path.exists():
        if path.is_dir():
            raise UserError(f"translate: {words[0]} is a folder; give a script or a command")
        try:
            with path.open("rb") as file:
                return file.read(LONGEST + 1).decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"translate: {words[0]} cannot be read as text ({error})") from None
    return words[0] if len(words) == 1 else shlex.join(words)


def refusal(words: list[str], make: Callable[[str], Recipe]) -> str:
    """Why a command of ours would not start, as far as its words say, or an empty string."""
    try:
        check(words, make)
    except UserError as error:
        return str(error)
    return ""


def check(words: list[str], make: Callable[[str], Recipe]) -> None:
    """Have the command line's own parser read a command. Raises UserError."""
    from core.verbs import data, weights_words
    from core.verbs.flags import EvalFlags, SampleFlags, UiFlags

    verb, *rest = words
    if verb == "run":
        recipe, launch = parse(rest[1:], make(rest[0]), Launch())
        recipe.parallel.mesh(launch.nproc)
    elif verb in ("sample", "eval"):
        sampler = make(rest[0]).validation.sampler
        parse(rest[1:], (SampleFlags() if verb == "sample" else EvalFlags()).but(sampler=sampler))
    elif verb == "weights":
        weights_words.read(rest)
    elif verb == "data":
        data.read(rest)
    else:
        parse(rest, UiFlags())


def _comment(piece: Piece) -> list[str]:
    """The old command and its flags, as comments of a shell script."""
    lines = [f"# {printable(title(piece))}"]
    wide = min(max((len(finding.old) for finding in piece.findings), default=0), 48)
    for status, old, new in piece.findings:
        lines.append(f"#   {status:<16}  {printable(old):<{wide}}  {printable(new)}".rstrip())
    return lines


def _folded(line: str) -> str:
    """A long command with a flag a line."""
    if len(line) <= WIDE or "\n" in line:
        return line
    words, lines, now = _shell_words(line), [], ""
    for word in words:
        if now and word.startswith("--") and len(now) + len(word) > 60:
            lines.append(now)
            now = word
        else:
            now = f"{now} {word}" if now else word
    return " \\\n    ".join([*lines, now])


def _shell_words(line: str) -> list[str]:
    """The words of a line of our own making, with their quotes."""
    found, quoted, now = [], False, ""
    for char in line.replace(QUOTE, "\0"):
        quoted ^= char == "'"
        if char == " " and not quoted:
            found.append(now)
            now = ""
        else:
            now += char
    return [word.replace("\0", QUOTE) for word in [*found, now]]

"""Reads shell as data: the commands of a script with their words, assignments and redirections. Nothing is executed.

Variables that the script itself sets are put in. What only a running shell could say, `$(date)` or a variable from
outside, stays as it is written and is listed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from core.errors import UserError

LONGEST = 2**17
"""Characters of a script, at most."""
OPERATORS = ("&>>", "2>&1", "2>>", "1>>", "&&", "||", "<<", ">>", "&>", "2>", "1>", ">&", ";;", ";", "|", "&", "<", ">")
OPENS = ("then", "do", "else", "{", "!", "time", "exec")
"""Words after which a command follows."""
CLOSES = ("fi", "done", "esac", "}")
CONTROL = ("if", "elif", "for", "while", "until", "case", "function", "select", "[[", "[")


@dataclass
class Command:
    """One simple command."""

    line: int
    """Number of its first line, from 1."""
    words: list[str] = field(default_factory=list)
    env: list[tuple[str, str]] = field(default_factory=list)
    """Assignments in front of it, or all that it is."""
    redirects: list[tuple[str, str]] = field(default_factory=list)
    """Operator and file, as in ('>', 'train.log')."""
    ends: str = ";"
    """What follows: ; & && || |"""
    open: list[str] = field(default_factory=list)
    """What only a running shell could have said."""


@dataclass
class Token:
    """A word or an operator."""

    kind: Literal["word", "operator"]
    text: str
    line: int
    open: list[str] = field(default_factory=list)
    plain: bool = True
    """No part of it was quoted."""


def commands(text: str) -> list[Command]:
    """The commands of a script, in its order. Raises UserError for what is no shell."""
    if len(text) > LONGEST:
        raise UserError(f"translate: more than {LONGEST} characters; give the command alone")
    if "\0" in text:
        raise UserError("translate: this is no text, it holds a zero byte")
    reader = Reader(text)
    found: list[Command] = []
    now: Command | None = None
    for token in reader.tokens():
        now = now or Command(token.line)
        if token.kind == "word":
            _take(now, token, reader)
            continue
        if token.text in (";", ";;", "&", "&&", "||", "|"):
            now.ends = token.text
            found.append(now)
            now = None
        elif token.text == "<<":
            raise UserError(f"translate: line {token.line}: a here-document is not read; give the command alone")
        else:
            now.redirects.append((token.text, ""))
    found += [now] if now else []
    return [command for command in found if command.words or command.env]


def _take(command: Command, token: Token, reader: Reader) -> None:
    """Add a word to a command; it may be the file of a redirection, or an assignment."""
    command.open += token.open
    if command.redirects and not command.redirects[-1][1] and command.redirects[-1][0] != "2>&1":
        command.redirects[-1] = (command.redirects[-1][0], token.text)
        return
    if not command.words and token.plain and token.text in (*OPENS, *CLOSES):
        return
    exported = command.words[:1] in (["export"], ["env"], ["declare"]) and len(command.words) == 1
    assigned = re.match(r"([A-Za-z_]\w*)=", token.text)
    if assigned and (not command.words or exported):
        name, value = assigned[1], token.text[assigned.end() :]
        command.env.append((name, value))
        if not token.open:
            reader.variables[name] = value
        return
    command.words.append(token.text)


class Reader:
    """Characters to tokens."""

    def __init__(self, text: str) -> None:
        self.text = text.replace("\r\n", "\n").replace("\\\n", "  ")
        self.variables: dict[str, str] = {}
        self.at = 0
        self.expanded = 0
        """Characters that variables were replaced by."""

    def tokens(self) -> Iterator[Token]:
        """Words and operators; a new line is the operator ;."""
        while self.at < len(self.text):
            char = self.text[self.at]
            if char in " \t":
                self.at += 1
            elif char == "\n" or char in "()":
                yield Token("operator", ";", self.line())
                self.at += 1
            elif char == "#":
                end = self.text.find("\n", self.at)
                self.at = len(self.text) if end < 0 else end
            elif operator := next((o for o in OPERATORS if self.text.startswith(o, self.at)), None):
                yield Token("operator", operator, self.line())
                self.at += len(operator)
            else:
                yield from self.word()

    def line(self) -> int:
        """Number of the line, from 1; lines that a backslash joined count as one."""
        return self.text.count("\n", 0, self.at) + 1

    def word(self) -> list[Token]:
        """The word that begins here; a variable without quotes may make several of it."""
        line, start, parts, plain = self.line(), self.at, [""], True
        left: list[str] = []
        while self.at < len(self.text) and (char := self.text[self.at]) not in " \t\n;|&<>()":
            if char in "'\"":
                plain = False
                parts[-1] += self.quoted(char, left)
            elif char == "\\":
                parts[-1] += self.text[self.at + 1 : self.at + 2]
                self.at += 2
            elif char in "$`":
                first, *more = re.split(r"[ \t\n]+", self.value(left)) if self.split_here(left) else [self.value(left)]
                parts[-1] += first
                parts += more
            else:
                parts[-1] += char
                self.at += 1
        assert self.at > start
        return [Token("word", part, line, left, plain) for part in parts if part or not plain]

    def split_here(self, left: list[str]) -> bool:
        """Whether what stands here is a variable that the script set."""
        named = re.compile(r"\$\{?([A-Za-z_]\w*)").match(self.text, self.at)
        return bool(named and named[1] in self.variables)

    def quoted(self, mark: str, left: list[str]) -> str:
        """What stands between quotes."""
        line, value = self.line(), ""
        self.at += 1
        while self.at < len(self.text):
            char = self.text[self.at]
            if char == mark:
                self.at += 1
                return value
            if mark == '"' and char == "\\" and self.text[self.at + 1 : self.at + 2] in ('"', "\\", "$", "`"):
                value += self.text[self.at + 1]
                self.at += 2
            elif mark == '"' and char in "$`":
                value += self.value(left)
            else:
                value += char
                self.at += 1
        raise UserError(f"translate: line {line}: a quote {mark} is not closed")

    def value(self, left: list[str]) -> str:
        """The value of a variable that the script set, or what is written, added to `left`."""
        pattern = r"\$(\w+|[#?$!@*-])|\$\{(\w+)(:?-([^}]*))?\}|\$\((?:[^()]|\([^()]*\))*\)|`[^`]*`"
        found = re.compile(pattern).match(self.text, self.at)
        written = found[0] if found else self.text[self.at]
        self.at += len(written)
        if not found or written == "$":
            return written
        name = found[1] or found[2]
        if name in self.variables:
            self.expanded += len(self.variables[name])
            if self.expanded > LONGEST:
                raise UserError(f"translate: line {self.line()}: variables grow beyond {LONGEST} characters")
            return self.variables[name]
        if found[4] is not None:
            return found[4]
        left.append(written)
        return written

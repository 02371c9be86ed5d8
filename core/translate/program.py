"""One call of an old program, flag by flag, into a command of ours."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from core.cli import ALIASES, dashed
from core.errors import UserError, did_you_mean
from core.slots import Launch, Recipe
from core.swap import Spot, spots
from core.translate.table import Row, rows

Status = Literal["mapped", "implied", "no longer needed", "added", "unknown"]
SHORT = {path: alias for alias, path in ALIASES.items()}
MOST_PROMPTS = 64


class Finding(NamedTuple):
    """What became of one flag."""

    status: Status
    old: str
    new: str
    """Our flag, or why there is none."""


@dataclass(frozen=True)
class Machines:
    """What the launcher in front of a program said."""

    processes: int = 1
    nodes: int = 1
    precision: str | None = None

    @property
    def world(self) -> int:
        return self.processes * self.nodes


@dataclass
class Call:
    """An old program with its flags, while it is translated."""

    program: str
    about: dict[str, Any]
    """Its entry in programs.toml."""
    given: dict[str, list[str]]
    machines: Machines
    make: Callable[[str], Recipe]
    table: dict[str, Row] = field(init=False)
    findings: list[Finding] = field(default_factory=list)
    fields: dict[str, list[str]] = field(default_factory=dict)
    """Fields of recipe and launch that are not as they are by themselves, with their words."""
    flags: dict[str, list[str]] = field(default_factory=dict)
    """Flags of the verb."""
    what: list[str] = field(default_factory=list)
    """Paths that come before the flags."""
    numbers: dict[str, str] = field(default_factory=dict)
    """Values that make a flag of ours together."""

    def __post_init__(self) -> None:
        self.table = rows(self.about["table"]) if "table" in self.about else {}
        self.column = self.about.get("column", 0)
        self.name = self._recipe_named()
        self.recipe = self.make(self.name) if self.name else None
        launch: tuple[Any, ...] = (Launch(),) if self.about.get("verb") == "run" else ()
        self.known: dict[str, Spot] = spots(self.recipe, *launch) if self.recipe else {}

    def _recipe_named(self) -> str:
        for row in self.table.values():
            if row.recipes and (name := row.recipes.get(self.value(row))):
                return name
        return self.about.get("recipe", "")

    def value(self, row: Row) -> str:
        """The value of an old flag, or the default that is written in the table."""
        if row.name in self.given:
            return one(self.given[row.name])
        return row.default[self.column] if row.default else ""

    def on(self, name: str) -> bool:
        """Whether a flag is given with an effect."""
        row, values = self.table.get(name), self.given.get(name)
        if row is None or values is None:
            return False
        value = one(values)
        return value not in ("False", "None", *row.unset) and value not in row.recipes

    def say(self, status: Status, old: str, new: str) -> None:
        self.findings.append(Finding(status, old, new))

    # ------------------------------------------------------------------------------------------------- row by row

    def translate(self) -> None:
        """Go through the flags that are given, then through what the program does without a flag."""
        for name in self.given:
            row = self.table.get(name)
            if row is None or row.page_only or row.cells[self.column : self.column + 1] == ("not there",):
                known = [f"--{n}" for n, r in self.table.items() if not r.page_only]
                near = did_you_mean(f"--{name}", known)
                self.say("unknown", written(name, self.given[name]), f"{self.program} has no such flag{near}")
            else:
                self.take(row, self.given[name], asked=True)
        for row in self.table.values():
            if row.default and row.name not in self.given:
                text = row.default[self.column]
                if text.startswith("@"):
                    text = self.value(self.table[text[1:]])
                self.take(row, text.split(), asked=False)
        if fixed := self.about.get("fixed"):
            self.say("added", "what it does by itself", " ".join(fixed))
        if self.machines.precision:
            self.set(f"--mixed_precision {self.machines.precision}", "precision", [self.machines.precision], True)
        from core.translate.rules import finish

        finish(self)

    def take(self, row: Row, values: list[str], asked: bool) -> None:
        """One old flag. Where it was not `asked` for, only what differs from the recipe is told."""
        old = written(row.name, values)
        value = one(values)
        if why := self._without_effect(row, value):
            if asked:
                self.say(*why[:1], old, why[1])  # type: ignore[arg-type]
            return
        if row.known is not None and value not in row.known and value not in row.recipes:
            self.say("unknown", old, f"{value} is not known here; {row.says}")
        elif value in row.recipes:
            if asked:
                self.say("implied", old, f"the recipe {self.name}")
        elif row.do:
            from core.translate.rules import RULES

            RULES[row.do](self, row, values, asked)
        else:
            self.place(row, values, asked)
        for flag, word in zip(row.extra[::2], row.extra[1::2], strict=True):
            self.set(old, flag, [word], asked)
        self._join(old, row.remark and row.says)

    def _join(self, old: str, remark: str) -> None:
        """One finding for the several flags that an old one became, with the remark of the table."""
        mine = [finding for finding in self.findings if finding.old == old]
        if mine and len({finding.status for finding in mine}) == 1:
            self.findings = [finding for finding in self.findings if finding.old != old]
            new = " ".join(dict.fromkeys(finding.new for finding in mine))
            self.say(mine[0].status, old, f"{new} ({remark})" if remark and mine[0].status == "mapped" else new)

    def _without_effect(self, row: Row, value: str) -> tuple[Status, str] | None:
        if value in row.unset:
            return "implied", "the same as not given"
        if beside := [name for name in row.unless if self.on(name)]:
            return "no longer needed", f"has no effect beside --{beside[0]}"
        if without := [name for name in row.needs if not self.on(name)]:
            return "no longer needed", f"has no effect without --{without[0]}"
        return None

    def place(self, row: Row, values: Sequence[str], asked: bool) -> None:
        """A flag of a simple row: one value under another name."""
        old, value = written(row.name, values), one(values)
        targets = row.targets()
        if row.status or not targets:
            if asked:
                status = row.status or ("no longer needed" if row.here == "none" else "implied")
                self.say(status, old, row.says)  # type: ignore[arg-type]
            return
        if value in row.words and not row.words[value]:
            if asked:
                self.say("implied", old, targets[0])
            return
        new = [row.words[value]] if value in row.words else list(values) or ["True"]
        if new[0].startswith("--"):
            self.whole(old, new[0], asked)
        elif re.search(r"[ =]", targets[0]):  # the flag has its value with it: it is a switch
            if value == "True":
                self.whole(old, targets[0], asked)
            elif asked:
                self.say("implied", old, f"no {targets[0]}")
        else:
            self.several(old, targets, [row.words.get(one([v]), v) for v in new], asked)

    def whole(self, old: str, flags: str, asked: bool) -> None:
        """A flag of ours with its value, as `--optim.ema=EMA` or `--resume auto`."""
        name, value = re.split(r"[ =]", flags, maxsplit=1) if re.search(r"[ =]", flags) else (flags, "True")
        self.set(old, name, [value], asked)

    def several(self, old: str, targets: Iterable[str], values: list[str], asked: bool) -> None:
        """Give the value to all of our flags that this recipe has."""
        verb = self.about.get("verb")
        there = [t for t in targets if (verb != "run" and t.startswith("--")) or self.path(t) in self.known]
        for target in there:
            self.set(old, target, values, asked)
        if not there and asked:
            self.say("no longer needed", old, f"{self.name} has no {self.path(next(iter(targets)))}")

    def path(self, flag: str) -> str:
        """The field that a flag of ours means."""
        name = flag.lstrip("-").replace("-", "_")
        return name if name in self.known else ALIASES.get(name, name)

    def set(self, old: str, flag: str, values: list[str], asked: bool) -> None:
        """Note a flag of ours, unless the recipe says the same."""
        path = self.path(flag)
        if (self.about.get("verb") != "run" and flag.startswith("--")) or path not in self.known:
            name = f"--{dashed(flag.lstrip('-'))}"
            self.flags[name] = values
            self.say("mapped" if asked else "added", old, " ".join(_flag(name, values)))
            return
        name = f"--{dashed(SHORT.get(path, path))}"
        if same(values, self.known[path].value):
            self.fields.pop(path, None)
            if asked:
                self.say("implied", old, " ".join(["by", self.name + ":", *_flag(name, values)]))
            return
        self.fields[path] = values
        self.say("mapped" if asked else "added", old, " ".join(_flag(name, values)))

    # --------------------------------------------------------------------------------------------------- the command

    def words(self) -> list[list[str]]:
        """Our commands, without `python -m registry`."""
        verb = self.about.get("verb")
        if verb is None:
            return []
        overrides = [*self.about.get("overrides", []), *_words_of(self.fields, self.known)]
        flags = [word for name, values in self.flags.items() for word in _flag(name, values)]
        fixed = list(self.about.get("fixed", []))
        if verb == "run":
            return [["run", self.name, *overrides, *fixed, *flags]]
        if verb == "weights":
            return [["weights", "import", path, *flags, *of] for path, of in self._imports()]
        if verb in ("sample", "eval"):
            from shlex import join

            return [[verb, join([self.name, *overrides]), *fixed, *flags]]
        return [[verb, *fixed, *flags]]

    def _imports(self) -> list[tuple[str, list[str]]]:
        if not self.what:
            raise UserError(f"translate: {self.program} needs the path of a checkpoint")
        second = [(path, ["--as", "vae"]) for path in self.what[1:]]
        return [(self.what[0], ["--for", self.name, *(["--ema"] if "ema" in self.numbers else [])]), *second]


def _words_of(fields: dict[str, list[str]], known: dict[str, Spot]) -> list[str]:
    words: list[str] = []
    for path, values in fields.items():
        words += _flag(f"--{dashed(SHORT.get(path, path))}", values)
    return words


def _flag(name: str, values: list[str]) -> list[str]:
    """A flag in words; a class of a slot, or a value with a dash in front, is written with `=`."""
    if not values or values == ["True"]:
        return [name]
    is_class = re.fullmatch(r"[A-Z]\w+", values[0]) and values[0] not in ("False", "None")
    if len(values) == 1 and (values[0].startswith("-") or is_class):
        return [f"{name}={values[0]}"]
    return [name, *values]


def one(values: Sequence[str]) -> str:
    text = " ".join(values) if values else "True"
    return text.capitalize() if text.lower() in ("true", "false", "none") else text


def written(name: str, values: Sequence[str]) -> str:
    return " ".join([f"--{name}", *values])


def same(values: Sequence[str], now: Any) -> bool:
    """Whether words say what a field has already."""
    if isinstance(now, tuple):
        return len(values) == len(now) and all(same([v], n) for v, n in zip(values, now, strict=True))
    text = " ".join(values)
    if hasattr(type(now), "__dataclass_fields__"):
        return type(now).__name__ == text
    if isinstance(now, (str, Path)):
        return str(now) == text
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False
    return bool(found == now) and isinstance(found, bool) == isinstance(now, bool)


def read_flags(words: Sequence[str]) -> tuple[dict[str, list[str]], list[Finding]]:
    """Old flags by name, and what is none or is given twice (the last one counts)."""
    given: dict[str, list[str]] = {}
    odd: list[Finding] = []
    now: list[str] | None = None
    for word in words:
        if re.match(r"--?[A-Za-z]", word):
            name, attached, value = word.lstrip("-").partition("=")
            name = name.replace("-", "_")
            if name in given:
                odd.append(
                    Finding("no longer needed", written(name, given.pop(name)), "given twice; the last one counts")
                )
            now = given[name] = [value] if attached else []
        elif now is None:
            odd.append(Finding("unknown", word, "a word that belongs to no flag"))
        else:
            now.append(word)
    return given, odd

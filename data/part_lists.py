"""From a data slot to the parts that are meant: lists of file lists with weights and formats, a folder, a glob.

The original's lists are read as they are (LDM sheet §5.1). What it guessed is stated: behind a list's path may stand
its weight and its format (`aes.filelist 0.3 format=laion_aes`).
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from core.errors import UserError, did_you_mean
from data.formats import Format, parse_format, split_glob
from data.frames import LINKS_OUT, entries, listing
from data.index import Dropped

if TYPE_CHECKING:
    from data.slots import Base64Parts

LISTS = (".list", ".filelist")
FIRST = ".filelist.list"  # what lists of lists end in
PARTS = (".gz", ".tsv", ".tar")  # what parts end in, unless they begin with part-
LIST_LIMIT = 1 << 28  # bytes of a list; that of 60,000 parts has 3 million
SHARES = 1 << 30  # what weights are rounded to, as shares of their sum


class Part(NamedTuple):
    """A file of records: its name below the root, and what it was when the run began."""

    name: str
    path: Path
    size: int
    time: int  # of the last change, in nanoseconds


class Entry(NamedTuple):
    """A list of parts. `weight`: its share of the samples, in SHARES."""

    name: str
    weight: int
    format: Format
    parts: list[Part]


class Found(NamedTuple):
    """What there is. `split`: these parts are already those of the split alone; `missing`: parts that are named and are
    not there, or no files.
    """

    root: Path
    entries: list[Entry]
    split: bool
    told: str
    dropped: Dropped
    missing: list[tuple[str, str]]


class Line(NamedTuple):
    """A line of a list of lists."""

    path: str
    weight: float | None
    format: str


def find(slot: Base64Parts) -> Found:
    """The parts of the slot's split. Raises UserError where there are none, or a list is wrong."""
    root, pattern, named = _root_of(slot)
    finder = _Finder(root)
    if pattern:
        found = [finder.entry(slot, pattern, finder.matching(pattern))]
        return finder.found(found, False, f"{len(found[0].parts)} parts of {pattern}")
    lists, split = ([named], False) if named else _lists(slot, root)
    if lists:
        found = _from_list(finder, lists[0], slot)
        told = ", ".join(f"{entry.name} ({len(entry.parts)} parts)" for entry in found[:5])
        return finder.found(found, split, f"{lists[0].name}: {told}{', …' if len(found) > 5 else ''}")
    top, split = _folder(slot, root)
    found = [finder.entry(slot, "folder", finder.below(top))]
    if not found[0].parts:
        raise UserError(_explain_no_parts(top))
    return finder.found(found, split, f"folder ({len(found[0].parts)} parts)")


def _root_of(slot: Base64Parts) -> tuple[Path, str, Path | None]:
    """The resolved root, the pattern of a glob below it, and the list or part that was named in its place."""
    if slot.root is None:
        from data.laion import pictures_root

        return pictures_root().resolve(), "", None
    root, pattern = split_glob(slot.root)
    if root.is_file():
        is_list = root.name.endswith(LISTS)
        return root.parent.resolve(), "" if is_list else _escaped(root.name), root if is_list else None
    if not root.is_dir():
        near = did_you_mean(root.name, entries(root.parent))
        raise UserError(f"the data folder {root} does not exist{near}; name a folder of parts, a list, or a glob.")
    return root.resolve(), pattern, None


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _lists(slot: Base64Parts, root: Path) -> tuple[list[Path], bool]:
    """The list of lists, if any, and whether it is that of the split alone."""
    if slot.file_list is not None:
        name = str(slot.file_list).replace("{split}", slot.split)
        for path in (Path(name), root / name):
            if path.is_file():
                return [path], name != str(slot.file_list)
        near = did_you_mean(Path(name).name, [*entries(Path(name).parent), *entries(root)])
        raise UserError(f"the list {name} does not exist, neither here nor in {root}{near}.")
    lists = sorted(path for path in root.glob(f"*{FIRST}") if path.is_file())
    own = [path for path in lists if path.name == f"{slot.split}{FIRST}"]
    if own or len(lists) < 2:
        return own or lists, bool(own) and (root / f"{slot.held_out_split}{FIRST}").is_file()
    names = ", ".join(path.name for path in lists[:5])
    raise UserError(f"{root} has several lists ({names}), and not {slot.split}{FIRST}: name it as file_list.")


def _folder(slot: Base64Parts, root: Path) -> tuple[Path, bool]:
    """The folder of the split's name in the root, and whether the held-out part has one too; else the root."""
    inner, other = root / slot.split, root / slot.held_out_split
    if not slot.split or slot.split == "all" or not inner.is_dir() or not inner.resolve().is_relative_to(root):
        return root, False
    return inner, bool(slot.held_out_split) and other.is_dir()


# ---- lists ----------------------------------------------------------------------------------------------------------


def _from_list(finder: _Finder, path: Path, slot: Base64Parts) -> list[Entry]:
    """The entries of a list of lists; one entry, if all that it names are parts."""
    lines = {number: _parsed(path, number, text) for number, text in _read(path)}
    if not lines:
        raise UserError(f"the list {path} is empty; expected a path, and a weight if wanted, on each line.")
    _check_weights(path, lines)
    if not any(_is_many(line) for line in lines.values()):
        parts = [part for n, line in lines.items() for part in _parts_of(finder, path, n, line, missing=True)]
        return [finder.entry(slot, path.name, parts)]
    found = [finder.entry(slot, line.path, _parts_of(finder, path, n, line), line) for n, line in lines.items()]
    for entry in found:
        if not entry.parts and not finder.missing:
            raise UserError(f"{path}: {entry.name} has no parts.")
    return found


def _is_many(line: Line) -> bool:
    """Whether a line names more than one part, or says more than a path."""
    said = line.weight is not None or bool(line.format)
    return said or line.path.endswith(LISTS) or any(sign in line.path for sign in "*?[")


def _parts_of(finder: _Finder, path: Path, number: int, line: Line, missing: bool = False) -> list[Part]:
    """The parts that a line of a list of lists stands for. Only where all lines name parts, one may be `missing`."""
    if line.path.endswith(LISTS):
        inner = finder.place(path, number, line.path)
        return finder.listed(inner, _read(inner))
    if any(sign in line.path for sign in "*?["):
        return finder.matching(line.path)
    there = finder.place(path, number, line.path, missing)
    return finder.below(there) if there.is_dir() else finder.listed(path, [(number, line.path)])


def _read(path: Path) -> list[tuple[int, str]]:
    """Number and text of the lines that are not blank."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > LIST_LIMIT:
            raise ValueError("it is no file, or too long for a list")
        lines = path.read_text("utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"the list {path} cannot be read: {reason}") from None
    return [(number, text.strip()) for number, text in enumerate(lines, 1) if text.strip()]


def _parsed(path: Path, number: int, text: str) -> Line:
    """`path [weight] [format=…]`: a path may hold blanks, so what follows it is read from the right."""
    where, words, form = f"{path} line {number}", text.replace("\t", " ").split(" "), ""
    if len(words) > 1 and words[-1].startswith("format="):
        form = words.pop().removeprefix("format=")
        try:
            parse_format(form)
        except ValueError as error:
            raise UserError(f"{where}: format={form}: {error}") from None
    weight = _weight(words[-1], where) if len(words) > 1 else None
    return Line(" ".join(words if weight is None else words[:-1]).strip(), weight, form)


def _weight(word: str, where: str) -> float | None:
    """A weight above 0; None where the word is the end of a path, as far as one can tell."""
    try:
        weight = float(word)
    except ValueError:
        if "." in word or "/" in word:
            return None
        raise UserError(
            f"{where}: the weight {word!r} is not a number; expected 'path weight', as in 'a.filelist 0.5'."
        ) from None
    if not math.isfinite(weight) or weight <= 0:
        raise UserError(
            f"{where}: the weight {word} must be a number above 0; leave the line out to leave the list out."
        )
    return weight


def _check_weights(path: Path, lines: dict[int, Line]) -> None:
    """All lines have a weight, or none: the original ignored the weights of a list that lacks one."""
    weighted = [number for number, line in lines.items() if line.weight is not None]
    if weighted and len(weighted) < len(lines):
        bare = next(number for number in lines if number not in weighted)
        raise UserError(
            f"{path} line {bare}: {lines[bare].path} has no weight, and line {weighted[0]} has one: give all lines a "
            "weight, or none, which draws from all lists equally."
        )


# ---- files ----------------------------------------------------------------------------------------------------------


class _Finder:
    """Finds parts below a root, each once, and keeps account of what is left out."""

    def __init__(self, root: Path):
        self.root = root
        self.seen: set[Path] = set()
        self.dropped = Dropped()
        self.missing: list[tuple[str, str]] = []

    def found(self, found: list[Entry], split: bool, told: str) -> Found:
        """The entries with their weights as shares of 2 ** 30."""
        total = sum(entry.weight for entry in found)
        shares = [entry._replace(weight=max(1, round(SHARES * entry.weight / total))) for entry in found]
        return Found(self.root, shares, split, told, self.dropped, self.missing)

    def entry(self, slot: Base64Parts, name: str, parts: list[Part], line: Line | None = None) -> Entry:
        """An entry whose weight is not yet a share."""
        form = parse_format(line.format if line and line.format else slot.format)
        weight: float = 1.0 if line is None or line.weight is None else line.weight
        return Entry(name, weight, form, parts)  # type: ignore[arg-type]

    def place(self, path: Path, number: int, text: str, missing: bool = False) -> Path:
        """The file or folder that a line names: below the root, else beside its list. Raises UserError where it leaves
        both, and, unless it may be `missing`, where it is not there.
        """
        homes = (self.root, path.parent.resolve())
        if "\0" in text:
            raise UserError(f"{path} line {number}: {text!r} is no path.")
        real = [Path(os.path.realpath(home / text)) for home in homes]
        inside = [found for found in real if any(found.is_relative_to(home) for home in homes)]
        if not inside:
            raise UserError(f"{path} line {number}: {text} leaves the data folder {self.root}: name a root above it.")
        there = next((found for found in inside if found.exists()), None)
        if there is None and not missing:
            near = did_you_mean(inside[0].name, entries(inside[0].parent))
            raise UserError(f"{path} line {number}: {text} does not exist below {self.root}{near}.")
        return there or inside[0]

    def listed(self, path: Path, lines: list[tuple[int, str]]) -> list[Part]:
        """The parts that the lines of a list name."""
        return list(self._parts(self.place(path, number, text, missing=True) for number, text in lines))

    def matching(self, pattern: str) -> list[Part]:
        """The parts that a glob below the root names. Raises UserError where there are none."""
        inner = Path(pattern)
        if inner.is_absolute() or ".." in inner.parts:
            raise UserError(f"the glob {pattern} leaves the data folder {self.root}: name a root above it.")
        try:
            found = sorted(self.root.glob(pattern))
        except (ValueError, NotImplementedError, OSError) as error:
            raise UserError(f"the glob {pattern} is none: {error}") from None
        paths = [path for path in found if path.is_file() and not path.name.endswith(LISTS)]
        if not paths:
            raise UserError(f"no file in {self.root} is called {pattern}; it holds {listing(self.root)}.")
        return list(self._parts(iter(paths)))

    def below(self, top: Path) -> list[Part]:
        """All files below a folder that are called as parts are, without hidden ones."""
        return list(self._parts(walk(top)))

    def _parts(self, paths: Iterator[Path]) -> Iterator[Part]:
        for path in paths:
            real = Path(os.path.realpath(path))
            name = path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else path.as_posix()
            if not real.is_relative_to(self.root):
                self.dropped.add(LINKS_OUT, name)
            elif real in self.seen:
                self.dropped.add("parts that are named twice", name)
            elif part := self._part(name, real):
                self.seen.add(real)
                yield part

    def _part(self, name: str, path: Path) -> Part | None:
        try:
            status = path.stat()
        except (OSError, ValueError) as error:
            self.missing.append((name, getattr(error, "strerror", None) or str(error)))
            return None
        if not stat.S_ISREG(status.st_mode):
            self.missing.append((name, "is no file"))
            return None
        return Part(name, path, status.st_size, status.st_mtime_ns)


def walk(top: Path) -> Iterator[Path]:
    """The files below a folder that are called as parts are, in order."""
    for folder, subs, files in os.walk(top):
        subs[:] = sorted(name for name in subs if not name.startswith("."))
        for name in sorted(files):
            if (name.startswith("part-") or name.endswith(PARTS)) and not name.endswith(LISTS):
                yield Path(folder) / name


def _explain_no_parts(folder: Path) -> str:
    return (
        f"no parts (part-*, *{', *'.join(PARTS)}) and no list (*{FIRST}) in {folder}; it holds {listing(folder)}. "
        "`python -m registry data make laion --out DIR` writes some to try."
    )

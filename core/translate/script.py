"""A command line or a shell script of the original systems, command by command, into ours."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field

from core.errors import UserError
from core.slots import Recipe
from core.translate.launchers import Start, read_start
from core.translate.program import Call, Finding, read_flags
from core.translate.shell import CONTROL, Command, commands
from core.translate.table import read

DEEPEST = 3
"""Scripts that name scripts."""


@dataclass
class Piece:
    """One old command, what became of its flags, and the commands that take its place."""

    old: str
    findings: list[Finding] = field(default_factory=list)
    new: list[list[str]] = field(default_factory=list)
    """Words of ours, from the verb on."""
    before: list[str] = field(default_factory=list)
    """Shell in front of each of them, quoted: assignments, nohup."""
    after: list[str] = field(default_factory=list)
    """Shell behind, quoted: redirections, &."""
    start: list[str] = field(default_factory=lambda: ["python", "-m", "registry"])
    plain: list[str] = field(default_factory=list)
    """Lines that are kept as they are."""
    program: str = ""

    @property
    def lines(self) -> list[str]:
        """The commands as shell."""
        made = [" ".join([*self.before, shlex.join([*self.start, *words]), *self.after]) for words in self.new]
        return [*self.plain, *made]


def translate(text: str, make: Callable[[str], Recipe], depth: int = 0) -> list[Piece]:
    """What became of each command of a script. `make` gives a recipe of its name. Raises UserError."""
    pieces: list[Piece] = []
    piped = False
    for command in commands(text):
        if piped and pieces:
            _pipe(command, pieces[-1])
        else:
            pieces += _command(command, make, depth)
        piped = command.ends == "|"
    return pieces


def _pipe(command: Command, piece: Piece) -> None:
    """What a command's output goes into: `tee` is kept."""
    if command.words[:1] == ["tee"]:
        piece.after += ["|", shlex.join(command.words)]
        piece.findings.append(Finding("implied", f"| {' '.join(command.words)}", "kept; run.log says the same"))
    else:
        piece.findings.append(Finding("unknown", f"| {' '.join(command.words)}", "only tee is kept behind a pipe"))


def _command(command: Command, make: Callable[[str], Recipe], depth: int) -> list[Piece]:
    words = list(command.words)
    assigned = [f"{name}={value}" for name, value in command.env]
    piece = Piece(shlex.join([*words, *assigned] if words in (["export"], ["declare"]) else [*assigned, *words]))
    kept = _variables(command, piece)
    for written in dict.fromkeys(command.open):
        why = (
            "nothing is executed here"
            if written[1:2] == "(" or written[0] == "`"
            else "it is not set in what was given"
        )
        if words[:1] != ["export"] and words and words[0] not in read("programs")["commands"]:
            piece.findings.append(Finding("unknown", written, f"{why}; it is kept as text"))
    nohup = words[:1] == ["nohup"]
    words = words[1:] if nohup or words[:1] == ["env"] else words
    if not words or words[0] in ("export", "declare"):
        piece.plain = [f"export {assignment}" if words else assignment for assignment in kept]
        return [piece] if piece.findings else []
    if words[0] in CONTROL:
        piece.findings.append(Finding("unknown", piece.old, "control flow is not read; the commands in it are"))
        return [piece]
    known = read("programs")
    if words[0] in ("bash", "sh", "source", ".") and (script := _script(words[1:])):
        return _named_script(script, piece, make, depth, kept)
    if words[0].endswith(".sh") and (script := _script(words)):
        return _named_script(script, piece, make, depth, kept)
    if why := _absent(words):
        piece.findings.append(Finding("unknown", piece.old, why))
        return [piece]
    start = read_start(words)
    if why := _preparation(words, start, known["commands"]):
        piece.findings.append(Finding("no longer needed", piece.old, why))
        return [piece]
    if start.program.rpartition("/")[2] not in known["programs"]:
        why = _absent([start.program]) or f"{start.program or words[0]} is no program of a system that is known here"
        piece.findings.append(Finding("unknown", piece.old, why))
        return [piece]
    _program(start, piece, make)
    piece.program = start.program
    devices = [f"CUDA_VISIBLE_DEVICES={start.devices}"] if start.devices else []
    piece.before = [*devices, *(word for word in kept if not (devices and word.startswith("CUDA_VIS")))]
    piece.before += ["nohup"] if nohup else []
    _behind(command, piece, nohup)
    return [piece]


def _program(start: Start, piece: Piece, make: Callable[[str], Recipe]) -> None:
    """Translate the flags of a program that is known."""
    about = read("programs")["programs"][start.program.rpartition("/")[2]]
    given, odd = read_flags(start.words)
    call = Call(start.program.rpartition("/")[2], about, given, start.machines, make)
    call.translate()
    piece.findings += [*start.findings, *odd, *call.findings]
    if "what" in about:
        piece.findings.append(Finding("implied", call.program, about["what"]))
    piece.new = call.words()
    if start.torchrun:
        piece.start = [*start.torchrun, "-m", "registry"]


def _variables(command: Command, piece: Piece) -> list[str]:
    """The assignments that mean something here, quoted; what became of each is noted."""
    kept = []
    table: dict[str, str] = read("programs")["variables"]
    for name, value in command.env:
        said = table.get(name) or next(
            (why for key, why in table.items() if key.endswith("_") and name.startswith(key)), ""
        )
        if said == "kept" and any(part in value for part in command.open):
            piece.findings.append(Finding("unknown", f"{name}={value}", "its value is not set in what was given"))
        elif said == "kept":
            kept.append(f"{name}={shlex.quote(value)}")
            piece.findings.append(Finding("implied", f"{name}={value}", "kept"))
        elif said:
            piece.findings.append(Finding("no longer needed", f"{name}={value}", said))
        elif command.words:
            kept.append(f"{name}={shlex.quote(value)}")
            piece.findings.append(Finding("unknown", f"{name}={value}", "a variable that is not known here; kept"))
    return kept


def _behind(command: Command, piece: Piece, nohup: bool) -> None:
    """Redirections and & are kept."""
    behind = ["2>&1" if o == "2>&1" else f"{o} {shlex.quote(f)}" for o, f in command.redirects if f or o == "2>&1"]
    behind += ["&"] if command.ends == "&" else []
    if said := " ".join([*(["nohup"] if nohup else []), *behind]):
        piece.findings.append(Finding("implied", said, "kept"))
    piece.after += behind


def _absent(words: list[str]) -> str:
    """One line for a system that has no recipe."""
    for system, names in read("programs")["absent"].items():
        if any(word == name or word.endswith(f"/{name}") for word in words for name in names):
            return f"this registry has no recipe of {system}"
    return ""


def _preparation(words: list[str], start: Start, known: dict[str, str]) -> str:
    """Why a command that prepares the original is not needed."""
    names = (words[0].rpartition("/")[2], " ".join(words[:2]), start.program.rpartition("/")[2])
    return next((known[name] for name in names if name in known), "")


def _script(words: list[str]) -> str:
    """The text of a script that is known by its name."""
    if not words:
        return ""
    for name, text in read("programs")["scripts"].items():
        if words[0] == name or words[0].endswith(f"/{name}"):
            return str(text.format(**read("programs")["shared"]))
    return ""


def _named_script(text: str, piece: Piece, make: Callable[[str], Recipe], depth: int, kept: list[str]) -> list[Piece]:
    if depth >= DEEPEST:
        raise UserError("translate: scripts that name scripts, too deep")
    inner = translate(text, make, depth + 1)
    piece.findings.append(Finding("implied", piece.old, "a named script, read as the commands that it holds"))
    for made in inner:
        own = [word for word in kept if word.partition("=")[0] not in {w.partition("=")[0] for w in made.before}]
        made.before = [*own, *made.before]
    return [piece, *inner]


def title(piece: Piece) -> str:
    """The old command without its flags."""
    head = re.split(r" --(?=[A-Za-z])", piece.old, maxsplit=1)[0]
    return head if piece.program in head else f"{head} … {piece.program}"

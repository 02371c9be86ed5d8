"""The words in front of an old program: interpreter, launcher, processes and machines."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from core.errors import UserError
from core.translate.program import Finding, Machines, read_flags
from core.translate.table import read

PYTHON = r"(?:.*/)?python[\d.]*"
TAKES = ("-W", "-X")
"""Python's own flags that have a value."""


@dataclass
class Start:
    """How a program is started."""

    program: str = ""
    """Its file, or its module."""
    words: list[str] = field(default_factory=list)
    machines: Machines = field(default_factory=Machines)
    devices: str | None = None
    torchrun: list[str] = field(default_factory=list)
    """The launcher on several machines, which ours is started by too."""
    findings: list[Finding] = field(default_factory=list)


def read_start(words: list[str]) -> Start:
    """Take interpreter and launcher away from the front of a command."""
    start = Start()
    words = _python(words, start) if re.fullmatch(PYTHON, words[0]) else list(words)
    while words and (launcher := _launcher(words)):
        words = _launched(words[1 + (words[0] == "accelerate") :], launcher, start)
        if words and re.fullmatch(PYTHON, words[0]):
            words = _python(words, start)
    start.program, start.words = (words[0], words[1:]) if words else ("", [])
    return start


def _python(words: list[str], start: Start) -> list[str]:
    """What follows `python -u -m`."""
    rest = list(words[1:])
    while rest and rest[0].startswith("-"):
        flag = rest.pop(0)
        if flag == "-m":
            return rest
        if flag == "-c":
            start.findings.append(Finding("unknown", "python -c", "code is not read"))
            return []
        if flag in TAKES and rest:
            rest.pop(0)
    return rest


def _launcher(words: list[str]) -> dict[str, str] | None:
    for about in read("programs")["launchers"].values():
        if words[0].rpartition("/")[2] in about["names"] or " ".join(words[:2]) in about["names"]:
            return about  # type: ignore[no-any-return]
    return None


def _launched(words: list[str], launcher: dict[str, str], start: Start) -> list[str]:
    """Read the launcher's flags; the first word that is none of them, or a value, is the program."""
    mine: list[str] = []
    while words and words[0].startswith("-"):
        mine.append(words.pop(0))
        name = mine[-1].lstrip("-").partition("=")[0].replace("-", "_")
        if name in ("m", "module"):
            mine.pop()
            break
        takes = "=" not in mine[-1] and launcher.get(name) != "switch"
        if takes and words and not words[0].startswith("-") and not re.search(r"\.(py|sh)$", words[0]):
            mine.append(words.pop(0))
    given, odd = read_flags(mine)
    start.findings += odd
    _roles(given, launcher, start)
    return words


def _roles(given: dict[str, list[str]], launcher: dict[str, str], start: Start) -> None:
    found: dict[str, str] = {}
    for name, values in given.items():
        role, value = launcher.get(name), " ".join(values)
        old = f"--{name} {value}".strip()
        if role is None:
            start.findings.append(
                Finding("unknown", old, f"{launcher['names'][0]} has no such flag that is known here")
            )
        else:
            found[role] = value
            if role != "precision":  # that is said with the recipe's field
                _say(role, old, value, start)
    devices = found.get("devices", "")
    if devices and re.fullmatch(r"\d+(,\d+)*", devices):
        start.devices = devices
    elif devices and devices != "all":
        raise UserError(f"translate: --gpus {devices}: expected numbers with commas between them, as 0,1,2,3")
    hosts = found.get("addresses", "").split(",") if found.get("addresses") else []
    nodes = _number(found.get("nodes") or str(len(hosts) or 1), "machines")
    count = len(start.devices.split(",")) if start.devices else 1
    processes = _number(found.get("processes") or str(count), "processes")
    if "all" in found:
        processes = max(_number(found["all"], "processes") // nodes, 1)
    start.machines = Machines(processes, nodes, found.get("precision", "").replace("no", "fp32") or None)
    if nodes > 1:
        _several_machines(found, hosts, processes, nodes, start)


def _number(text: str, what: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,4}", text):
        raise UserError(f"translate: the launcher's number of {what} is {text!r}: expected a whole number")
    return int(text)


def _say(role: str, old: str, value: str, start: Start) -> None:
    said = {
        "processes": ("mapped", f"--nproc {value}"),
        "all": ("mapped", f"--nproc {value}"),
        "devices": ("mapped", f"CUDA_VISIBLE_DEVICES={value}, a process each"),
        "restarts": ("no longer needed", "--max-restarts of run, where it is wanted"),
        "found": ("no longer needed", "processes find each other"),
        "address": ("no longer needed", "processes of one machine find each other; of several: --rdzv-endpoint"),
        "port": ("no longer needed", "a free port is taken"),
        "addresses": ("mapped", "the first machine is where the others meet"),
        "nodes": ("implied" if value == "1" else "mapped", "one machine" if value == "1" else "torchrun --nnodes"),
        "logs": ("no longer needed", "run.log in the output directory"),
        "switch": ("implied", "run --nproc starts processes by itself"),
        "sharding": (
            "no longer needed",
            "nothing is configured outside the command; --parallel.shard spreads over ranks",
        ),
    }
    status, new = said[role]
    start.findings.append(Finding(status, old, new))  # type: ignore[arg-type]


def _several_machines(found: dict[str, str], hosts: list[str], processes: int, nodes: int, start: Start) -> None:
    host = found.get("address") or (hosts[0] if hosts else "")
    host = host.removeprefix("tcp://").removeprefix("http://")
    if not host:
        start.findings.append(Finding("unknown", f"{nodes} machines", "where they meet is not said: add --master_addr"))
        return
    if ":" not in host:
        host += f":{found.get('port') or 29500}"
    start.torchrun = ["torchrun", "--nnodes", str(nodes), "--nproc-per-node", str(processes)]
    start.torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", host]

"""Kill -9 at a chosen moment, start the same command again, until the run is done.

Each attempt is a real process that is really killed, and does what `run NAME --resume auto --output-dir OUT` does.
"""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from core.slots import Recipe
from core.verbs.run import descendants
from tests.engine.processes import start

MOMENTS = ("start-up", "step", "save", "validation", "sampling", "anywhere")


@dataclass
class Kills:
    """How a run came to its end: the moments at which it was killed, and the seconds from each start to its first
    update.
    """

    moments: list[str] = field(default_factory=list)
    restart_s: list[float] = field(default_factory=list)
    families: list[int] = field(default_factory=list)
    """Process ids of all that the killed ones had started."""


def run_under_fire(
    recipe: Recipe, out: Path, store: str, moments: list[str], seed: int, threads: int = 1, patience: float = 200.0
) -> Kills:
    """Start, kill at each of `moments` in turn, start again; after the last one let it finish. A run that was done
    before its moment came is not killed.
    """
    chance, kills = random.Random(seed), Kills()
    said = out.with_suffix(".stderr")
    for moment in [*moments, None]:
        began, lines = time.monotonic(), _lines(out)
        process = start(recipe, said, threads, output_dir=out, store=store, resume="auto")
        due = _due(moment, recipe, out, chance)
        while process.is_alive() and not due():
            if len(kills.restart_s) <= len(kills.moments) and _lines(out) > lines:
                kills.restart_s.append(time.monotonic() - began)
            if time.monotonic() - began > patience:
                process.kill()
                raise AssertionError(f"stuck before {moment}: {said.read_text()[-2000:]}")
            time.sleep(0.001)
        if process.is_alive():
            kills.families += descendants(process.pid)
            os.kill(process.pid, signal.SIGKILL)
            kills.moments.append(moment)
        process.join()
        if process.exitcode not in (0, -signal.SIGKILL):
            raise AssertionError(f"exit code {process.exitcode}: {said.read_text()[-2000:]}")
        if process.exitcode == 0:
            return kills
    raise AssertionError("the last attempt was killed by someone else")


def _due(moment: str | None, recipe: Recipe, out: Path, chance: random.Random) -> Callable[[], bool]:
    """Whether the moment has come, asked every millisecond."""
    if moment is None:
        return lambda: False
    began, delay, lines = time.monotonic(), chance.random(), _lines(out)
    later = {
        "start-up": lambda: (out / "recipe.json").exists() and _after(delay * 1.5),
        "step": lambda: _lines(out) > lines + int(delay * 6),
        "save": lambda: any(out.glob("checkpoints/.partial-*")) and _after(delay * 0.05),
        "validation": lambda: (
            _lines(out) > lines and _last_step(out) % recipe.validation.every == 0 and _after(delay * 0.2)
        ),
        "sampling": lambda: _samples(out) > samples,
        "anywhere": lambda: time.monotonic() - began > delay * 8,
    }
    samples, came = _samples(out), []

    def _after(seconds: float) -> bool:
        came.append(time.monotonic())
        return came[-1] - came[0] >= seconds

    return later[moment]


def _lines(out: Path) -> int:
    path = out / "journal.jsonl"
    return path.read_bytes().count(b'"loss"') if path.exists() else 0


def _samples(out: Path) -> int:
    return len(list(out.glob("samples/*/*")))


def _last_step(out: Path) -> int:
    lines = [line for line in (out / "journal.jsonl").read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    steps = [json.loads(line).get("step", 1) for line in lines if b'"loss"' in line]
    return steps[-1] if steps else 1

"""How fast the verbs answer, against what Python needs to import tyro."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.measure import Row, alternate

LIMIT = [sys.executable, "-c", "import tyro"]
VERBS = {
    "list": (["list"], "<= 2"),
    "diff A B": (["diff", "lvdm-short-sky", "lvdm-short-sky-tiny"], "<= 2"),
    "show NAME": (["show", "lvdm-short-sky"], "<= 5"),
    "run NAME --help": (["run", "lvdm-short-sky", "--help"], "<= 5"),
}


def call(command: list[str]) -> None:
    subprocess.run(command, stdout=subprocess.DEVNULL, check=False)


def rows() -> list[Row]:
    """A row a verb."""
    found = []
    for name, (words, goal) in VERBS.items():
        ours, limit = alternate(lambda w=words: call([sys.executable, "-m", "registry", *w]), lambda: call(LIMIT), 11)
        found.append(Row(f"registry {name} / import tyro", ours, limit, "s", goal))
    return found

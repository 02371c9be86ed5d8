"""`resume`: go on with a run that was stopped, with its own recipe and state."""

from __future__ import annotations

from collections.abc import Sequence

from core.cli import parse
from core.outputs import find_run
from core.recipe_file import read
from core.slots import Launch
from core.verbs.run import run


def resume(where: str, words: Sequence[str], store: str | None) -> int:
    """Go on with the run at `where` (output directory or run id), with the flags `words`. Returns the exit code."""
    folder = find_run(where, store)
    recipe, launch = parse(words, read(folder), Launch())
    return run(recipe, launch.but(resume=str(folder)), ["resume", where, *words])

"""`resume`: go on with a run that was stopped, with its own recipe and state."""

from __future__ import annotations

from collections.abc import Sequence

from core.outputs import find_run
from core.recipe_file import load
from core.slots import Launch
from core.verbs.run import run


def resume(where: str, launch: Launch, max_steps: int | None = None, argv: Sequence[str] = ()) -> int:
    """Go on with the run at `where` (output directory or run id), to `max_steps` updates if given. Returns the exit
    code.
    """
    folder = find_run(where, launch.store)
    recipe = load((folder / "recipe.json").read_text(), str(folder / "recipe.json"))
    if max_steps is not None:
        recipe = recipe.but(loop=recipe.loop.but(max_steps=max_steps, epochs=None))
    return run(recipe, launch.but(resume=str(folder)), argv)

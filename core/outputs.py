"""The output directory of a run: its name, what may be in it, and what says how to go on."""

from __future__ import annotations

import os
import shutil
from datetime import datetime
from pathlib import Path

from core.checkpoint import newest
from core.errors import UserError
from core.preflight import writable
from core.run_facts import run_facts as run_facts
from core.slots import Launch, Recipe
from core.slots.slot import flatten

OURS = (
    *("recipe.json", "run.json", "run.log", "journal.jsonl", "synced.json", "provenance", "traceback.txt"),
    *("checkpoints", "samples", "export", "profile.json", "run.json.partial", "synced.json.partial"),
)
"""What a run writes; `--overwrite` removes these and nothing else."""
FREE = (
    "loop.max_steps",
    "loop.epochs",
    "loop.num_workers",
    "loop.log_every",
    "loop.profile",
    "loop.micro_batch",
    "loop.compile",
)
FREE_SLOTS = ("validation", "checkpoint", "tracking", "parallel", "system.attention")
"""What may differ between a checkpoint's recipe and the one that goes on: it changes nothing that is learnt."""


def output_dir(recipe: Recipe, launch: Launch, run_name: str) -> Path:
    """Where the run writes: what was asked for, else runs/<recipe>/<run name>."""
    return launch.output_dir or Path("runs") / (recipe.name or type(recipe).__name__) / run_name


def default_run_name() -> str:
    """Date and time, and the process, so that two runs of one second differ."""
    return f"{datetime.now():%Y%m%d-%H%M%S}-{os.getpid() % 10000:04d}"


def prepare(folder: Path, overwrite: bool) -> None:
    """Make the folder ready for a fresh run. Raises UserError when it is in use and not to be overwritten, or
    read-only.
    """
    in_use = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    if in_use and not overwrite:
        raise UserError(
            f"--output-dir {folder} is not empty ({', '.join(in_use[:5])}): --resume {folder} goes on with its run, "
            "--overwrite starts afresh (removes that run), or name another folder"
        )
    foreign = [name for name in in_use if name not in OURS]
    if foreign:
        raise UserError(
            f"--output-dir {folder} holds files that no run wrote ({', '.join(foreign[:5])}): name another folder"
        )
    writable(folder)
    for name in in_use:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def find_run(where: str, store: str | None) -> Path:
    """The output directory named by a path or a run id, with or without `run:`. Raises UserError if it holds no run."""
    folder = Path(where).expanduser()
    if not folder.is_dir():
        from core.tracking import fetch_output_dir

        folder = fetch_output_dir(where.removeprefix("run:"), store)
    if not (folder / "recipe.json").is_file():
        raise UserError(f"{folder} holds no run: there is no recipe.json in it")
    return folder


def checkpoint_of(folder: Path) -> Path:
    """The newest complete checkpoint of a run. Raises UserError when it has none."""
    found = newest(folder / "checkpoints")
    if found is None:
        raise UserError(f"{folder} has no complete checkpoint: start the run afresh with --overwrite")
    return found


def refuse_other_recipe(ours: Recipe, theirs: Recipe, folder: Path) -> None:
    """Raise UserError, field by field, when the run in `folder` has a recipe that learns something else."""
    a, b = flatten(theirs), flatten(ours)
    changed = [k for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k) and not _free(k)]
    if changed:
        shown = "; ".join(f"{k}: {a.get(k)} there, {b.get(k)} here" for k in changed[:8])
        raise UserError(
            f"the run in {folder} has another recipe ({len(changed)} fields): {shown}. "
            "Start a run of its own, with --init-from for its weights"
        )


def _free(path: str) -> bool:
    return path in FREE or any(path == slot or path.startswith(f"{slot}.") for slot in FREE_SLOTS)

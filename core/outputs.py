"""The output directory of a run: its name, what may be in it, and where a run in it starts."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from core.checkpoint import newest, numbers_of
from core.errors import UserError
from core.files import write_atomic
from core.preflight import writable
from core.recipe_file import dump, read
from core.slots import Launch, Recipe
from core.slots.slot import flatten

OURS = (
    *("recipe.json", "run.json", "run.log", "journal.jsonl", "synced.json", "provenance", "traceback.txt"),
    *("checkpoints", "samples", "export", "hub", "profile.json", "run.json.partial", "synced.json.partial"),
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
    "loop.activation_checkpointing",
    "loop.recompute_every",
    "loop.recompute_keep",
    "loop.mfu",
    "parallel.replicate",
    "parallel.shard",
    "parallel.sequence",
    "parallel.offload",
    "parallel.shard_frozen_from",
    "system.attention",
)
FREE_SLOTS = ("validation", "checkpoint", "tracking")
"""What may differ between a checkpoint's recipe and the one that goes on: it changes nothing that is learnt."""


@dataclass(frozen=True)
class Start:
    """Where a run writes, and what it starts from."""

    folder: Path
    run_name: str
    checkpoint: Path | None = None
    goes_on: bool = False
    """The folder holds this run already: the same MLflow run goes on."""
    notes: tuple[str, ...] = ()
    """What the person should know of it, a line each."""


def start(recipe: Recipe, launch: Launch) -> Start:
    """Prepare the output directory for a run that is new, resumed, or restarted by torchrun. Raises UserError when the
    directory is in use, holds another recipe, or has no checkpoint that is whole.
    """
    again = restarted()
    if launch.resume and launch.resume != "auto" and not again:
        folder = find_run(launch.resume, launch.store)
        return _go_on(recipe, launch, folder, launch.run_name or folder.name)
    run_name = launch.run_name or default_run_name()
    folder = output_dir(recipe, launch, run_name)
    if launch.resume == "auto" and not (launch.output_dir or launch.run_name or again):
        raise UserError("--resume auto goes on in a directory that it has to know: give --output-dir or --run-name")
    if (launch.resume or again) and (folder / "recipe.json").is_file():
        return _go_on(recipe, launch, folder, run_name)
    prepare(folder, launch.overwrite)
    write_atomic(folder / "recipe.json", dump(recipe))
    return Start(folder, run_name)


def _go_on(recipe: Recipe, launch: Launch, folder: Path, run_name: str) -> Start:
    """From the newest whole checkpoint of the run in `folder`. Damaged ones are named and set aside."""
    writable(folder)
    found, damaged = newest(folder / "checkpoints")
    if found is None and damaged and launch.resume != "auto":
        raise UserError(f"no checkpoint of {folder} is whole: {'; '.join(damaged)}; --overwrite starts the run afresh")
    theirs = read(found or folder)
    # places of frozen parts are free where what is there can be held against a fingerprint (core/fingerprint.py)
    places = numbers_of(found)["frozen"] if found else ()
    refuse_other_recipe(recipe, theirs, found or folder, (*launch.allow, *places))
    for line in damaged:
        path = Path(line.partition(": ")[0])
        path.replace(path.with_name(f"damaged-{path.name}-{datetime.now():%Y%m%d-%H%M%S}"))
    write_atomic(folder / "recipe.json", dump(recipe))
    notes = [f"damaged, set aside: {line}" for line in damaged]
    if found is None:
        notes.append(f"{folder} has no whole checkpoint: starts at step 0")
    elif launch.init_from:
        notes.append(f"full state from {found}; --init-from {launch.init_from} was for the first launch")
    return Start(folder, run_name, found, True, tuple(notes))


def output_dir(recipe: Recipe, launch: Launch, run_name: str) -> Path:
    """Where the run writes: what was asked for, else runs/<recipe>/<run name>."""
    return launch.output_dir or Path("runs") / (recipe.name or type(recipe).__name__) / run_name


def restarted() -> bool:
    """Whether torchrun has started this process again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def default_run_name() -> str:
    """Date and time, and the process, so that two runs of one second differ. Under torchrun those of the launcher, so
    that a restart finds the directory again.
    """
    launched = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid()
    return f"{datetime.fromtimestamp(_began(launched)):%Y%m%d-%H%M%S}-{launched % 10000:04d}"


def _began(pid: int) -> float:
    """When a process of this machine began, in seconds since 1970 (proc(5): field 22 of stat, and btime)."""
    ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    boot = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime"))
    return int(boot.split()[1]) + ticks // os.sysconf("SC_CLK_TCK")


def prepare(folder: Path, overwrite: bool) -> None:
    """Make the folder ready for a fresh run. Raises UserError when it is in use and not to be overwritten, or
    read-only.
    """
    in_use = sorted(p.name for p in folder.iterdir() if not _leftover(p)) if folder.is_dir() else []
    if in_use and not overwrite:
        raise UserError(
            f"--output-dir {folder} is not empty ({', '.join(in_use[:5])}): --resume auto goes on with its run, "
            "--overwrite starts afresh (removes that run), or name another folder"
        )
    foreign = [name for name in in_use if name not in OURS]
    if foreign:
        raise UserError(
            f"--output-dir {folder} holds files that no run wrote ({', '.join(foreign[:5])}): name another folder"
        )
    writable(folder)
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _leftover(path: Path) -> bool:
    """What a kill in start-up leaves: a file that was being written."""
    return path.name.startswith((".partial-", ".probe-"))


def find_run(where: str, store: str | None) -> Path:
    """The output directory named by a path or a run id, with or without `run:`. Raises UserError if it holds no run."""
    folder = Path(where).expanduser()
    if not folder.is_dir():
        from core.tracking import fetch_output_dir

        folder = fetch_output_dir(where.removeprefix("run:"), store)
    if (folder / "state.json").is_file():
        raise UserError(f"{folder} is a checkpoint; name the output directory of its run, {folder.parent.parent}")
    if not (folder / "recipe.json").is_file():
        raise UserError(f"{folder} holds no run: there is no recipe.json in it")
    return folder


def checkpoint_of(folder: Path) -> Path:
    """The newest whole checkpoint of a run. Raises UserError when it has none, saying what is wrong with those there
    are.
    """
    return whole_checkpoint(folder)[0]


def whole_checkpoint(folder: Path) -> tuple[Path, list[str]]:
    """The same, and a line on each newer one that is damaged."""
    found, damaged = newest(folder / "checkpoints")
    if found is None:
        raise UserError(f"{folder} has no whole checkpoint{': ' if damaged else ''}{'; '.join(damaged)}")
    return found, damaged


def refuse_other_recipe(ours: Recipe, theirs: Recipe, where: Path, allow: tuple[str, ...] = ()) -> None:
    """Raise UserError, field by field, when the run at `where` has a recipe that learns something else, but for the
    fields and slots in `allow`.
    """
    a, b = flatten(theirs), flatten(ours)
    known = a.keys() | b.keys()
    for name in allow:
        if not any(_within(path, name) for path in known):
            raise UserError(f"--allow {name}: the recipe has no such field or slot")
    changed = [k for k in sorted(known) if a.get(k) != b.get(k) and not _free(k, allow)]
    if changed:
        shown = "; ".join(f"{k}: {a.get(k)} there, {b.get(k)} here" for k in changed[:8])
        more = f" and {len(changed) - 8} more" if len(changed) > 8 else ""
        raise UserError(
            f"{where} has another recipe: {shown}{more}. --allow {' '.join(changed[:8])} goes on all the same; or "
            "start a run of its own, with --init-from for the weights"
        )


def _free(path: str, allow: tuple[str, ...]) -> bool:
    return path in FREE or any(_within(path, name) for name in (*FREE_SLOTS, *allow))


def _within(path: str, slot: str) -> bool:
    return path == slot or path.startswith(f"{slot}.")

"""What `sample` samples from: a run, one of its checkpoints, an exported folder, or a recipe by name.

An exported folder needs nothing of the run: its networks are all in it, and so is its recipe.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from core import checkpoint, manifest
from core.build import load_frozen
from core.distributed import Ranks
from core.errors import UserError
from core.fingerprint import Prints, changed, noted
from core.models.partly import learnt
from core.outputs import find_run, whole_checkpoint
from core.recipe_file import FILE_NAME, read
from core.slots import FrameVAE, Recipe, Slot
from core.systems import System
from core.weights.names import INDEX, folder_of
from core.weights.start import load_learnt, load_start

HASHED = 2**31
"""Bytes of weights that are read for their hash alone; larger ones have none unless a manifest holds it."""


@dataclass(frozen=True)
class Source:
    """Where weights and recipe come from."""

    recipe: Recipe
    """With the frozen parts taken from the exported folder, where there is one."""
    written: Recipe
    """The recipe as it was written down or named."""
    name: str
    """A word for folders and tables: step-00000600, export, fresh."""
    run: Path | None = None
    """Output directory of the run that all this is from."""
    checkpoint: Path | None = None
    weights: str | None = None
    """What `--weights` names, or the exported folder. With neither this nor a checkpoint the networks are fresh."""
    notes: tuple[str, ...] = ()
    """What a person should know of it."""


def find_source(
    where: str,
    named: Callable[[str], Recipe] | None = None,
    known: Collection[str] = (),
    *,
    recipe: str | None = None,
    weights: str | None = None,
    store: str | None = None,
) -> Source:
    """What `where` names: an output directory, a run id, a checkpoint folder, an exported folder, or a recipe (one of
    `known`, perhaps with overrides, made by `named`). Raises UserError when it is none of them.
    """
    folder = Path(where).expanduser()
    if folder.is_dir():
        source = _of_folder(folder, named(recipe) if recipe and named else None)
    elif named and where.split()[:1] and where.split()[0] in known:
        made = named(where)
        return Source(made, made, "weights" if weights else "fresh", weights=weights)
    else:
        source = _of_run(_run_called(where, store, known))
    if weights:
        raise UserError(f"--weights: {where} has weights of its own; name a recipe to use others")
    if recipe and source.checkpoint:
        raise UserError(f"--recipe: {where} has a recipe of its own; it is for exported folders without one")
    return source


def _run_called(where: str, store: str | None, known: Collection[str]) -> Path:
    try:
        return find_run(where, store)
    except UserError as error:
        raise UserError(f"{where!r} is no directory, no recipe and no run here ({error})") from None if known else error


def _of_folder(folder: Path, recipe: Recipe | None) -> Source:
    if (folder / "state.json").is_file():
        return _of_checkpoint(folder)
    if any(folder.glob("*/config.json")):
        return _of_export(folder, recipe)
    if not (folder / FILE_NAME).is_file():
        raise UserError(
            f"{folder} is no run, checkpoint or export: expected {FILE_NAME} and checkpoints/, state.json, or folders "
            "of networks such as unet/"
        )
    return _of_run(folder)


def _of_run(folder: Path) -> Source:
    found, damaged = whole_checkpoint(folder)
    recipe = read(folder)
    notes = tuple(f"damaged, so an older one is taken: {line}" for line in damaged)
    return Source(recipe, recipe, found.name, run=folder, checkpoint=found, notes=notes)


def _of_checkpoint(folder: Path) -> Source:
    if wrong := manifest.damage(folder):
        raise UserError(f"checkpoint {folder}: {wrong}; take another one of the run")
    run = folder.resolve().parents[1]
    recipe = read(folder if (folder / FILE_NAME).is_file() else run)
    return Source(recipe, recipe, folder.name, run=_if_run(run), checkpoint=folder)


def _of_export(folder: Path, named: Recipe | None) -> Source:
    run = folder.resolve().parent
    if named is None and not any((place / FILE_NAME).is_file() for place in (folder, run)):
        raise UserError(f"{folder} holds networks but no {FILE_NAME}: say which recipe they are of, --recipe NAME")
    recipe = named or read(folder if (folder / FILE_NAME).is_file() else run)
    _same_schedule(recipe, folder / "scheduler" / "scheduler_config.json")
    moved = _with_parts_in(recipe, folder)
    return Source(moved, recipe, "export", run=_if_run(run), weights=str(folder))


def _if_run(folder: Path) -> Path | None:
    return folder if (folder / "run.json").is_file() else None


def _same_schedule(recipe: Recipe, file: Path) -> None:
    """Networks that were trained on another noise schedule would only make noise of this one's samples."""
    objective = getattr(recipe.system, "objective", None)
    if objective is None or not file.is_file():
        return
    stored = json.loads(file.read_text())
    names = {"zero_terminal_snr": "rescale_betas_zero_snr"}
    for field in ("prediction_type", "beta_schedule", "beta_start", "beta_end", "num_train_timesteps", *names):
        ours, theirs = getattr(objective, field), stored.get(names.get(field, field))
        if theirs is not None and theirs != ours:
            raise UserError(
                f"{file}: {field} is {theirs!r}, but {ours!r} in {recipe.name}: these are of another recipe"
            )


def _with_parts_in(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with the frozen parts and the tokenizer that are in `folder` taken from there."""

    def moved(part: Any) -> Any:
        if not isinstance(part, Slot) or not folder_of(folder, getattr(part, "component", "") or "-"):
            return part
        if hasattr(part, "tokenizer"):
            return part.but(tokenizer=str(folder))
        # in what stock pipelines open a shift of the latents is in the weights
        stock = isinstance(part, FrameVAE) and any((folder / name).is_file() for name in (INDEX, FILE_NAME))
        return part.but(weights=str(folder), **({"scale_factor": None, "shift_factor": None} if stock else {}))

    fields = {name: getattr(recipe.system, name, None) for name in ("autoencoder", "conditions")}
    changes = {n: tuple(map(moved, v)) if isinstance(v, tuple) else moved(v) for n, v in fields.items() if v}
    return recipe.but(system=recipe.system.but(**changes))


# ------------------------------------------------------------------------------------------------------------- weights


def load_networks(source: Source, raw: bool = False) -> tuple[System, bool | None]:
    """The system of a source with its weights, on the CPU, and whether they are the moving average; None where only
    whoever wrote the weights knows.

    Raises UserError for what cannot be sampled from, and for weights that do not fit.
    """
    recipe = source.recipe
    if raw and not source.checkpoint:
        raise UserError(f"--raw: {source.name} holds one set of weights; sample from the run or a checkpoint")
    torch.manual_seed(recipe.loop.seed)  # fresh networks are those that a run begins with
    system = recipe.system.build()
    if type(system).sample is System.sample:
        raise UserError(f"{recipe.name} is no generative recipe: it makes no samples")
    load_frozen(recipe, system)
    load_start(recipe, system.trained, frozen_alone=bool(source.checkpoint or source.weights))
    averaged = recipe.optim.ema is not None and not raw
    if source.checkpoint:
        load_trained(system, source.checkpoint, Ranks(torch.device("cpu"), 0, 1, None), averaged)
    elif source.weights:
        for name, module in system.trained.items():
            load_learnt(module, source.weights, name)
    return system, averaged if source.checkpoint else None


def load_trained(system: System, found: Path, here: Ranks, averaged: bool) -> bool:
    """Fill what the trained networks have learnt from a checkpoint, averaged or raw. Returns which."""
    checkpoint.load(found, checkpoint.tensors(system.trained, None, None), here)
    if averaged:
        checkpoint.load(found, {f"ema.{name}": p.detach() for name, p in learnt(system.trained).items()}, here)
    return averaged


def swapped(source: Source, found: Prints) -> Iterator[str]:
    """What a person should know of frozen parts that are not those of the checkpoint any more."""
    kept = source.run / "export" if source.run else Path()
    advice = f"; {kept} holds what the run had" if source.run and kept.is_dir() else ""
    for _, line in changed(noted(source.checkpoint), found) if source.checkpoint else ():
        yield f"{line}, so these samples may be wrong{advice}"


def weights_hash(source: Source) -> str | None:
    """SHA-256 over names and hashes of the weight files, or None for fresh, remote and very large ones."""
    folder = source.checkpoint or Path(source.weights or "")
    files = sorted(folder.rglob("*.safetensors")) if (source.checkpoint or source.weights) and folder.is_dir() else []
    noted = _noted_hashes(folder)
    if not files or (not noted and sum(file.stat().st_size for file in files) > HASHED):
        return None
    total = hashlib.sha256()
    for file in files:
        name = file.relative_to(folder).as_posix()
        total.update(f"{name} {noted.get(name) or _digest(file)}\n".encode())
    return total.hexdigest()


def _noted_hashes(folder: Path) -> dict[str, str]:
    """The hashes that a checkpoint's manifest holds."""
    noted = manifest.read(folder) if (folder / manifest.NAME).is_file() else {}
    return {name: entry["sha256"] for name, entry in noted.items()}


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

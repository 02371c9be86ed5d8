"""`weights`: what a checkpoint of others holds, into a folder that recipes open, and a run's networks out of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from core.build import load_frozen
from core.distributed import Ranks
from core.errors import UserError
from core.fingerprint import changed, noted, prints
from core.models.partly import exported
from core.outputs import checkpoint_of, find_run
from core.recipe_file import FILE_NAME, dump, read
from core.slots import Recipe
from core.systems import System
from core.verbs.motion import export_files, import_lora, motion_of, print_layout
from core.verbs.printing import columns
from core.verbs.sample import load_trained
from core.weights.fit import in_layout_of, misfit
from core.weights.importer import Imported, groups, import_weights, stored_in
from core.weights.lazy import Lazy
from core.weights.load import locate, names_run, split_kind
from core.weights.lora import lora_at
from core.weights.names import some, sort_out
from core.weights.network import Network
from core.weights.start import load_start
from core.weights.stored import Stored

HEAD = ("network", "weights", "tensors", "parameters", "dtype", "what it is", "fits")


def networks_of(recipe: Recipe) -> dict[str, nn.Module]:
    """The networks of a recipe by component, on the meta device: names and shapes without memory. Those of libraries
    that keep a tokenizer too (text encoders) are not among them.
    """
    with torch.device("meta"):
        system = recipe.system.build()
    both = (*system.trained.items(), *system.frozen.items())
    return {name: module for name, module in both if hasattr(module, "save_config")}


# ---------------------------------------------------------------------------------------------------------------- info


def describe(spec: str, recipes: Iterable[Recipe] = ()) -> list[dict[str, Any]]:
    """What is stored at `spec`: an entry for each file or folder of a pipeline, with the networks in it. Each network
    is held against those of `recipes`.
    """
    opened = stored_in(locate(spec, ""))
    candidates = [(recipe.name, networks_of(recipe)) for recipe in recipes]
    return [_described(name, stored, candidates) for name, stored in opened.items()]


def _described(name: str, stored: Stored, candidates: list[tuple[str, dict[str, nn.Module]]]) -> dict[str, Any]:
    found = [
        {
            "component": part,
            "averaged": averaged,
            "tensors": len(state),
            "parameters": sum(entry.numel for entry in state.values()),
            "dtypes": sorted({str(entry.dtype).removeprefix("torch.") for entry in state.values()}),
            "network": network.name if network else None,
            "fits": [
                recipe for recipe, modules in candidates if _fits(state, network, modules.get(part), stored.paddle)
            ],
        }
        for part, averaged, state, network in groups(name, stored)
        if state
    ]
    left_out = sort_out(stored.tensors).left_out
    return {
        "path": str(stored.path),
        "format": stored.form,
        "config": bool(stored.config),
        "tensors": len(stored.tensors),
        "networks": found,
        "left_out": sorted(left_out),
        "classes_passed_over": stored.passed_over,
    }


def _fits(state: dict[str, Lazy], network: Network | None, module: nn.Module | None, paddle: bool) -> bool:
    if module is None:
        return False
    named = network.rename(state) if network else state
    return not any(misfit(module, in_layout_of(module, named, paddle)))


def print_info(spec: str, recipes: Iterable[Recipe], as_json: bool) -> int:
    """Print what is stored at `spec`."""
    entries = describe(spec, recipes)
    if as_json:
        print(json.dumps(entries, indent=2))
        return 0
    for entry in entries:
        print(f"{entry['path']}: {entry['format']}, {entry['tensors']} tensors{', with a config' * entry['config']}")
        print("\n".join(f"  {line}" for line in columns([HEAD, *map(_row, entry["networks"])])))
        if entry["left_out"]:
            print(f"  no weights of a network: {len(entry['left_out'])} tensors ({some(entry['left_out'])})")
        if entry["classes_passed_over"]:
            print(f"  classes in the pickle, not made: {some(entry['classes_passed_over'])}")
    if any(n["averaged"] for e in entries for n in e["networks"]):
        print("  the moving average is taken with --ema, or as ema:PATH where weights are named")
    return 0


def _row(network: dict[str, Any]) -> tuple[str, ...]:
    return (
        network["component"] or "?",
        "average" if network["averaged"] else "raw",
        str(network["tensors"]),
        f"{network['parameters']:,}",
        ", ".join(network["dtypes"]),
        network["network"] or "not known here",
        ", ".join(network["fits"]) or "-",
    )


# -------------------------------------------------------------------------------------------------------------- import


def print_import(
    spec: str,
    get: Callable[[str], Recipe],
    *,
    to: Path | None,
    component: str | None,
    recipe: str | None,
    ema: bool,
    raw: bool,
    partial: bool,
    alpha: float | None,
) -> int:
    """Import the weights at `spec` into `to`, and print what became of each network. A LoRA is a file of its own."""
    if to is None:
        raise UserError("weights import: --to DIR says where the folder goes")
    spec, averaged = split_kind(spec)
    path, modules = locate(spec, component or ""), networks_of(get(recipe)) if recipe else {}
    if component is None and lora_at(path):
        return import_lora(path, to, alpha, modules.get("unet"))
    if alpha is not None:
        raise UserError(f"weights import: --alpha is for a LoRA, and there is none at {path}")
    done = import_weights(
        path, to, only=component, averaged=ema or (bool(averaged) and not raw), partial=partial, modules=modules
    )
    for one in done:
        print("\n".join(_said(one)))
    return 0


def _said(one: Imported) -> Iterable[str]:
    kind = "moving average" if one.averaged else "raw weights"
    yield f"{one.component}: {one.tensors} tensors, {kind}, as {one.network} in {one.folder}"
    if one.left:
        yield f"  of the network around it {one.left} tensors were left"
    if any(one.wrong):
        yield f"  partial, what is missing or misshapen is fresh: {one.wrong}"
    if not one.has_constants:
        yield (
            "  scale and shift of the latents did not come with it: give --system.autoencoder.scale-factor and "
            "--system.autoencoder.shift-factor, or `measure-latents --write` stores them here"
        )


# -------------------------------------------------------------------------------------------------------------- export


def export(
    where: str,
    *,
    to: Path | None,
    raw: bool,
    store: str | None,
    layout: str | None = None,
    alpha: float | None = None,
) -> int:
    """Write the networks of a run's newest checkpoint, or of the checkpoint folder `where`, as diffusers folders; the
    averaged weights where there are some, unless `raw`. With a `layout` its motion modules or its LoRA alone; then
    `where` may also be a file or folder of these.
    """
    if to is None:
        raise UserError("weights export: --to DIR says where the folders go")
    if to.is_dir() and any(to.iterdir()):
        raise UserError(f"--to {to} is not empty: name another folder")
    where, averaged = split_kind(where)
    if layout is not None and not names_run(where):
        return export_files(locate(where, ""), to, layout, alpha)
    found, raw = _checkpoint(where, store), raw or averaged is False
    if layout is not None:
        _, system, _ = _loaded(found, raw)
        return print_layout(layout, to, *motion_of({**system.frozen, **system.trained}, layout))
    wanted = write_export(found, to, raw=raw)
    print(f"{to}: {', '.join(sorted(p.name for p in to.iterdir()))}, {'averaged' if wanted else 'raw'}, from {found}")
    return 0


def write_export(found: Path, to: Path, *, raw: bool) -> bool:
    """Write the networks of a checkpoint, and its recipe. Returns whether they are the moving average."""
    recipe, system, averaged = _loaded(found, raw)
    system.export(to, {name: exported(module) for name, module in system.trained.items()})
    (to / FILE_NAME).write_text(dump(recipe))
    return averaged


def _loaded(found: Path, raw: bool) -> tuple[Recipe, System, bool]:
    """The recipe and the networks of a checkpoint, on the CPU, and whether they are the moving average."""
    recipe = read(_recipe_of(found))
    system = recipe.system.build()
    load_frozen(recipe, system)
    load_start(recipe, system.trained, frozen_alone=True)
    for _, line in changed(noted(found), prints(recipe, system)):
        print(f"note: {line}; the export holds the new ones", file=sys.stderr)
    averaged = recipe.optim.ema is not None and not raw
    load_trained(system, found, Ranks(torch.device("cpu"), 0, 1, None), averaged=averaged)
    return recipe, system, averaged


def _checkpoint(where: str, store: str | None) -> Path:
    folder = Path(where).expanduser()
    if (folder / "state.json").is_file():
        return folder
    return checkpoint_of(find_run(where, store))


def _recipe_of(checkpoint: Path) -> Path:
    """The recipe beside a checkpoint's tensors, or that of its run."""
    beside = checkpoint / "recipe.json"
    return beside if beside.is_file() else checkpoint.resolve().parents[1] / "recipe.json"

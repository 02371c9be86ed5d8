"""Others' weights as diffusers folders that recipes open, every tensor accounted for."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from core.errors import UserError
from core.weights.fit import Misfit, in_layout_of, misfit
from core.weights.folder import whole_folder, write_folder
from core.weights.lazy import Lazy, lazy
from core.weights.motion import COMPONENT
from core.weights.names import component, part_of, parts, sort_out
from core.weights.network import Network
from core.weights.networks import recognised
from core.weights.stored import SUFFIXES, Stored, open_stored

TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)
"""Files of a tokenizer in transformers' layout."""


@dataclass(frozen=True)
class Imported:
    """What became of one network."""

    component: str
    network: str
    folder: Path
    tensors: int
    averaged: bool
    wrong: Misfit
    """With `partial`: what was missing or misshapen and is fresh now, and what was not used."""
    has_constants: bool
    """Whether scale and shift of the latents came with the weights (True where it is no autoencoder)."""
    left: int
    """Tensors of the network around it that were not taken."""


def stored_in(path: Path) -> dict[str, Stored]:
    """The weights at a path by the name of their folder: one, or those of a pipeline, whose networks have a folder
    each. The name is "" where the path itself is opened.
    """
    if not path.is_dir() or (path / "state.json").is_file() or _weights_in(path):
        return {"": open_stored(path)}
    subs = [sub for sub in sorted(path.iterdir()) if sub.is_dir() and _weights_in(sub)]
    return {part_of(sub.name): open_stored(sub) for sub in subs} or {"": open_stored(path)}


def _weights_in(folder: Path) -> bool:
    return any(p.suffix in SUFFIXES and p.is_file() for p in folder.iterdir())


def groups(name: str, stored: Stored) -> Iterator[tuple[str, bool, dict[str, Lazy], Network | None]]:
    """Networks in what was opened: component, whether it is a moving average, its tensors, and what it is."""
    contents = sort_out(stored.tensors)
    for part, state in parts(contents).items():
        network = recognised(state)
        label = part or name.removesuffix("_ema") or (network.component if network else "")
        yield label, name.endswith("_ema"), state, network
        if contents.averaged and part in ("unet", ""):
            yield label, True, _averages(contents, part or label), network


def _averages(contents: Any, part: str) -> dict[str, Lazy]:
    try:
        return component(contents, part, averaged=True)
    except UserError:  # of another network of the same checkpoint
        return {}


def import_weights(
    path: Path,
    to: Path,
    *,
    only: str | None = None,
    averaged: bool = False,
    partial: bool = False,
    modules: Mapping[str, nn.Module] | None = None,
) -> list[Imported]:
    """Write the networks at `path` into `to`/<component> as diffusers folders. Each goes into the module of that name
    in `modules` (the meta device will do), else into the network that its names and shapes tell.

    Raises UserError for a network that is not known, and for one that does not fit unless `partial`.
    """
    opened = stored_in(path)
    if averaged:  # a folder unet_ema stands for unet
        chosen = {name: stored for name, stored in opened.items() if f"{name}_ema" not in opened}
    else:
        chosen = {name: stored for name, stored in opened.items() if not name.endswith("_ema")}
    modules = modules or {}
    plans = _plans(chosen, only, modules)
    if not plans:
        raise UserError(
            f"{path}: no {only or 'network'} in it that can be imported; `weights info` lists what there is"
        )
    kinds = [averaged and _has_average(name, stored, part) for name, part, stored in plans]
    if averaged and not any(kinds):
        raise UserError(
            f"{path}: no moving average in it of {' or '.join(part for _, part, _ in plans)}; leave out --ema"
        )
    done = [
        _import_one(stored, part, to, kind, partial, modules)
        for (_, part, stored), kind in zip(plans, kinds, strict=True)
    ]
    _copy_tokenizer(path / "tokenizer", to / "tokenizer")
    return done


def _copy_tokenizer(there: Path, here: Path) -> None:
    """The tokenizer of a pipeline's folder, without which its text encoder is of no use. No other file."""
    files = [there / name for name in TOKENIZER if (there / name).is_file()]
    for file in files:
        here.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, here / file.name)


def _has_average(name: str, stored: Stored, part: str) -> bool:
    return any(p in (part, "") and kind and state for p, kind, state, _ in groups(name, stored))


def _plans(
    opened: Mapping[str, Stored], only: str | None, modules: Mapping[str, nn.Module]
) -> list[tuple[str, str, Stored]]:
    """What to import: the name of its folder, the component, where it is. A MotionAdapter beside a UNet with motion
    modules is left: what such a pipeline samples with are the UNet's.
    """
    found: dict[str, tuple[str, str, Stored]] = {}
    for name, stored in opened.items():
        for part, target in _parts_of(name, stored, only, modules).items():
            if target not in found or part != target:
                found[target] = (name, part, stored)
    return list(found.values())


def _parts_of(name: str, stored: Stored, only: str | None, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Components to import from what was opened, and what they become: all that are known, or `only` one, which names
    may leave open.
    """
    found: dict[str, str] = {}
    for part, _averaged, _state, network in groups(name, stored):
        target = _target(part, network, modules)
        if only and only in (part, target):
            found[part] = target
        elif only and part == "":
            found[only] = only
        elif not only and network is not None and network.kind is not None:
            found[part] = target
    return found


def _target(part: str, network: Network | None, modules: Mapping[str, nn.Module]) -> str:
    """The component that a network becomes: itself, or the part that an import takes of it."""
    return network.becomes if network and network.becomes and part not in modules else part


def _import_one(
    stored: Stored, part: str, to: Path, averaged: bool, partial: bool, modules: Mapping[str, nn.Module]
) -> Imported:
    contents = sort_out(stored.tensors)
    found = component(contents, part, averaged and bool(contents.averaged))
    network = recognised(found)
    target = _target(part, network, modules)
    named = network.rename(found) if network else found
    takes = network.takes if network and target == network.becomes else ""
    renamed = {name: entry for name, entry in named.items() if re.match(takes, name)}
    module = modules.get(target) or _built(stored, part, renamed, network, modules)
    state = in_layout_of(module, renamed, stored.paddle)
    wrong = misfit(module, state)
    if any(wrong) and not partial:
        raise UserError(
            f"{stored.path}: {target} does not fit {type(module).__name__} ({len(module.state_dict())} tensors): "
            f"{wrong}. --partial imports what fits and leaves the rest fresh"
        )
    folder = _fresh_folder(to / target)
    with whole_folder(folder) as partly:
        write_folder(module, partly, _completed(module, state) if any(wrong) else state)
        known = _keep_constants(module, partly, stored.config)
    left = len(named) - len(renamed)
    return Imported(target, type(module).__name__, folder, len(state), averaged, wrong, known, left)


def _built(
    stored: Stored, part: str, state: Mapping[str, Lazy], network: Network | None, modules: Mapping[str, nn.Module]
) -> nn.Module:
    """The module on the meta device, its sizes from the stored config or from shapes; of motion modules without a
    config those that no shape tells from the UNet of the recipe.
    """
    if network is None or network.kind is None:
        why = f"it is {network.name}; {network.instead}" if network else "its names are those of no network known here"
        raise UserError(f"{stored.path}: {part or 'this'} cannot be imported, {why}; --for RECIPE says what it is")
    try:
        with torch.device("meta"):
            return network.kind()(**network.arguments(state, stored.config or _around(network, modules)))
    except (KeyError, IndexError, ValueError, TypeError, StopIteration) as error:
        raise UserError(
            f"{stored.path}: {network.name}, but its sizes cannot be told ({type(error).__name__}: {error}); "
            "--for RECIPE says what it is"
        ) from None


def _around(network: Network, modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    unet: Any = modules.get("unet") if COMPONENT in (network.component, network.becomes) else None
    return dict(unet.config) if unet is not None else {}


def _fresh_folder(folder: Path) -> Path:
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"--to {folder.parent}: {folder} is there already; name another folder")
    return folder


def _completed(module: nn.Module, state: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """What fits, and for the rest a fresh network's own tensors."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fresh = type(module)(**_constructor(module)).state_dict()
    fits = {n: e for n, e in state.items() if n in fresh and e.shape == tuple(fresh[n].shape)}
    return {name: fits.get(name, lazy(tensor)) for name, tensor in fresh.items()}


def _constructor(module: Any) -> dict[str, Any]:
    return {name: value for name, value in module.config.items() if not name.startswith("_")}


def _keep_constants(module: Any, folder: Path, config: Mapping[str, Any]) -> bool:
    """Latent constants belong to weights. A written config that has only a default of them must not look measured."""
    if not hasattr(module, "constants_of"):
        return True
    constants, path = module.constants_of(config), folder / "config.json"
    entries = json.loads(path.read_text())
    unknown = module.constants_config(1.0, 0.0)
    kept = {name: value for name, value in entries.items() if name not in unknown}
    written = kept | (module.constants_config(*constants) if constants else {})
    path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
    return constants is not None

"""What a cache is of: everything that decides the latents of a clip and the states of its caption, by field.

A cache serves a recipe whose facts are the same. Learning rate, length, batch, denoiser and objective are no facts of
it, nor are the places of data and weights: what lies there is compared.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from core.errors import UserError
from core.files import read_json
from core.fingerprint import Prints, changed, fingerprint_of_stored, vocabulary
from core.precision import DTYPES
from core.preflight import frozen_parts
from core.slots import Autoencoder, Diffusion, Recipe
from core.slots.slot import flatten
from core.validate import SEED, fixed_keys
from core.weights.load import read_component, split_kind

FORMAT = 1
NAME = "cache.json"
PARTS = {"training": "training", "held_out": "held-out"}
"""Fields of cache.json, and the folders that they are of."""
LIMIT = 2**20
"""Bytes of a cache.json that are read at most; ours have some kilobytes."""
OF_DATA = ("root", "annotations", "file_list", "source", "fetch", "max_bad_share", "held_out_split")
"""Fields of data that change no clip of a part: places, whose content has a fingerprint, and what is said of it."""
OF_NETWORKS = ("weights", "source", "fetch", "scale_factor", "shift_factor", "dropout")
"""Fields of frozen networks that change nothing that is kept: the weights have a fingerprint, scale and shift are
applied, and captions dropped, when the cache is read."""


@dataclass(frozen=True)
class Part:
    """The samples of one dataset that are kept, `draws` times each."""

    name: str
    """Its folder."""
    seed: int
    """What crops, first frames and flips are drawn with, together with the epochs 0 to draws - 1."""
    draws: int
    rows: int
    samples_per_shard: int

    @property
    def rows_per_shard(self) -> int:
        return self.samples_per_shard * self.draws

    @property
    def shards(self) -> int:
        return -(-self.rows // self.rows_per_shard)


@dataclass(frozen=True)
class About:
    """The content of `cache.json`."""

    recipe: str
    facts: dict[str, Any]
    frozen: Prints
    """Fingerprints of the frozen networks, with the constants of the latents."""
    training: Part
    held_out: Part
    format: int = FORMAT

    def text(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True)


def refuse_what_has_no_latents(recipe: Recipe) -> None:
    """Raise UserError for a recipe that has nothing to be computed ahead."""
    if not isinstance(recipe.system, Diffusion):
        raise UserError(f"{recipe.name} trains its autoencoder: there is nothing frozen whose output could be kept")
    if recipe.data.many_shapes or recipe.validation_data.many_shapes:
        raise UserError(f"{recipe.name}: its samples have many shapes, of which there is no cache")
    if recipe.system.autoencoder is None:
        raise UserError(f"{recipe.name} is trained on pixels: there are no latents to keep; it needs no cache")


def facts(recipe: Recipe, dataset: Any, held_out: Any) -> dict[str, Any]:
    """The facts of a recipe on data that are there, as JSON has them."""
    found: dict[str, Any] = {}
    for field, data, samples in (("data", recipe.data, dataset), ("validation.data", recipe.validation_data, held_out)):
        found |= _fields(field, data, OF_DATA)
        found[f"{field} (fingerprint)"] = samples.fingerprint
        found[f"{field} (samples)"] = len(samples)
    for path, slot in frozen_parts(recipe):
        found |= _fields(path, slot, OF_NETWORKS)
    return json.loads(json.dumps(found, default=str))  # type: ignore[no-any-return]


def _fields(path: str, slot: Any, but: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in flatten(slot, path).items() if name.removeprefix(f"{path}.") not in but}


def about(recipe: Recipe, dataset: Any, held_out: Any, frozen: Prints, draws: int, samples_per_shard: int) -> About:
    """What a new cache is to hold."""
    count = len(fixed_keys(held_out, needed(recipe)))
    training = Part(PARTS["training"], recipe.loop.seed, draws, len(dataset) * draws, samples_per_shard)
    validation = Part(PARTS["held_out"], SEED, 1, count, samples_per_shard)
    return About(recipe.name, facts(recipe, dataset, held_out), frozen, training, validation)


def needed(recipe: Recipe) -> int:
    """Held-out samples that the validation loss asks for."""
    return recipe.validation.batch_size * recipe.validation.num_batches


# ------------------------------------------------------------------------------------------------------- what is there


def read_about(folder: Path) -> About:
    """What the cache in `folder` says of itself. Raises UserError for one that is none, or is damaged."""
    try:
        value = read_json(folder / NAME, LIMIT)
        if value["format"] != FORMAT:
            raise UserError(
                f"{folder} has format {value['format']!r}, this version reads {FORMAT}: make the cache again"
            )
        parts = {field: _part(value.pop(field), name) for field, name in PARTS.items()}
        found = About(**(value | parts))
        if not all(isinstance(each, dict) for each in (found.facts, found.frozen, *found.frozen.values())):
            raise ValueError("facts and frozen must be objects")
        return found
    except FileNotFoundError:
        raise UserError(f"--cache {folder}: there is no {NAME} in it; `data cache` makes a cache") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder / NAME} cannot be read as that of a cache: {type(error).__name__}: {error}") from None


def _part(value: dict[str, Any], name: str) -> Part:
    part = Part(**value)
    numbers = (part.seed, part.draws, part.rows, part.samples_per_shard)
    if (
        not all(type(n) is int and n >= 0 for n in numbers)
        or not part.draws
        or not part.samples_per_shard
        or part.name != name
    ):
        raise ValueError("a part has numbers that no cache has")
    return part


# ----------------------------------------------------------------------------------------------------------- staleness


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Fields in which two caches differ, a few words on each."""
    names = [name for name in (*now, *(name for name in then if name not in now)) if then.get(name) != now.get(name)]
    return [f"{name}: {then.get(name)} there, {now.get(name)} here" for name in names]


def refuse_stale(folder: Path, there: About, recipe: Recipe, dataset: Any, held_out: Any, weights: Prints) -> None:
    """Raise UserError, field by field, where the cache is not of what this recipe would read and encode with `weights`.
    Constants of the latents are applied when it is read.
    """
    changes = differences(there.facts, facts(recipe, dataset, held_out))
    kept = {
        field: {fact: v for fact, v in found.items() if fact != "constants"} for field, found in there.frozen.items()
    }
    changes += [line for _, line in changed(kept, weights, "the cache was made with")]
    if changes:
        raise UserError(
            f"the cache {folder} is stale: {'; '.join(changes[:6])}. Make another, data cache {recipe.name} with "
            "these fields and --to ANOTHER_FOLDER, or give back what it was made with"
        )
    wanted = len(fixed_keys(held_out, needed(recipe)))
    if wanted > there.held_out.rows:
        raise UserError(
            f"validation.num_batches: {wanted} held-out samples are asked for and the cache {folder} has "
            f"{there.held_out.rows}; make it with this many, or ask for fewer"
        )


def stored_prints(recipe: Recipe) -> Prints:
    """Fingerprints of the frozen networks' weights where they lie, without loading them: a few values of each tensor
    are read. A recipe that makes no samples needs no weights, and then those that are not here are left out.
    """
    found: Prints = {}
    for path, slot in frozen_parts(recipe):
        needed = recipe.validation.generates
        if needed or _is_here(slot.weights):
            found[f"{path}.weights"] = _stored(path, slot)
    return found


def _is_here(spec: str | None) -> bool:
    """Whether weights are on this machine, without asking the hub or the store of the runs."""
    place, _ = split_kind(spec or "")
    return place.startswith("shipped:") or (place != "" and Path(place).expanduser().exists())


def _stored(path: str, slot: Any) -> dict[str, Any]:
    if slot.weights is None:
        raise UserError(f"{path}.weights is not set: samples need this network; or --validation.num-samples 0")
    with torch.device("meta"):
        module = nn.Module.to(slot.build(), DTYPES[slot.dtype])  # not diffusers' own, which warns
    found: dict[str, Any] = {"from": slot.weights, "dtype": str(DTYPES[slot.dtype]).removeprefix("torch.")}
    if isinstance(slot, Autoencoder):
        state, config = read_component(slot.weights, slot.component, module)
        constants = module.constants_of(config) if config else None  # type: ignore[operator]
        if constants is not None:
            found["constants"] = list(constants)  # type: ignore[arg-type]
    elif hasattr(module, "stored"):
        state, tokenizer = module.stored(slot.weights)  # type: ignore[operator]
        found["tokenizer"] = vocabulary(tokenizer)
    else:
        return found  # a network of another package that cannot be looked at without being loaded
    return found | {"tensors": fingerprint_of_stored(module, state)}

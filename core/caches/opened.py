"""A cache that a run trains from: held against the recipe, then the datasets that stand for the recipe's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.caches.facts import read_about, refuse_stale, refuse_what_has_no_latents, stored_prints
from core.caches.samples import CachedSamples
from core.caches.shards import read_empty
from core.errors import UserError
from core.fingerprint import Prints
from core.preflight import frozen_parts
from core.slots import Autoencoder, Recipe
from core.systems import System


@dataclass(frozen=True)
class Opened:
    """What a run needs in the place of data and frozen networks."""

    training: CachedSamples
    held_out: CachedSamples
    frozen: Prints
    """Fingerprints of the networks that made the cache, as a run with these networks would have them."""
    constants: tuple[float, float] | None
    """Scale and shift of the latents, for an autoencoder that is not read; None where the recipe gives its own."""
    note: str

    def give_constants(self, system: System) -> None:
        """Tell the autoencoder, which has no weights, the constants that are stored with its weights."""
        if self.constants is not None:
            vae = system.frozen[Autoencoder.component]
            vae.register_to_config(**vae.constants_config(*self.constants))  # type: ignore[operator]


def open_cache(folder: Path, recipe: Recipe, dataset: Any, held_out: Any) -> Opened:
    """The cache in `folder` for this recipe on these data. Raises UserError where there is none, where it is not
    finished, damaged, or of something else, naming the fields that changed.
    """
    refuse_what_has_no_latents(recipe)
    there = read_about(folder)
    weights = stored_prints(recipe)
    refuse_stale(folder, there, recipe, dataset, held_out, weights)
    told = any(not isinstance(slot, Autoencoder) for _, slot in frozen_parts(recipe))
    empty = read_empty(folder) if told else None
    training = CachedSamples(dataset, folder, there.training, empty)
    training.refuse_other_content()
    constants, frozen = _constants(recipe, there.frozen, weights)
    part = there.training
    return Opened(
        training=training,
        held_out=CachedSamples(held_out, folder, there.held_out, empty),
        frozen=frozen,
        constants=constants,
        note=(
            f"latents{' and states of captions' if told else ''} from {folder}; clips are cut as in the first "
            f"{part.draws} epoch{'s' * (part.draws > 1)} of seed {part.seed}, over and over"
        ),
    )


def _constants(recipe: Recipe, there: Prints, here: Prints) -> tuple[tuple[float, float] | None, Prints]:
    """Constants that the recipe leaves to the weights, as they are now where the weights are here; and the prints with
    places and constants of now.
    """
    constants: tuple[float, float] | None = None
    frozen: Prints = {}
    for path, slot in frozen_parts(recipe):
        found = there.get(f"{path}.weights", {}) | {"from": slot.weights}
        if isinstance(slot, Autoencoder):
            found |= {fact: v for fact, v in here.get(f"{path}.weights", {}).items() if fact == "constants"}
            match slot.scale_factor, found.get("constants"):
                case None, [int() | float() as scale, int() | float() as shift]:
                    constants = (scale, shift)
                case None, _:
                    raise UserError(f"{path}.scale_factor: the cache holds no constants of the latents; give them")
                case _:
                    found["constants"] = [slot.scale_factor, slot.shift_factor]
        frozen[f"{path}.weights"] = found
    return constants, frozen

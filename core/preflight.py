"""What must be there before anything starts: weights of frozen parts, data, a place to write. All that is missing, in
one screen.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from core.errors import Screen, UserError
from core.hub import ready
from core.provenance import refuse_secrets
from core.slots import Autoencoder, Data, Launch, Recipe, Sampler, Slot
from core.slots.slot import field_types


class Frozen(Protocol):
    """What the slots of frozen parts have in common."""

    component: ClassVar[str]

    @property
    def weights(self) -> str | None: ...
    @property
    def source(self) -> str: ...
    @property
    def fetch(self) -> str: ...


@dataclass(frozen=True)
class Origin:
    """Where a trained network, or a part of it, starts from."""

    path: str
    """Of its slot in the recipe."""
    slot: Any
    """Has `weights`, `source` and `fetch`."""
    network: str
    """The trained network's name."""
    component: str
    """Its folder at the place."""
    needed: bool
    """Whether it cannot do without, as far as the recipe alone tells."""


def origins(recipe: Recipe) -> list[Origin]:
    """What the trained denoiser starts from."""
    slot: Any = getattr(recipe.system, "denoiser", None)
    if not hasattr(slot, "weights"):
        return []
    path, name = "system.denoiser", slot.component
    found = [Origin(path, slot, name, name, needed=not slot.learns_whole)]
    if (motion := getattr(slot, "motion", None)) is not None:
        needed = slot.lora is not None
        found.append(Origin(f"{path}.motion", motion, name, "motion_adapter", needed))
    return found


def preflight(recipe: Recipe, launch: Launch = Launch(), here: bool = True) -> None:
    """Raise a Screen that names every missing field, its published source and the command that goes on. What has to be
    on the machine is asked only where the run is to be `here`.
    """
    refuse_secrets(recipe)
    if here and launch.push_to_hub != "none" and os.environ.get("RANK", "0") == "0":
        ready("--push-to-hub")
    _refuse_words_for_the_deaf(recipe)
    _refuse_batches_of_many_shapes(recipe)
    missing = [
        *_missing_weights(recipe, launch),
        *_missing_tokenizers(recipe),
        *(_missing_data(recipe) if here else ()),
    ]
    if missing:
        twin = f"{recipe.name}-tiny" if not recipe.name.endswith("-tiny") else recipe.name
        raise Screen(
            f"{recipe.name} cannot start, {len(missing)} thing{'s are' if len(missing) > 1 else ' is'} missing:\n"
            + "\n".join(f"  {n}. {text}" for n, text in enumerate(missing, 1))
            + f"\nWithout them: `python -m registry run {twin}` trains the tiny twin, "
            f"`python -m registry run {recipe.name} --dry-run` shows the plan."
        )


def _refuse_batches_of_many_shapes(recipe: Recipe) -> None:
    """Held-out samples of many shapes come one by one, and have no Fréchet distance."""
    validation = recipe.validation
    if not recipe.validation_data.many_shapes:
        return
    kind = type(recipe.validation_data).__name__
    if validation.batch_size > 1:
        raise UserError(f"validation.batch_size: must be 1, because {kind} has samples of many shapes")
    if validation.metric_clips:
        raise UserError(f"validation.metric_clips: must be 0, because {kind} has samples of many shapes")


def _refuse_words_for_the_deaf(recipe: Recipe) -> None:
    """Prompts and guidance of a recipe that is told no text would be ignored."""
    if recipe.told:
        return
    validation, plain = recipe.validation, Sampler()
    said = {
        "prompts": validation.prompts != (),
        "metric": validation.metric is not None,
        "sampler.guidance_scale": validation.sampler.guidance_scale != plain.guidance_scale,
        "sampler.negative_prompt": validation.sampler.negative_prompt != plain.negative_prompt,
    }
    for field in (field for field, given in said.items() if given):
        raise UserError(f"validation.{field}: {recipe.name} is told no text; leave it out, or take a recipe that is")


def _missing_weights(recipe: Recipe, launch: Launch) -> list[str]:
    frozen = [] if launch.cache and not recipe.validation.generates else frozen_parts(recipe)
    parts = [*frozen, *((origin.path, origin.slot) for origin in origins(recipe) if origin.needed)]
    return [
        _entry(
            f"{path}.weights is not set; this part is frozen, so it needs trained weights", slot, f"--{path}.weights"
        )
        for path, slot in parts
        if slot.weights is None
    ]


def _missing_tokenizers(recipe: Recipe) -> list[str]:
    conditions = enumerate(getattr(recipe.system, "conditions", ()))
    return [
        _entry(
            f"system.conditions.{i}.tokenizer is not set; captions cannot become tokens without one",
            slot,
            f"--system.conditions.{i}.tokenizer",
        )
        for i, slot in conditions
        if getattr(slot, "tokenizer", "") is None
    ]


def _entry(what: str, slot: Frozen | Data, flag: str) -> str:
    lines = [what, f"     published: {slot.source or 'not known; see the docstring of the recipe'}"]
    if slot.fetch:
        lines.append(f"     get it:    {slot.fetch}")
    return "\n".join([*lines, f"     then:      {flag} <what you got>"])


def frozen_parts(recipe: Recipe) -> list[tuple[str, Frozen]]:
    """The frozen slots of a recipe with their dotted paths: an autoencoder beside something else that is trained, and
    conditions with a network of their own that is not trained too.
    """
    system = recipe.system
    fields = {name: getattr(system, name) for name in field_types(type(system))}
    trains_it = [name for name, value in fields.items() if isinstance(value, Slot)] == ["autoencoder"]
    found = [(f"system.{n}", v) for n, v in fields.items() if isinstance(v, Autoencoder) and not trains_it]
    conditions = enumerate(fields.get("conditions", ()))
    return [*found, *((f"system.conditions.{i}", c) for i, c in conditions if c.component and not c.trained)]


def _missing_data(recipe: Recipe) -> list[str]:
    """The training data, or those of validation where the former are there."""
    for field, data, flag in (
        ("data", recipe.data, "--data-root"),
        ("validation.data", recipe.validation_data, "--validation.data.root"),
    ):
        root = data.needs()
        if root is not None and not root.exists():
            return [_entry(f"{field}.root = {root} does not exist", data, flag)]
    return []


def writable(folder: Path) -> None:
    """Raise UserError when nothing can be written into `folder` (which is made)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise UserError(f"--output-dir {folder}: cannot write there ({error.strerror}); name another folder") from None

"""The recipe: one experiment as a composition of slots, registered under a name."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from core.slots.checkpoint import Checkpoint
from core.slots.data import Data
from core.slots.free import FreeNoise
from core.slots.loop import Loop
from core.slots.optim import Optim
from core.slots.parallel import Parallel
from core.slots.slot import Slot, SlotError, field_types, unknown_field
from core.slots.system import System
from core.slots.tracking import Tracking
from core.slots.validation import Validation

RECIPES: dict[str, type[Recipe]] = {}
"""Every registered recipe by name. Filled by `register`, read by the registry."""


class Recipe(Slot):
    """One experiment: everything that decides what is trained, and nothing about where."""

    data: Data
    system: System
    optim: Optim
    loop: Loop
    parallel: Parallel = Parallel()
    validation: Validation = Validation()
    checkpoint: Checkpoint = Checkpoint()
    tracking: Tracking = Tracking()

    name: ClassVar[str] = ""
    """Filled by `register`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for field in field_types(cls):
            if field not in field_types(Recipe):
                raise unknown_field(Recipe, field)

    def check(self) -> None:
        objective = getattr(self.system, "objective", None)
        why = objective and self.validation.sampler.misfit(objective)
        if why:
            raise SlotError(f"validation.sampler: {why}")
        if objective and self.loop.global_batch % objective.timestep_strata:
            raise SlotError(
                f"system.objective.timestep_strata = {objective.timestep_strata}: must divide loop.global_batch = "
                f"{self.loop.global_batch}, or some timesteps would be learnt more often"
            )
        frames = self.data.clip_shape()[0]
        if why := self.too_long(frames, None):
            raise SlotError(
                f"data.num_frames = {frames}: {why}; take fewer, or a larger system.denoiser.motion.max_length"
            )
        free = self.validation.sampler.free_noise
        if free and (why := self.too_long(frames, free)):
            raise SlotError(f"validation.sampler.free_noise: {why}")

    def too_long(self, frames: int, free: FreeNoise | None) -> str | None:
        """Why clips of `frames` frames, or windows of them, cannot be made by the denoiser; None where they can."""
        longest = getattr(getattr(self.system, "denoiser", None), "max_frames", None)
        if longest is None:
            return "its denoiser has no motion modules" if free else None
        short = (free.context_length if free else frames) <= longest
        return None if short else f"the motion modules have positions for {longest} frames"

    @property
    def told(self) -> bool:
        """Whether what is trained is told something besides the noisy sample, such as a text."""
        return bool(getattr(self.system, "conditions", ()))

    @property
    def validation_data(self) -> Data:
        """The data of validation: its own, or the held-out part of the training data."""
        return self.validation.data or self.data.held_out()


R = TypeVar("R", bound=type[Recipe])


def register(name: str) -> Callable[[R], R]:
    """Class decorator that files a recipe under `name` (lower case, digits, dots and dashes)."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name):
        raise ValueError(f"recipe name {name!r}: lower-case letters, digits, dots and dashes only")

    def enter(cls: R) -> R:
        known = RECIPES.get(name, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            first, second = (f"{c.__module__}.{c.__qualname__}" for c in (known, cls))
            raise ValueError(f"two recipes are called {name!r}: {first} and {second}")
        if (cls.__doc__ or "").strip().startswith(f"{cls.__name__}("):  # what dataclasses put where there is none
            raise ValueError(
                f"recipe {name!r} has no docstring: say what it trains, from which paper, and what it costs"
            )
        cls.name = name
        RECIPES[name] = cls
        return cls

    return enter

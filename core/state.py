"""Everything that changes from update to update, and so everything that a checkpoint holds besides tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from core import checkpoint
from core.build import Built
from core.distributed import Ranks
from core.loader import Skipped
from core.meters import Window
from core.positions import START, Position
from core.recipe_file import dump
from core.saver import Saver
from core.slots import Recipe


@dataclass
class State:
    """Where a run stands."""

    skipped: Skipped
    step: int = 0
    position: Position = START
    nonfinite: int = 0
    nonfinite_in_a_row: int = 0
    window: Window = field(default_factory=Window)
    saved_at: int | None = None
    """The step of the newest checkpoint that was handed over."""


def save(saver: Saver, recipe: Recipe, built: Built, here: Ranks, state: State, about: Any) -> None:
    """Hand everything that goes on to the saver, and what is to be said of it; a collective."""
    numbers = {
        "step": state.step,
        "epoch": state.position.epoch,
        "drawn": state.position.drawn,
        "nonfinite": [state.nonfinite, state.nonfinite_in_a_row],
        "samples": [round(n) for n in here.sum(torch.tensor([state.skipped.read, state.skipped.skipped])).tolist()],
        "scaler": [built.scaler.scale, built.scaler.good_steps],
        "ema_count": built.ema.count if built.ema else None,
        "optimizer_steps": checkpoint.optimizer_steps(built.system.trained, built.optimizer),
        "threads": torch.get_num_threads(),
        "world": here.world,
        "frozen": built.frozen,
        "window": vars(state.window) | {"sums": dict(state.window.sums)},
    }
    saver.save(checkpoint.tensors(built.system.trained, built.optimizer, built.ema), numbers, dump(recipe), about)
    state.saved_at = state.step


def restore(recipe: Recipe, built: Built, here: Ranks) -> State:
    """The state to start from: a fresh one, or that of the checkpoint in `built.start`."""
    share = getattr(recipe.data, "max_bad_share", 0.0)
    found = built.start.checkpoint
    if found is None:
        return State(Skipped(share))
    numbers = checkpoint.numbers_of(found)
    checkpoint.materialise(built.system.trained, built.optimizer, numbers["optimizer_steps"])
    checkpoint.load(found, checkpoint.tensors(built.system.trained, built.optimizer, built.ema), here)
    built.scaler.scale, built.scaler.good_steps = numbers["scaler"]
    if built.ema is not None:
        built.ema.count = numbers["ema_count"]
    if numbers["world"] == here.world:  # sums depend on the number of threads in their last bits
        torch.set_num_threads(numbers["threads"])
    nonfinite, in_a_row = numbers["nonfinite"]
    return State(
        skipped=Skipped(share, *(numbers["samples"] if here.first else ())),  # counts of all ranks together
        step=numbers["step"],
        position=Position(numbers["epoch"], numbers["drawn"]),
        nonfinite=nonfinite,
        nonfinite_in_a_row=in_a_row,
        window=Window.of(numbers["window"]),
        saved_at=numbers["step"],
    )

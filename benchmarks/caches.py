"""Seconds an update from a cache of latents and states of captions, against the same update that computes them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Row, alternate
from core.build import load_frozen
from core.caches.opened import open_cache
from core.caches.write import make
from core.draw import Draw
from core.loader import batches
from core.positions import START, Plan
from core.slots import Diffusion, Recipe
from core.systems.diffusion import DiffusionSystem
from registry import get, names

ROUNDS = 8
WARM = 2


def rows() -> Iterator[Row]:
    """Of each twin that is trained on latents: the whole update; and the part of it that a cache is there for, which is
    reading a batch, its latents and the states of its captions. Clips come from all of the data in a run's order.
    """
    for name in names():
        recipe = get(name)
        if name.endswith("-tiny") and isinstance(recipe.system, Diffusion):
            yield from _of(recipe)


def _of(recipe: Recipe) -> Iterator[Row]:
    torch.manual_seed(0)
    system = recipe.system.build()
    assert isinstance(system, DiffusionSystem)
    load_frozen(recipe, system)
    system.mode(training=True)
    dataset, held_out = recipe.data.build(), recipe.validation_data.build()
    with tempfile.TemporaryDirectory(dir=".") as folder:  # on a disk; /tmp may be memory
        make(recipe, Path(folder), draws=1, samples_per_shard=256, device="cpu", say=lambda line: None)
        cached = open_cache(Path(folder), recipe, dataset, held_out).training
        for what, do in (("update", _updates), ("inputs", _inputs)):
            ours, limit = (do(system, recipe, each) for each in (cached, dataset))
            for _ in range(WARM):
                ours()
                limit()
            this, other = alternate(ours, limit, ROUNDS)
            yield Row(f"{recipe.name}, {what}, cached/not", this, other, "s", "< 1")


def _stream(recipe: Recipe, dataset: Any) -> Iterator[tuple[dict[str, Any], Draw]]:
    """Batches of a run, one after the other, and their draws."""
    size = recipe.loop.global_batch
    plan = Plan(dataset, recipe.loop.seed, size, size)
    stream = batches(dataset, plan.rank(0, 1, START, 10_000), workers=0, pin=False)
    for step in count():
        batch = next(stream)
        yield batch, Draw.training(recipe.loop.seed, step, batch["place"], size)


def _updates(system: DiffusionSystem, recipe: Recipe, dataset: Any) -> Callable[[], None]:
    learning = [p for p in system.trained.parameters() if p.requires_grad]
    optimizer, stream = torch.optim.AdamW(learning, lr=1e-5, fused=True), _stream(recipe, dataset)

    def update() -> None:
        batch, draw = next(stream)
        loss, _ = system.loss(batch, draw)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return update


def _inputs(system: DiffusionSystem, recipe: Recipe, dataset: Any) -> Callable[[], None]:
    """A text encoder that learns is no part of it."""
    stream = _stream(recipe, dataset)

    @torch.no_grad()
    def read() -> None:
        batch, draw = next(stream)
        system.latents(batch, draw)
        if system.reads_frozen_text and "text_states" not in batch:
            system.states(batch["caption"])

    return read

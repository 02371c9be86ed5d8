"""Validation: the held-out loss and samples, comparable between runs. Every function is a collective over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from core.distributed import Ranks
from core.draw import Draw
from core.loader import batches, to_device
from core.metrics import frechet_report
from core.positions import Key
from core.precision import autocast
from core.slots import Recipe, Sampler
from core.stopping import Leave
from core.systems import System

SEED = 0
"""Validation does not depend on the seed of the run: two runs see the same clips, noise and timesteps."""


def fixed_keys(dataset: Any, count: int) -> list[Key]:
    """The first `count` samples of the dataset's fixed order (all of them when there are fewer)."""
    order = dataset.order(SEED, 0)[:count]
    return [Key(SEED, 0, int(index), place) for place, index in enumerate(order)]


def of_one_shape(dataset: Any, keys: list[Key]) -> list[Key]:
    """Those that have the shape of the first one; `own` says the shapes of a dataset of many."""
    own = getattr(dataset, "own", None)
    return keys if own is None else [key for key in keys if own[key.item] == own[keys[0].item]]


def shares(keys: Sequence[Key], ranks: Ranks, batch_size: int) -> list[list[Key]]:
    """This rank's batches: every rank has the same number of them, of the same size; short ones are filled with place
    -1.
    """
    dummy = keys[0]._replace(place=-1)
    per_round = batch_size * ranks.data_world
    rounds = -(-len(keys) // per_round)
    padded = [*keys, *[dummy] * (rounds * per_round - len(keys))]
    starts = (r * per_round + ranks.data_rank * batch_size for r in range(rounds))
    return [padded[start : start + batch_size] for start in starts]


def _leave_if(asked: Callable[[], bool]) -> None:
    if asked():
        raise Leave


@torch.no_grad()
def evaluate(
    system: System, dataset: Any, recipe: Recipe, ranks: Ranks, asked: Callable[[], bool] = lambda: False
) -> dict[str, float]:
    """Mean of every number that the system measures over the fixed validation samples, by `val/<name>`. Raises Leave
    before a batch when `asked()`.
    """
    slot = recipe.validation
    keys = fixed_keys(dataset, slot.batch_size * slot.num_batches)
    sums: dict[str, Tensor] = {}
    for batch in batches(dataset, shares(keys, ranks, slot.batch_size), workers=recipe.loop.num_workers, pin=False):
        _leave_if(asked)
        batch = to_device(batch, ranks.device)
        places = batch["place"]
        real = torch.tensor([p >= 0 for p in places], device=ranks.device)
        draw = Draw.fixed("evaluate", batch["id"], [max(p, 0) for p in places], len(keys), ranks.device)
        with autocast(recipe.loop.precision, ranks.device):
            measured = system.evaluate(batch, draw)
        for name, values in measured.items():
            sums[name] = sums.get(name, torch.zeros((), device=ranks.device)) + values.float()[real].sum()
    total = ranks.sum(torch.stack(list(sums.values()))) * (ranks.data_world / ranks.world)
    return {f"val/{name}": value for name, value in zip(sums, (total / len(keys)).tolist(), strict=True)}


@torch.no_grad()
def generate(
    system: System,
    recipe: Recipe,
    sampler: Sampler,
    count: int,
    ranks: Ranks,
    seed: int = SEED,
    asked: Callable[[], bool] = lambda: False,
    prompts: Sequence[str] = ("",),
) -> Tensor | None:
    """`count` clips (count, 3, T, H, W) on the CPU, of `prompts` in turn, the same whatever the ranks; None where the
    system generates nothing. Raises Leave before a batch when `asked()`.
    """
    keys = [Key(seed, 0, i, i) for i in range(count)]
    clips: list[Tensor] = []
    for part in shares(keys, ranks, recipe.validation.batch_size):
        _leave_if(asked)
        draw = Draw.fixed(
            f"sample {seed}", [key.item for key in part], [max(k.place, 0) for k in part], count, ranks.device
        )
        with autocast(recipe.loop.precision, ranks.device):
            texts = [prompts[key.item % len(prompts)] for key in part]
            made = system.sample(texts, recipe.data.clip_shape(), sampler, draw)
        if made is None:
            return None
        clips += [rank_clips.cpu() for rank_clips in ranks.gather(made)]
    return torch.cat(clips)[:count]


def prompts_of(recipe: Recipe, dataset: Any, count: int, ranks: Ranks) -> list[str]:
    """Texts for `count` clips, the same on every rank: the recipe's prompts in turn, or the captions of the first
    held-out clips; empty where the system is told no text.
    """
    texts = list(recipe.validation.prompts)
    if not texts and recipe.told and count:
        texts = list(ranks.agree(captions(dataset, count) if ranks.first else []))
    texts = texts or [""]
    return [texts[i % len(texts)] for i in range(count)]


def uncached(dataset: Any) -> Any:
    """The dataset itself, of one that stands for it with what a cache has of its samples."""
    return getattr(dataset, "original", dataset)


def captions(dataset: Any, count: int) -> list[str]:
    """Captions of the first `count` samples of a dataset's fixed order."""
    dataset = uncached(dataset)
    parts = [[key] for key in fixed_keys(dataset, count)]
    return [text for batch in batches(dataset, parts, workers=0, pin=False) for text in batch["caption"]]


def real_clips(dataset: Any, count: int, workers: int = 0) -> Tensor:
    """The first `count` clips of a dataset's fixed order, (count, 3, T, H, W) on the CPU."""
    dataset = uncached(dataset)
    keys = fixed_keys(dataset, count)
    parts = [keys[i : i + 8] for i in range(0, len(keys), 8)]
    return torch.cat([batch["pixel_values"] for batch in batches(dataset, parts, workers=workers, pin=False)])


@torch.no_grad()
def reconstructions(system: System, dataset: Any, recipe: Recipe, ranks: Ranks) -> Tensor | None:
    """Held-out clips above their reconstructions, (2n, 3, T, H, W) on the CPU; None where there is no autoencoder."""
    dataset = uncached(dataset)
    slot = recipe.validation
    keys = of_one_shape(dataset, fixed_keys(dataset, max(1, slot.num_samples)))
    parts = [keys[i : i + slot.batch_size] for i in range(0, len(keys), slot.batch_size)]
    pairs: list[Tensor] = []
    for batch in batches(dataset, parts, workers=0, pin=False):
        batch = to_device(batch, ranks.device)
        draw = Draw.fixed("reconstruct", batch["id"], batch["place"], len(keys), ranks.device)
        with autocast(recipe.loop.precision, ranks.device):
            made = system.reconstruct(batch, draw)
        if made is None:
            return None
        pairs.append(torch.stack([batch["pixel_values"], made], 1).flatten(0, 1).cpu())
    return torch.cat(pairs)


def frechet(generated: Tensor, training: Any, held_out: Any, recipe: Recipe) -> dict[str, float]:
    """The Fréchet distance of generated clips to held-out ones, beside its trivial baselines, by `val/frechet…`.

    `val/frechet_clips` is how many held-out clips there were: with a handful all these numbers are mostly bias, and
    with a single clip on either side there are none.
    """
    count, workers = len(generated), recipe.loop.num_workers
    real, second_real = (real_clips(dataset, count, workers) for dataset in (held_out, training))
    enough = min(count, len(real), len(second_real)) > 1
    report = frechet_report(generated, real, second_real) if enough else {}
    return {f"val/{name}": value for name, value in report.items()} | {"val/frechet_clips": float(len(real))}


def metric(generated: Tensor, prompts: Sequence[str], held_out: Any, recipe: Recipe) -> dict[str, float]:
    """The scores of the recipe's own metric for clips generated from `prompts`, by `val/<name>`; none without one."""
    slot = recipe.validation.metric
    if slot is None:
        return {}
    real = real_clips(held_out, len(generated), recipe.loop.num_workers)
    found = slot.build()(generated, prompts, real, captions(held_out, len(real)))
    return {f"val/{name}": value for name, value in found.items()}

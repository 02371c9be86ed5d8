"""`data cache`: latents and states of captions computed once, shard by shard.

A shard is a function of the recipe and its number alone. So ranks share them out without talking to each other, and a
command that was killed goes on where it was, on any number of ranks.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from core.build import frozen_networks
from core.caches.facts import NAME, About, Part, about, differences, needed, read_about, refuse_what_has_no_latents
from core.caches.shards import EMPTY, content_of, crc_of, is_whole, merge, write_empty, write_shard
from core.distributed import choose_device
from core.errors import UserError
from core.files import sync_folder, write_atomic
from core.fingerprint import frozen_prints
from core.loader import batches, to_device
from core.precision import DTYPES
from core.preflight import preflight
from core.slots import Recipe
from core.systems.diffusion import ENCODED, DiffusionSystem
from core.validate import fixed_keys

Key = tuple[int, int, int, int]
TEXTS = 16
"""Captions that go through the text encoder at a time."""


class Work(NamedTuple):
    """What a process caches with: a dataset, the frozen networks, where to."""

    dataset: Any
    items: Sequence[int]
    """Indices of the samples in the order of their rows."""
    part: Part
    folder: Path
    system: DiffusionSystem
    device: torch.device
    workers: int


class _Apart(Dataset[dict[str, Any]]):
    """A dataset of which a batch also says what was bad sample by sample, as `apart`."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, key: Key) -> dict[str, Any]:
        return self.dataset[key]  # type: ignore[no-any-return]

    def collate(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return self.dataset.collate(samples) | {"apart": [sample["bad"] for sample in samples]}  # type: ignore[no-any-return]


def make(
    recipe: Recipe, to: Path, *, draws: int, samples_per_shard: int, device: str = "auto", say: Callable[[str], None]
) -> bool:
    """Write what is missing of the cache `to`, and of damaged shards; with RANK and WORLD_SIZE in the environment this
    rank's share. Returns whether the cache is whole now. Raises UserError where `to` holds another cache.
    """
    refuse_what_has_no_latents(recipe)
    preflight(recipe)
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    here = choose_device(device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = recipe.loop.tf32  # as in a run
    dataset, held_out = recipe.data.build(), recipe.validation_data.build()
    system = frozen_networks(recipe, here)
    assert isinstance(system, DiffusionSystem)
    new = about(recipe, dataset, held_out, frozen_prints(recipe, system), draws, samples_per_shard)
    _enter(to, new)
    if system.reads_frozen_text and not (to / EMPTY).is_file():
        write_empty(to, _states(system, [""]))
    whole = True
    for part, samples, items in (
        (new.training, dataset, range(len(dataset))),
        (new.held_out, held_out, sorted(key.item for key in fixed_keys(held_out, needed(recipe)))),
    ):
        work = Work(samples, items, part, to / part.name, system, here, recipe.loop.num_workers)
        work.folder.mkdir(exist_ok=True)
        whole &= _write_part(work, rank, world, say)
    return whole


def _enter(to: Path, new: About) -> None:
    """The folder is this cache's. Several processes may come at once: they bring the same."""
    to.mkdir(parents=True, exist_ok=True)
    if not (to / NAME).exists():
        foreign = sorted(p.name for p in to.iterdir() if not p.name.startswith(".partial-"))
        if foreign and not (to / NAME).exists():  # another process may have written it in between
            raise UserError(
                f"--to {to} holds files that no cache wrote ({', '.join(foreign[:5])}): name another folder"
            )
        partial = to / f".partial-{NAME}-{os.getpid()}"
        write_atomic(partial, new.text())
        partial.replace(to / NAME)
        sync_folder(to)
    there, ours = (_flat(json.loads(one.text())) for one in (read_about(to), new))
    if changes := differences(there, ours):
        raise UserError(f"--to {to} holds another cache: {'; '.join(changes[:6])}; name another folder, or remove it")


def _flat(content: dict[str, Any]) -> dict[str, Any]:
    """Facts by field, and the rest; the recipe's name and the places of weights are none."""
    found = dict(content["facts"]) | {"training": content["training"], "held out": content["held_out"]}
    for field, facts in content["frozen"].items():
        found |= {f"{field} ({name})": value for name, value in facts.items() if name not in ("from", "constants")}
    return found


def _write_part(work: Work, rank: int, world: int, say: Callable[[str], None]) -> bool:
    """This rank's shards that are not whole, then the index if nobody's is missing."""
    part = work.part
    mine = [number for number in range(rank, part.shards, world) if not is_whole(work.folder, number)]
    keys = {number: _keys(part, work.items, number) for number in mine}
    parts = [keys[number][i : i + ENCODED] for number in mine for i in range(0, len(keys[number]), ENCODED)]
    stream = batches(_Apart(work.dataset), parts, workers=work.workers, pin=False)  # type: ignore[arg-type]
    for done, number in enumerate(mine, 1):
        _write(work, number, keys[number], stream)
        say(f"{work.folder / f'shard-{number:05d}'}: {len(keys[number])} clips, {done} of {len(mine)}")
    return merge(work.folder, part.shards)


def _keys(part: Part, items: Sequence[int], number: int) -> list[Key]:
    """What a shard holds: each of its samples at every draw; the place is the row."""
    first = number * part.samples_per_shard
    pairs = itertools.product(items[first : first + part.samples_per_shard], range(part.draws))
    return [(part.seed, draw, int(item), place) for place, (item, draw) in enumerate(pairs)]


def _write(work: Work, number: int, keys: Sequence[Key], stream: Iterator[dict[str, Any]]) -> None:
    """Encode the clips of one shard, which come from `stream` in pairs, and write it."""
    means: list[Tensor] = []
    stds: list[Tensor] = []
    rows: list[dict[str, Any]] = []
    while len(rows) < len(keys):
        batch = next(stream)
        mean, std = work.system.posterior(to_device(batch, work.device)["pixel_values"])
        means.append(mean.cpu())
        stds.append(std.cpu())
        rows += _rows(batch, keys, number)
    tensors = {"mean": torch.cat(means).contiguous(), "std": torch.cat(stds).contiguous()}
    if work.system.reads_frozen_text:
        if rows[0]["caption"] is None:
            raise UserError("the data give no captions, and this denoiser is told a text: take data that have them")
        texts = {text: i for i, text in enumerate(dict.fromkeys(row["caption"] for row in rows))}
        tensors["text_states"] = _states(work.system, [text.decode("utf-8", "surrogateescape") for text in texts])
        for row in rows:
            row["text"] = texts[row["caption"]]
    for row in rows:
        texts_of_row = [tensors["text_states"][row["text"]]] if row["text"] >= 0 else []
        row["crc"] = crc_of([tensors["mean"][row["row"]], tensors["std"][row["row"]], *texts_of_row])
    write_shard(work.folder, number, tensors, rows)


def _rows(batch: dict[str, Any], keys: Sequence[Key], number: int) -> Iterator[dict[str, Any]]:
    """The rows of a batch."""
    for i, place in enumerate(batch["place"]):
        sample: dict[str, Any] = {name: batch[name][i] for name in ("pixel_values", "caption") if name in batch}
        caption = sample.get("caption")
        yield {
            "sample": keys[place][2],
            "draw": keys[place][1],
            "id": batch["id"][i].encode("utf-8", "surrogateescape"),
            "caption": None if caption is None else caption.encode("utf-8", "surrogateescape"),
            "bad": json.dumps(batch["apart"][i]),
            "content": content_of(sample),
            "shard": number,
            "row": place,
            "text": -1,
        }


def _states(system: DiffusionSystem, captions: Sequence[str]) -> Tensor:
    """States of captions (B, N, D) on the CPU, in the encoder's own dtype, in which nothing of them is lost."""
    dtype = DTYPES[system.slot.conditions[0].dtype]  # type: ignore[attr-defined]
    parts = [captions[i : i + TEXTS] for i in range(0, len(captions), TEXTS)]
    return torch.cat([system.states(part).to(dtype).cpu() for part in parts]).contiguous()

"""`sample`: new clips from a run, a checkpoint, an exported folder or a recipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from core.build import place
from core.distributed import Ranks, choose_device
from core.draw import Draw
from core.errors import UserError
from core.media import to_uint8
from core.precision import autocast
from core.provenance import versions
from core.recipe_file import delta_flags, recipe_hash
from core.requests import Request, prompts_in, typed, wanted
from core.sample_files import GRID, fresh_folder, log_to_run, write_clip, write_json, write_overview
from core.sampling import signal_at_start
from core.slots import RECIPES, Recipe, Sampler
from core.slots.slot import to_json
from core.sources import Source, find_source, load_networks, weights_hash
from core.sources import load_trained as load_trained  # where other verbs look for it
from core.systems import System
from core.verbs.flags import SampleFlags

SIGNAL = 0.1
"""Share of a clip's amplitude at the first timestep from which on the samples are said to suffer."""


def sample(where: str | Source, **given: Any) -> Path:
    """Sample clips from what `where` names; returns the folder that they are in.

    `given` are fields of SampleFlags. The averaged weights are used where there are some, unless `raw`. The same seed
    gives the same clip of a prompt, whatever else is sampled with it.
    """
    source = find_source(where, store=given.get("store")) if isinstance(where, str) else where
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return run(source, SampleFlags(**({"sampler": source.recipe.validation.sampler} | given)))


def run(source: Source, flags: SampleFlags) -> Path:
    """The clips that `flags` ask for, spread over the ranks that torchrun has started, each clip once."""
    recipe = source.recipe
    texts = texts_of(flags, recipe)
    sampler = sampler_of(flags, recipe)
    with peers() as (rank, world):
        if flags.interactive and world > 1:
            raise UserError("--interactive: prompts are typed to one process; take --prompts FILE on several")
        studio = open_studio(source, flags, sampler, rank, world)
        if flags.interactive:
            with suppress(KeyboardInterrupt):  # another way to end
                for text in typed():
                    clips = studio.make(wanted([text], flags.num or 1, first=len(studio.records)))
                    print("\n".join(str(studio.out / file) for clip in clips for file in clip["files"]), flush=True)
        else:
            studio.make(wanted(texts, flags.num or (1 if recipe.told else 4)))
        studio.finish()
        return studio.out


def texts_of(flags: SampleFlags, recipe: Recipe) -> list[str]:
    """The prompts, known before anything is loaded. Raises UserError for prompts that nobody reads, or none."""
    given = {"prompt": flags.prompt, "prompts": flags.prompts, "interactive": flags.interactive}
    ways = [f"--{name}" for name, value in given.items() if value]
    if len(ways) > 1:
        raise UserError(f"{' and '.join(ways)}: give prompts in one way")
    if ways and not recipe.told:
        raise UserError(f"{ways[0]}: {recipe.name} is told no text")
    if flags.interactive or not recipe.told:
        return [""]
    texts = prompts_in(flags.prompts) if flags.prompts else list(flags.prompt or recipe.validation.prompts)
    if not texts:
        raise UserError(f"{recipe.name} is told a text: give --prompt, --prompts FILE or --interactive")
    return texts


def sampler_of(flags: SampleFlags, recipe: Recipe) -> Sampler:
    """The sampler with the short flags applied. Raises UserError for flags that would have no effect."""
    short = {
        "num_inference_steps": flags.steps,
        "eta": flags.eta,
        "guidance_scale": flags.guidance_scale,
        "negative_prompt": flags.negative_prompt,
    }
    if flags.eta is not None and not hasattr(flags.sampler, "eta"):
        raise UserError(f"--eta {flags.eta}: {type(flags.sampler).__name__} has no eta; take --sampler=DDIM")
    sampler = flags.sampler.but(**{name: value for name, value in short.items() if value is not None})
    guided = sampler.guidance_scale != 1.0
    if not recipe.told and (guided or sampler.negative_prompt):
        raise UserError(f"--guidance-scale, --negative-prompt: {recipe.name} is told no text")
    if sampler.negative_prompt and not guided:
        raise UserError("--negative-prompt has no effect at guidance scale 1: give --guidance-scale")
    objective = getattr(recipe.system, "objective", None)
    if objective is not None and (why := sampler.misfit(objective)):
        raise UserError(f"--sampler={type(sampler).__name__}: {why}")
    return sampler


@contextmanager
def peers() -> Iterator[tuple[int, int]]:
    """Rank and number of ranks. They meet when all is made, to hand over what each clip is: texts, over gloo."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield 0, 1
        return
    dist.init_process_group("gloo", timeout=timedelta(days=7))  # the slowest may be far behind; torchrun sees the dead
    try:
        yield dist.get_rank(), world
    finally:
        dist.destroy_process_group()


def open_studio(source: Source, flags: SampleFlags, sampler: Sampler, rank: int, world: int) -> Studio:
    """Everything loaded and checked; the notes are said."""
    device, recipe = choose_device(flags.device), source.recipe
    system, averaged = load_networks(source, flags.raw)
    clip = _clip_shape(flags, recipe, system)
    out = _agreed(fresh_folder(flags.output_dir, _default(source, flags)) if rank == 0 else None, world)
    place(system, recipe, Ranks(device, rank, 1, None))
    system.mode(training=False)
    notes = list(_notes(source, sampler, clip))
    if rank == 0:
        print("".join(f"note: {note}\n" for note in notes), end="", file=sys.stderr, flush=True)
    made_by = _made_by(source, flags, sampler, clip) | {"averaged": averaged, "device": device.type, "notes": notes}
    return Studio(source, flags, sampler, system, clip, device, out, made_by, rank, world)


def _agreed(value: Path | None, world: int) -> Path:
    box = [value]
    if world > 1:
        dist.broadcast_object_list(box, src=0)
    assert box[0] is not None
    return box[0]


def _default(source: Source, flags: SampleFlags) -> Path:
    """samples/ of the run, else of the working directory."""
    if source.run:
        return source.run / "samples" / f"{source.name}-seed-{flags.seed}"
    return Path("samples") / f"{source.recipe.name}-{source.name}-seed-{flags.seed}"


def _clip_shape(flags: SampleFlags, recipe: Recipe, system: System) -> tuple[int, int, int]:
    """Frames, height and width. Raises UserError for what the networks cannot do, naming the nearest that they can."""
    trained = recipe.data.clip_shape()
    asked = (flags.frames or trained[0], flags.height or trained[1], flags.width or trained[2])
    for name, value, factor in zip(("frames", "height", "width"), asked, system.multiples(), strict=True):
        if value % factor:
            nearest = max(round(value / factor), 1) * factor
            raise UserError(
                f"--{name} {value}: {recipe.name} makes multiples of {factor}; the nearest that fits is {nearest}"
            )
    return asked


def _notes(source: Source, sampler: Sampler, clip: tuple[int, int, int]) -> Iterator[str]:
    """What a person should know of these samples."""
    recipe, trained = source.recipe, source.recipe.data.clip_shape()
    if not source.checkpoint and not source.weights:
        yield f"{recipe.name} has fresh weights, so these samples are noise; give --weights, or name a run"
    if clip[0] > trained[0]:
        yield (
            f"{clip[0]} frames, trained on {trained[0]}: the network takes them, but has seen no motion that long; it "
            "has no means of its own for longer videos"
        )
    if clip[1:] != trained[1:]:
        yield f"{clip[1]} x {clip[2]} pixels, trained on {trained[1]} x {trained[2]}"
    steps = sampler.num_inference_steps
    scheduler = sampler.build(recipe.system.objective)  # type: ignore[attr-defined]
    if (left := signal_at_start(scheduler, steps)) > SIGNAL:
        first = float(scheduler.timesteps[0])
        yield (
            f"{type(sampler).__name__} with {steps} steps begins at timestep {first:.0f}, where {left:.0%} of a clip's "
            "amplitude should be left; it begins with pure noise, so samples suffer"
        )


def _made_by(source: Source, flags: SampleFlags, sampler: Sampler, clip: tuple[int, int, int]) -> dict[str, Any]:
    """All that decides what the clips look like, for the json."""
    written = source.written
    kind: Any = RECIPES.get(written.name)
    return {
        "recipe": written.name,
        "recipe_delta": delta_flags(written, kind()) if kind else None,
        "recipe_hash": recipe_hash(written),
        "run": str(source.run) if source.run else None,
        "checkpoint": str(source.checkpoint) if source.checkpoint else None,
        "weights": source.weights,
        "weights_hash": weights_hash(source),
        "seed": flags.seed,
        "sampler": to_json(sampler),
        "frames": clip[0],
        "height": clip[1],
        "width": clip[2],
        "fps": flags.fps or source.recipe.validation.fps,
        "precision": source.recipe.loop.precision,
        "versions": versions(),
    }


@dataclass
class Studio:
    """A loaded system that makes clips and writes them down."""

    source: Source
    flags: SampleFlags
    sampler: Sampler
    system: System
    clip: tuple[int, int, int]
    device: torch.device
    out: Path
    made_by: dict[str, Any]
    rank: int = 0
    world: int = 1
    records: list[dict[str, Any]] = field(default_factory=list)
    shown: dict[int, np.ndarray] = field(default_factory=dict)
    """The clips of the grid by number, (T, H, W, 3) uint8."""

    def make(self, requests: Sequence[Request]) -> list[dict[str, Any]]:
        """Make and write this rank's share of the clips: every world-th. Returns their entries in the json."""
        share = requests[self.rank :: self.world]
        size = self.flags.batch_size or self.source.recipe.validation.batch_size
        made = [entry for i in range(0, len(share), size) for entry in self._batch(share[i : i + size])]
        self.records += made
        return made

    def clips(self, requests: Sequence[Request], sampler: Sampler) -> np.ndarray:
        """Clips of some requests, (N, T, H, W, 3) uint8. The same request has the same noise, whatever the sampler."""
        ids, places = [request.id for request in requests], [request.number for request in requests]
        draw = Draw.fixed(f"sample {self.flags.seed}", ids, places, max(places) + 1, self.device)
        with autocast(self.source.recipe.loop.precision, self.device):
            clips = self.system.sample([request.prompt for request in requests], self.clip, sampler, draw)
        assert clips is not None
        return to_uint8(clips)

    def _batch(self, requests: Sequence[Request]) -> list[dict[str, Any]]:
        frames = self.clips(requests, self.sampler)
        self.shown |= {r.number: clip for r, clip in zip(requests, frames, strict=True) if r.number < GRID}
        fps, formats = self.made_by["fps"], self.flags.formats
        return [write_clip(self.out, r, clip, fps, formats) for r, clip in zip(requests, frames, strict=True)]

    def finish(self) -> None:
        """Bring the shares together: grid, sheet, json; log them to the run."""
        shares: list[Any] = [(self.records, self.shown)]
        if self.world > 1:
            shares = [None] * self.world
            dist.all_gather_object(shares, (self.records, self.shown))
        if self.rank:
            return
        records = [record for part, _ in shares for record in part]
        shown = {index: clip for _, part in shares for index, clip in part.items()}
        if shown:
            write_overview(self.out, [shown[i] for i in sorted(shown)], self.made_by["fps"], self.flags.formats)
        write_json(self.out, self.made_by, records)
        if self.source.run and self.flags.log:
            log_to_run(self.source.run, self.out, self.flags.store)

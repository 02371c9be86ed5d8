"""`sample`: new clips from a run, a checkpoint, an exported folder or a recipe."""

from __future__ import annotations

import os
import sys
import time
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
from core.requests import Request, prompts_in, readable, typed, wanted
from core.run_facts import run_facts
from core.sample_files import (
    GRID,
    entry_of,
    fresh_folder,
    goes_on,
    is_there,
    write_clip,
    write_json,
    write_overview,
)
from core.sample_log import log_to_run
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
    texts, sampler = asked(source, flags)
    num = flags.num or (1 if source.recipe.told else 4)
    requests = [] if flags.interactive else wanted(texts, num)
    with _peers() as (rank, world):
        studio = _studio(source, flags, sampler, requests, (rank, world))
        if flags.interactive:
            _converse(studio, flags.num or 1)
        else:
            studio.make(requests)
        studio.finish()
        return studio.out


def asked(source: Source, flags: SampleFlags) -> tuple[list[str], Sampler]:
    """The prompts and the sampler: all that can be wrong before anything is loaded. Raises UserError."""
    return _texts(flags, source.recipe), _sampler(flags, source.recipe)


def _converse(studio: Studio, num: int) -> None:
    """Clips of each prompt that is typed, made before the next is read. Raises UserError when there was none."""
    with suppress(KeyboardInterrupt):  # another way to end
        for text in typed():
            files = studio.make(wanted([text], num, before=studio.requests))
            print("\n".join(str(studio.out / name) for name in files), flush=True)
    studio.keep_what_is_there()
    if not studio.requests:
        with suppress(OSError):  # it holds something
            studio.out.rmdir()
        raise UserError("--interactive: no prompt was typed")


def _texts(flags: SampleFlags, recipe: Recipe) -> list[str]:
    """The prompts. Raises UserError for prompts that nobody reads, or none."""
    given = {"prompt": flags.prompt, "prompts": flags.prompts, "interactive": flags.interactive}
    ways = [f"--{name}" for name, value in given.items() if value]
    if len(ways) > 1:
        raise UserError(f"{' and '.join(ways)}: give prompts in one way")
    if ways and not recipe.told:
        raise UserError(f"{ways[0]}: {recipe.name} is told no text")
    if flags.interactive and max(flags.nproc, int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise UserError("--interactive: prompts are typed to one process; take --prompts FILE on several")
    if flags.interactive or not recipe.told:
        return [""]
    said = [readable(text, "--prompt") for text in flags.prompt]
    texts = prompts_in(flags.prompts) if flags.prompts else said or list(recipe.validation.prompts)
    if not texts:
        raise UserError(f"{recipe.name} is told a text: give --prompt, --prompts FILE or --interactive")
    return texts


def _sampler(flags: SampleFlags, recipe: Recipe) -> Sampler:
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
    readable(sampler.negative_prompt, "--negative-prompt")
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
def _peers() -> Iterator[tuple[int, int]]:
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


def _studio(
    source: Source, flags: SampleFlags, sampler: Sampler, requests: Sequence[Request], at: tuple[int, int]
) -> Studio:
    """Everything loaded and checked; the notes are said. `at` is the rank and the number of ranks."""
    rank, world = at
    device, recipe = choose_device(flags.device), source.recipe
    system, averaged = load_networks(source, flags.raw)
    clip = _clip_shape(flags, recipe, system)
    notes = [*source.notes, *_notes(source, sampler, clip)]
    made_by = _made_by(source, flags, sampler, clip) | {"averaged": averaged, "device": device.type, "notes": notes}
    found = None
    if rank == 0:
        out = fresh_folder(flags.output_dir, _default(source, flags))
        found = out, goes_on(out, json_of(made_by, requests, flags.formats))
    out, again = _from_first(found, world)
    place(system, recipe, Ranks(device, rank, 1, None))
    system.mode(training=False)
    if rank == 0:
        for note in [*notes, *([f"goes on in {out}: clips that are there stay"] if again else [])]:
            say(note)
    return Studio(source, flags, sampler, system, clip, device, out, made_by, again, rank, world)


def say(note: str) -> None:
    """What a person should know."""
    print(f"note: {note}", file=sys.stderr, flush=True)


def _from_first(value: Any, world: int) -> Any:
    """What rank 0 has, on every rank."""
    box = [value]
    if world > 1:
        dist.broadcast_object_list(box, src=0)
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
    run_id = run_facts(source.run).get("run_id") if source.run else None
    return {
        "recipe": written.name,
        "recipe_delta": delta_flags(written, kind()) if kind else None,
        "recipe_hash": recipe_hash(written),
        "run": str(source.run) if source.run else None,
        "run_id": run_id or None,
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


def json_of(made_by: dict[str, Any], requests: Sequence[Request], formats: Sequence[str]) -> dict[str, Any]:
    """The json, as long as not all clips are there."""
    return {**made_by, "complete": False, "clips": [entry_of(request, formats) for request in requests]}


class Pace:
    """How far it is, in a line every PAUSE seconds."""

    PAUSE = 10.0

    def __init__(self, total: int, talks: bool) -> None:
        self._total, self._talks = total, talks
        self._began = self._said = time.monotonic()

    def say(self, done: int) -> None:
        """`done` clips of this process are there."""
        now = time.monotonic()
        if self._talks and now - self._said >= self.PAUSE and done < self._total:
            self._said = now
            left = (now - self._began) / done * (self._total - done)
            print(f"{done} of {self._total} clips, {left / 60:.1f} min left", file=sys.stderr, flush=True)


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
    again: bool = False
    """A call that was killed has made some of the clips."""
    rank: int = 0
    world: int = 1
    requests: list[Request] = field(default_factory=list)
    """All clips so far, of all ranks."""
    shown: dict[int, np.ndarray] = field(default_factory=dict)
    """The clips of the grid by number, (T, H, W, 3) uint8."""

    def make(self, requests: Sequence[Request]) -> list[str]:
        """Make and write this rank's share of the clips: every world-th. Returns the files of all."""
        self.requests += requests
        self._tell(complete=False)
        self._say_what_is_cut(requests)
        share = [request for request in requests[self.rank :: self.world] if not self._is_made(request)]
        size = self.flags.batch_size or self.source.recipe.validation.batch_size
        pace = Pace(len(share), self.rank == 0)
        for i in range(0, len(share), size):
            self._batch(share[i : i + size])
            pace.say(min(i + size, len(share)))
        return [name for request in requests for name in self._entry(request)["files"]]

    def keep_what_is_there(self) -> None:
        """Forget the clips that were interrupted."""
        self.requests = [request for request in self.requests if is_there(self.out, self._entry(request))]

    def _say_what_is_cut(self, requests: Sequence[Request]) -> None:
        for text in dict.fromkeys(request.prompt for request in requests) if self.rank == 0 else ():
            if lost := self.system.lost_tokens(text):
                say(f"the text encoder does not read the last {lost:,} tokens of {text[:60]!r}…")

    def _entry(self, request: Request) -> dict[str, Any]:
        return entry_of(request, self.flags.formats)

    def _is_made(self, request: Request) -> bool:
        """Whether it was made by a call before this one. The grid's are made again: it needs all their pixels."""
        return self.again and request.number >= GRID and is_there(self.out, self._entry(request))

    def _batch(self, requests: Sequence[Request]) -> None:
        ids, places = [request.id for request in requests], [request.number for request in requests]
        draw = Draw.fixed(f"sample {self.flags.seed}", ids, places, max(places) + 1, self.device)
        with autocast(self.source.recipe.loop.precision, self.device):
            clips = self.system.sample([request.prompt for request in requests], self.clip, self.sampler, draw)
        assert clips is not None
        for request, frames in zip(requests, to_uint8(clips), strict=True):
            write_clip(self.out, self._entry(request), frames, self.made_by["fps"])
            if request.number < GRID:
                self.shown[request.number] = frames

    def _tell(self, complete: bool) -> None:
        if self.rank == 0:
            write_json(self.out, json_of(self.made_by, self.requests, self.flags.formats) | {"complete": complete})

    def finish(self) -> None:
        """Bring the shares together in a grid and a sheet; log them all to the run."""
        shares = [self.shown]
        if self.world > 1:
            shares *= self.world
            dist.all_gather_object(shares, self.shown)
        if self.rank:
            return
        shown = {index: clip for part in shares for index, clip in part.items()}
        write_overview(self.out, [shown[i] for i in sorted(shown)], self.made_by["fps"], self.flags.formats)
        self._tell(complete=True)
        if self.source.run and self.flags.log and (trouble := log_to_run(self.source.run, self.out, self.flags.store)):
            say(trouble)

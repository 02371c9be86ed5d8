"""A loaded system that makes clips, whichever verb wants them: `sample` writes them as films, `eval` scores them."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from core.build import attend, place
from core.distributed import Ranks, choose_device
from core.draw import Draw
from core.errors import UserError
from core.fingerprint import prints
from core.media import to_uint8
from core.precision import DTYPES, autocast
from core.provenance import versions
from core.recipe_file import delta_flags, recipe_hash
from core.requests import Request, readable
from core.run_facts import run_facts
from core.sampling import signal_at_start
from core.slots import RECIPES, Recipe, Sampler
from core.slots.slot import to_json
from core.sources import Source, load_networks, swapped, weights_hash
from core.systems import System
from core.verbs.flags import SampleFlags
from core.weights.start import start_names

SIGNAL = 0.1
"""Share of a clip's amplitude at the first timestep from which on the samples are said to suffer."""


@dataclass
class Generator:
    """Networks on a device, and what decides which clips they make."""

    source: Source
    seed: int
    sampler: Sampler
    system: System
    clip: tuple[int, int, int]
    """Frames, height and width."""
    device: torch.device
    made_by: dict[str, Any]
    """All that decides what the clips look like, for a json."""
    rank: int = 0
    world: int = 1

    @classmethod
    def load(cls, source: Source, flags: SampleFlags, sampler: Sampler, at: tuple[int, int]) -> Generator:
        """Everything loaded and checked. `at` is the rank and the number of ranks."""
        rank, world = at
        device, recipe = choose_device(flags.device), source.recipe
        system, averaged = load_networks(source, flags.raw)
        clip = _clip_shape(flags, sampler, recipe, system)
        found = prints(recipe, system)
        notes = [*source.notes, *swapped(source, found), *_notes(source, sampler, clip, system)]
        here = {"averaged": averaged, "frozen": found, "device": device.type, "notes": notes}
        made_by = _made_by(source, flags, sampler, clip) | here
        system.mode(training=False)
        _prepare(system, recipe, flags, Ranks(device, rank, 1, None))
        return cls(source, flags.seed, sampler, system, clip, device, made_by, rank, world)

    def clips(self, requests: Sequence[Request], sampler: Sampler | None = None) -> np.ndarray:
        """Clips of some requests, (N, T, H, W, 3) uint8. A request has the same noise, whatever the sampler."""
        ids, places = [request.id for request in requests], [request.number for request in requests]
        draw = Draw.fixed(f"sample {self.seed}", ids, places, max(places) + 1, self.device)
        texts = [request.prompt for request in requests]
        with autocast(self.made_by["precision"], self.device):
            clips = self.system.sample(texts, self.clip, sampler or self.sampler, draw)
        assert clips is not None
        return to_uint8(clips)


class Pace:
    """How far it is, in a line every PAUSE seconds."""

    PAUSE = 10.0

    def __init__(self, total: int, talks: bool, what: str = "clips") -> None:
        self._total, self._talks, self._what = total, talks, what
        self._began = self._said = time.monotonic()

    def say(self, done: int) -> None:
        """`done` of what this process has to do."""
        now = time.monotonic()
        if self._talks and now - self._said >= self.PAUSE and done < self._total:
            self._said = now
            left = (now - self._began) / done * (self._total - done)
            print(f"{done} of {self._total} {self._what}, {left / 60:.1f} min left", file=sys.stderr, flush=True)


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


def say(note: str) -> None:
    """What a person should know."""
    print(f"note: {note}", file=sys.stderr, flush=True)


def from_first(value: Any, world: int) -> Any:
    """What rank 0 has, on every rank."""
    box = [value]
    if world > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def _prepare(system: System, recipe: Recipe, flags: SampleFlags, here: Ranks) -> None:
    """Networks in the precision and on the device that they sample in. Raises UserError for flags without effect."""
    if flags.merge_lora:
        having = [network for network in system.trained.values() if getattr(network, "lora", None)]
        if not having:
            raise UserError(f"--merge-lora: {recipe.name} has no LoRA")
        for network in having:
            network.merge_lora()  # type: ignore[operator]
    if flags.vae_slicing:
        sliced = [part for part in system.frozen.values() if hasattr(part, "frames_at_a_time")]
        if not sliced:
            raise UserError(f"--vae-slicing: {recipe.name} has no autoencoder of pictures; its clips are decoded whole")
        for part in sliced:
            part.frames_at_a_time = 1  # type: ignore[assignment]
    if flags.precision:
        for part in (*system.trained.values(), *system.frozen.values()):
            nn.Module.to(part, DTYPES[flags.precision])  # diffusers' own `to` warns
    if not flags.offload:
        place(system, recipe, here)
        return
    if here.device.type == "cpu":
        raise UserError("--offload: there is no device beside the host's memory here; leave it out")
    system.visits = here.device
    attend(system, recipe, here)


def _clip_shape(flags: SampleFlags, sampler: Sampler, recipe: Recipe, system: System) -> tuple[int, int, int]:
    """Frames, height and width. Raises UserError for what the networks cannot do, naming the nearest that they can."""
    trained = recipe.data.clip_shape()
    asked = (flags.frames or trained[0], flags.height or trained[1], flags.width or trained[2])
    if why := recipe.too_long(asked[0], sampler.free_noise):
        if sampler.free_noise:
            raise UserError(f"--sampler.free-noise: {why}")
        raise UserError(f"--frames {asked[0]}: {why}; for longer clips: --sampler.free-noise=FreeNoise")
    for name, value, factor in zip(("frames", "height", "width"), asked, system.multiples(), strict=True):
        if value % factor:
            nearest = max(round(value / factor), 1) * factor
            raise UserError(
                f"--{name} {value}: {recipe.name} makes multiples of {factor}; the nearest that fits is {nearest}"
            )
    return asked


def _notes(source: Source, sampler: Sampler, clip: tuple[int, int, int], system: System) -> Iterator[str]:
    """What a person should know of these samples."""
    recipe, trained = source.recipe, source.recipe.data.clip_shape()
    if not source.checkpoint and not source.weights:
        if start_names(recipe, system.trained):
            yield f"{recipe.name} has learnt nothing here: these are samples of the weights that it starts from"
        else:
            yield f"{recipe.name} has fresh weights, so these samples are noise; give --weights, or name a run"
    if clip[0] > trained[0] and not sampler.free_noise:
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
        "precision": flags.precision or source.recipe.loop.precision,
        "held_in": flags.precision,
        "versions": versions(),
    }

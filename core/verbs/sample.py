"""`sample`: new clips from a run, a checkpoint, an exported folder or a recipe."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from core.errors import UserError
from core.generation import Generator, Pace, from_first, peers, sampler_of, say
from core.requests import Request, prompts_in, readable, typed, wanted
from core.sample_files import (
    GRID,
    entry_of,
    fresh_folder,
    goes_on,
    is_there,
    kinds_of,
    write_clip,
    write_json,
    write_overview,
)
from core.sample_log import log_to_run
from core.slots import Recipe, Sampler
from core.sources import Source, find_source
from core.sources import load_trained as load_trained  # where other verbs look for it
from core.verbs.flags import SampleFlags


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
    with peers() as at:
        studio = _studio(Generator.load(source, flags, sampler, at), flags, requests)
        if flags.interactive:
            _converse(studio, flags.num or 1)
        else:
            studio.make(requests)
        studio.finish()
        return studio.out


def asked(source: Source, flags: SampleFlags) -> tuple[list[str], Sampler]:
    """The prompts and the sampler: all that can be wrong before anything is loaded. Raises UserError."""
    frames = flags.frames or source.recipe.data.clip_shape()[0]
    if frames == 1 and "png" not in flags.formats:
        raise UserError(f"--formats {' '.join(flags.formats)}: {source.recipe.name} makes pictures, which are png")
    return _texts(flags, source.recipe), sampler_of(flags, source.recipe)


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


def _studio(maker: Generator, flags: SampleFlags, requests: Sequence[Request]) -> Studio:
    """The folder found or made; the notes are said."""
    found = None
    if maker.rank == 0:
        out = fresh_folder(flags.output_dir, _default(maker.source, flags))
        found = out, goes_on(out, json_of(maker.made_by, requests, flags.formats))
    out, again = from_first(found, maker.world)
    if maker.rank == 0:
        for note in [*maker.made_by["notes"], *([f"goes on in {out}: clips that are there stay"] if again else [])]:
            say(note)
    return Studio(maker, flags, out, again)


def _default(source: Source, flags: SampleFlags) -> Path:
    """samples/ of the run, else of the working directory."""
    if source.run:
        return source.run / "samples" / f"{source.name}-seed-{flags.seed}"
    return Path("samples") / f"{source.recipe.name}-{source.name}-seed-{flags.seed}"


def json_of(made_by: dict[str, Any], requests: Sequence[Request], formats: Sequence[str]) -> dict[str, Any]:
    """The json, as long as not all clips are there."""
    kinds = kinds_of(formats, made_by["frames"])
    return {**made_by, "complete": False, "clips": [entry_of(request, kinds) for request in requests]}


@dataclass
class Studio:
    """What is made, written down."""

    maker: Generator
    flags: SampleFlags
    out: Path
    again: bool = False
    """A call that was killed has made some of the clips."""
    requests: list[Request] = field(default_factory=list)
    """All clips so far, of all ranks."""
    shown: dict[int, np.ndarray] = field(default_factory=dict)
    """The clips of the grid by number, (T, H, W, 3) uint8."""

    def make(self, requests: Sequence[Request]) -> list[str]:
        """Make and write this rank's share of the clips: every world-th. Returns the files of all."""
        self.requests += requests
        self._tell(complete=False)
        self._say_what_is_cut(requests)
        share = [request for request in requests[self.maker.rank :: self.maker.world] if not self._is_made(request)]
        size = self.flags.batch_size or self.maker.source.recipe.validation.batch_size
        pace = Pace(len(share), self.maker.rank == 0)
        for i in range(0, len(share), size):
            self._batch(share[i : i + size])
            pace.say(min(i + size, len(share)))
        return [name for request in requests for name in self._entry(request)["files"]]

    def keep_what_is_there(self) -> None:
        """Forget the clips that were interrupted."""
        self.requests = [request for request in self.requests if is_there(self.out, self._entry(request))]

    def _say_what_is_cut(self, requests: Sequence[Request]) -> None:
        for text in dict.fromkeys(request.prompt for request in requests) if self.maker.rank == 0 else ():
            if lost := self.maker.system.lost_tokens(text):
                say(f"the text encoder does not read the last {lost:,} tokens of {text[:60]!r}…")

    def _entry(self, request: Request) -> dict[str, Any]:
        return entry_of(request, kinds_of(self.flags.formats, self.maker.clip[0]))

    def _is_made(self, request: Request) -> bool:
        """Whether it was made by a call before this one. The grid's are made again: it needs all their pixels."""
        return self.again and request.number >= GRID and is_there(self.out, self._entry(request))

    def _batch(self, requests: Sequence[Request]) -> None:
        for request, frames in zip(requests, self.maker.clips(requests), strict=True):
            write_clip(self.out, self._entry(request), frames, self.maker.made_by["fps"])
            if request.number < GRID:
                self.shown[request.number] = frames

    def _tell(self, complete: bool) -> None:
        if self.maker.rank == 0:
            write_json(
                self.out, json_of(self.maker.made_by, self.requests, self.flags.formats) | {"complete": complete}
            )

    def finish(self) -> None:
        """Bring the shares together in a grid and a sheet; log them all to the run."""
        shares = [self.shown]
        if self.maker.world > 1:
            shares *= self.maker.world
            dist.all_gather_object(shares, self.shown)
        if self.maker.rank:
            return
        shown = {index: clip for part in shares for index, clip in part.items()}
        write_overview(self.out, [shown[i] for i in sorted(shown)], self.maker.made_by["fps"], self.flags.formats)
        self._tell(complete=True)
        run = self.maker.source.run
        if run and self.flags.log and (trouble := log_to_run(run, self.out, self.flags.store)):
            say(trouble)

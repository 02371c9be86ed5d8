"""`eval`: generate for captions at several guidance scales, with the same noise for a caption at each, and score.

Every rank makes and measures its share; what is on disk already is not made again. Each score stands beside what a
second real sample and one mean picture get, because a number alone says nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from core.errors import UserError
from core.evaluation.items import begin, captions_in, place_of, read_item, write_item
from core.evaluation.judges import Batch, Features, Measured, Score, as_clips, features, measure
from core.evaluation.statistics import read_statistics, write_statistics
from core.evaluation.table import PLOT, TABLE, Row, clip_mean, distances, shown, write_plot, write_table
from core.generation import Generator, Pace, from_first, peers, sampler_of, say
from core.loader import batches
from core.media import to_uint8
from core.metrics import factored_moments, moments, trivial_clips
from core.requests import Request, wanted
from core.sample_log import log_to_run
from core.slots import Sampler
from core.sources import Source
from core.validate import captions as captions_of
from core.validate import fixed_keys, real_clips
from core.verbs.flags import EvalFlags, SampleFlags
from core.verbs.printing import columns

HELD_OUT = 256
"""Captions of the held-out data that are taken where no number is said."""
MADE, REAL = "guidance", "second real sample"
LEAST = 4
"""Real samples: a distance is of two sets of two."""
TRIVIAL = {"frozen": "frozen first frame", "shuffled": "shuffled frames"}
"""Rows of what real clips score that do not move, or in no order."""
BESIDE = {"real": REAL, "shuffled": "shuffled captions"}
"""Rows of what the recipe's metric gives beside the score."""


@dataclass
class Evaluation:
    """One evaluation: what makes the clips, what judges them, and the real ones."""

    maker: Generator
    out: Path
    """The folder of the set."""
    flags: EvalFlags
    requests: list[Request]
    scales: tuple[float, ...]
    data: Any
    """The real ones; None where they are not needed."""
    by: Features
    score: Score | None

    @property
    def size(self) -> int:
        return self.flags.batch_size or self.maker.source.recipe.validation.batch_size

    @property
    def still(self) -> bool:
        return self.maker.clip[0] == 1

    @property
    def things(self) -> str:
        return "pictures" if self.still else "clips"

    @property
    def mean(self) -> str:
        """Row of what one mean picture, or clip, for all captions scores."""
        return f"mean {self.things[:-1]}"

    def share(self, items: Sequence[Any]) -> list[Any]:
        """This rank's."""
        return list(items[self.maker.rank :: self.maker.world])


def run(source: Source, flags: EvalFlags) -> Path:
    """Evaluate on the ranks that torchrun has started. Returns the folder of table and plot."""
    recipe = source.recipe
    sampling, sampler = asked(source, flags)
    data = _real_data(flags, recipe)
    requests = wanted(_captions(flags, recipe, data), 1)
    if len(requests) < 2:
        raise UserError(f"{len(requests)} captions: a distance needs at least 2")
    with peers() as at:
        maker = Generator.load(source, sampling, sampler, at)
        for note in maker.made_by["notes"] if maker.rank == 0 else ():
            say(note)
        by, score = _judges(flags, maker)
        out: Path = from_first(sampling.output_dir, maker.world)
        job = Evaluation(maker, out, flags, requests, _scales(source, flags), data, by, score)
        _make(job)
        rows = _rows(job)
        return _written(job, rows) if maker.rank == 0 else out


def asked(source: Source, flags: EvalFlags) -> tuple[SampleFlags, Sampler]:
    """How `sample` would make them: all that can be wrong before anything is loaded. Raises UserError.

    It is at the largest scale, so that one that has no effect is refused.
    """
    for flag, given in (("--captions", flags.captions), ("--clip", flags.clip)):
        if given and not source.recipe.told:
            raise UserError(f"{flag}: {source.recipe.name} is told no text")
    same = ("seed", "steps", "sampler", "raw", "batch_size", "device", "store")
    name = f"eval-{source.recipe.name}-{source.name}-seed-{flags.seed}"
    sampling = SampleFlags(
        **{field: getattr(flags, field) for field in same},
        guidance_scale=max(_scales(source, flags)),
        output_dir=flags.output_dir or (source.run or Path()) / "samples" / name,
    )
    return sampling, sampler_of(sampling, source.recipe)


def _scales(source: Source, flags: EvalFlags) -> tuple[float, ...]:
    return flags.guidance_scale or (source.recipe.validation.sampler.guidance_scale,)


def _real_data(flags: EvalFlags, recipe: Any) -> Any:
    """The data that are held against; None where captions and statistics of others stand for what is not there."""
    try:
        data = (recipe.data if flags.real == "training" else recipe.validation_data).build()
        if (there := len(fixed_keys(data, LEAST))) < LEAST:
            raise UserError(f"{there} real samples: {LEAST} are needed, for they are also held against each other")
        return data
    except UserError as error:
        if flags.statistics is None or flags.write_statistics or (recipe.told and flags.captions is None):
            raise
        say(f"no real pictures beside the scores ({error})")
        return None


def _captions(flags: EvalFlags, recipe: Any, data: Any) -> list[str]:
    if flags.captions:
        return captions_in(flags.captions)[: flags.num]
    count = flags.num or min(HELD_OUT, len(fixed_keys(data, 2 * HELD_OUT)) // 2)
    return captions_of(data, count) if recipe.told else [""] * count


def _judges(flags: EvalFlags, maker: Generator) -> tuple[Features, Score | None]:
    by = features(flags.inception, flags.i3d, maker.clip[0], maker.device)
    if flags.clip is None:
        return by, None
    from core.evaluation.clip_score import CLIPScore

    return by, CLIPScore(flags.clip).to(maker.device)


# ------------------------------------------------------------------------------------------------------------ the sets


def _make(job: Evaluation) -> None:
    """Make what is not there yet, this rank's share of it."""
    maker, facts = job.maker, dict(job.maker.made_by)
    facts["sampler"] = {k: v for k, v in facts["sampler"].items() if k != "guidance_scale"}
    facts["frozen"] = {k: {n: v for n, v in found.items() if n != "from"} for k, found in facts["frozen"].items()}
    _in_order(maker, lambda: begin(job.out, facts, job.flags.restart))
    items = [(scale, request) for scale in job.scales for request in job.requests]
    absent = [item for item in items if not place_of(job.out, *item, job.still).exists()]
    _in_order(maker, lambda: None)  # all have looked before any writes: the shares must be of one list
    if maker.rank == 0 and len(absent) < len(items):
        say(f"{len(items) - len(absent)} of {len(items)} are there already")
    mine, made = job.share(absent), 0
    pace = Pace(len(mine), maker.rank == 0, f"{job.things} made")
    for scale in job.scales:
        here = [request for at, request in mine if at == scale]
        sampler = maker.sampler.but(guidance_scale=scale)
        for i in range(0, len(here), job.size):
            part = here[i : i + job.size]
            for request, frames in zip(part, maker.clips(part, sampler), strict=True):
                write_item(place_of(job.out, scale, request, job.still), frames)
            made += len(part)
            pace.say(made)
    _in_order(maker, lambda: None)


def _in_order(maker: Generator, first: Callable[[], None]) -> None:
    """Rank 0 does something, then all go on; a mistake that it finds is everybody's."""
    found = None
    if maker.rank == 0:
        try:
            first()
        except UserError as error:
            found = str(error)
    if (found := from_first(found, maker.world)) is not None:
        raise UserError(found)
    if maker.world > 1:
        dist.barrier()


def _generated(job: Evaluation, scale: float, requests: Sequence[Request]) -> Iterator[Batch]:
    for i in range(0, len(requests), job.size):
        part = requests[i : i + job.size]
        frames = [read_item(place_of(job.out, scale, request, job.still)) for request in part]
        yield as_clips(frames), [request.prompt for request in part]


def _real(job: Evaluation, keys: list[Any]) -> Iterator[Batch]:
    """Rounded to whole levels, as what is generated is, and as published distances have it."""
    parts = [keys[i : i + job.size] for i in range(0, len(keys), job.size)]
    for batch in batches(job.data, parts, workers=0, pin=False):
        clips = as_clips([*to_uint8(batch["pixel_values"])])
        yield clips, batch.get("caption", [""] * len(clips))


def _measured(job: Evaluation, name: str, items: Sequence[Any], found: Iterator[Batch]) -> Measured:
    """All ranks' shares of a set together; `items` are this rank's."""
    pace = Pace(len(items), job.maker.rank == 0, f"{job.things} measured ({name})")
    return _joined(job, measure(_told(found, pace), job.by, job.score, job.maker.device))


def _told(found: Iterator[Batch], pace: Pace) -> Iterator[Batch]:
    """The same, with how far it is."""
    done = 0
    for batch in found:
        yield batch
        done += len(batch[0])
        pace.say(done)


def _joined(job: Evaluation, mine: Measured) -> Measured:
    parts: list[Any] = [mine]
    if job.maker.world > 1:
        parts = [None] * job.maker.world
        dist.all_gather_object(parts, mine)
    return Measured.joined(parts)


# ---------------------------------------------------------------------------------------------------------- the scores


def _rows(job: Evaluation) -> list[Row]:
    """A row a guidance scale, then the baselines."""
    mine = job.share(job.requests)
    sets: list[tuple[str, float | None, Measured]] = [
        (name := f"{MADE} {scale:g}", scale, _measured(job, name, mine, _generated(job, scale, mine)))
        for scale in job.scales
    ]
    real = None
    if job.data is not None:
        keys = fixed_keys(job.data, 2 * len(job.requests))
        half = len(keys) // 2
        real = _measured(job, "real", job.share(keys[:half]), _real(job, job.share(keys[:half])))
        sets += [(name, None, found) for name, found in _baselines(job, real, keys[half:])]
    given = None
    if job.flags.statistics:
        given = factored_moments(*read_statistics(job.flags.statistics, sets[0][2].features.shape[1]))
    if job.flags.write_statistics and real is not None and job.maker.rank == 0:
        write_statistics(job.flags.write_statistics, *moments(real.features))
    rows: list[Row] = [
        {"set": name, "guidance": scale, "count": found.count, **distances(found, real, given, job.by)}
        | clip_mean(found)
        for name, scale, found in sets
    ]
    return _with_attributes(job, rows) if job.maker.rank == 0 else rows


def _baselines(job: Evaluation, real: Measured, second: Sequence[Any]) -> Iterator[tuple[str, Measured]]:
    """What needs no model, beside a second real sample."""
    mine = job.share(second)
    yield REAL, _measured(job, REAL, mine, _real(job, mine))
    yield job.mean, _mean_picture(job, real)
    for name, row in {} if job.still else TRIVIAL.items():
        clips = ((trivial_clips(batch)[name], texts) for batch, texts in _real(job, mine))
        yield row, _measured(job, row, mine, clips)


def _mean_picture(job: Evaluation, real: Measured) -> Measured:
    """One picture, the mean of the real ones, for every caption of theirs."""
    assert real.total is not None
    mean = torch.from_numpy(real.total / real.count / 127.5 - 1).float()[None]
    mine = job.share(real.captions)
    alone = measure([(mean, [""])], job.by, None, job.maker.device)  # all have its features
    told = [mine[i : i + job.size] for i in range(0, len(mine), job.size)] if job.score else []
    pictures = ((mean.expand(len(texts), -1, -1, -1, -1), texts) for texts in told)
    scored = measure(pictures, None, job.score, job.maker.device)
    return _joined(job, Measured(np.repeat(alone.features, len(mine), 0), scored.clip, None, mine))


def _with_attributes(job: Evaluation, rows: list[Row]) -> list[Row]:
    """The recipe's own metric, where it has one, of every scale; of the last one with shuffled captions too."""
    slot = job.maker.source.recipe.validation.metric
    if slot is None or job.data is None:
        return rows
    real = real_clips(job.data, len(job.requests))
    texts, told = [request.prompt for request in job.requests], captions_of(job.data, len(real))
    named = {row["set"]: row for row in rows}
    for scale in job.scales:
        made = torch.cat([clips for clips, _ in _generated(job, scale, job.requests)])
        for name, value in slot.build()(made, texts, real, told).items():
            attribute, _, which = name.partition("_score")
            place = ({"mean_clip": job.mean} | BESIDE)[which[1:]] if which else f"{MADE} {scale:g}"
            named.setdefault(place, {"set": place, "guidance": None})[attribute] = value
    return list(named.values())


def _written(job: Evaluation, rows: list[Row]) -> Path:
    """Table and plot, in a folder of their own that is logged to the run."""
    folder = job.out / "scores"
    folder.mkdir(exist_ok=True)
    write_table(folder / TABLE, rows)
    write_plot(folder / PLOT, rows, job.by.distance)
    print("\n".join(columns(shown(rows))))
    run = job.maker.source.run
    if run and job.flags.log:
        trouble = log_to_run(run, folder, job.flags.store, f"eval/{job.out.name}")
        if trouble:
            say(trouble)
    return folder

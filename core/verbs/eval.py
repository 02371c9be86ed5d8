"""`eval`: generate for captions at several guidance scales, with the same noise for a caption at each, and score.

Every rank makes and measures its share; what is on disk already is not made again. Each score stands beside what a
second real sample and one mean picture get, because a number alone says nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from core.errors import UserError
from core.evaluation.items import begin, captions_in, place_of, read_item, write_item
from core.evaluation.judges import Batch, Features, Measured, Score, as_clips, features, measure
from core.evaluation.statistics import read_statistics, write_statistics
from core.evaluation.table import PLOT, TABLE, Row, clip_mean, distances, shown, write_plot, write_table
from core.loader import batches
from core.metrics import moments
from core.requests import Request, wanted
from core.sample_files import log_to_run
from core.sources import Source
from core.validate import captions as captions_of
from core.validate import fixed_keys, real_clips
from core.verbs.flags import EvalFlags, SampleFlags
from core.verbs.printing import columns
from core.verbs.sample import Studio, open_studio, peers, sampler_of

HELD_OUT = 256
"""Captions of the held-out data that are taken where no number is said."""
MADE, REAL, MEAN = "guidance", "second real sample", "mean picture"
BESIDE = {"real": REAL, "mean_clip": MEAN, "shuffled": "shuffled captions"}
"""Rows of what the recipe's metric gives beside the score."""


@dataclass
class Evaluation:
    """One evaluation: what makes the clips, what judges them, and the real ones."""

    studio: Studio
    flags: EvalFlags
    requests: list[Request]
    scales: tuple[float, ...]
    data: Any
    """Held-out data; None where they are not needed."""
    by: Features
    score: Score | None

    @property
    def size(self) -> int:
        return self.flags.batch_size or self.studio.source.recipe.validation.batch_size

    @property
    def still(self) -> bool:
        return self.studio.clip[0] == 1

    def share(self, items: Sequence[Any]) -> list[Any]:
        """This rank's."""
        return list(items[self.studio.rank :: self.studio.world])


def run(source: Source, flags: EvalFlags) -> Path:
    """Evaluate on the ranks that torchrun has started. Returns the folder of table and plot."""
    recipe = source.recipe
    scales = flags.guidance_scale or (recipe.validation.sampler.guidance_scale,)
    asked = _sample_flags(source, flags, max(scales))
    sampler = sampler_of(asked, recipe)
    data = _held_out(flags, recipe)
    requests = wanted(_captions(flags, recipe, data), 1)
    if len(requests) < 2:
        raise UserError(f"{len(requests)} captions: a distance needs at least 2")
    with peers() as (rank, world):
        studio = open_studio(source, asked, sampler, rank, world)
        by, score = _judges(flags, studio)
        job = Evaluation(studio, flags, requests, scales, data, by, score)
        _make(job)
        rows = _rows(job)
        return _written(job, rows) if rank == 0 else studio.out


def _sample_flags(source: Source, flags: EvalFlags, scale: float) -> SampleFlags:
    """How `sample` would make them. At the largest scale, so that one that has no effect is refused."""
    same = ("seed", "steps", "sampler", "raw", "batch_size", "device", "store")
    out = (
        flags.output_dir
        or (source.run or Path()) / "samples" / f"eval-{source.recipe.name}-{source.name}-seed-{flags.seed}"
    )
    return SampleFlags(**{name: getattr(flags, name) for name in same}, guidance_scale=scale, output_dir=out)


def _held_out(flags: EvalFlags, recipe: Any) -> Any:
    """The held-out data, unless captions and statistics of others stand for them and they are not there."""
    try:
        return recipe.validation_data.build()
    except UserError as error:
        if flags.statistics is None or (recipe.told and flags.captions is None):
            raise
        print(f"note: no real pictures beside the scores ({error})", file=sys.stderr, flush=True)
        return None


def _captions(flags: EvalFlags, recipe: Any, data: Any) -> list[str]:
    if flags.captions and not recipe.told:
        raise UserError(f"--captions: {recipe.name} is told no text")
    if flags.captions:
        return captions_in(flags.captions)[: flags.num]
    count = flags.num or min(HELD_OUT, len(fixed_keys(data, 2 * HELD_OUT)) // 2)
    return captions_of(data, count) if recipe.told else [""] * count


def _judges(flags: EvalFlags, studio: Studio) -> tuple[Features, Score | None]:
    by = features(flags.inception, flags.i3d, studio.clip[0], studio.device)
    if flags.clip is None:
        return by, None
    if not studio.source.recipe.told:
        raise UserError(f"--clip: {studio.source.recipe.name} is told no text")
    from core.evaluation.clip_score import CLIPScore

    return by, CLIPScore(flags.clip).to(studio.device)


# ------------------------------------------------------------------------------------------------------------ the sets


def _make(job: Evaluation) -> None:
    """Make what is not there yet, this rank's share of it."""
    studio, facts = job.studio, dict(job.studio.made_by)
    facts["sampler"] = {k: v for k, v in facts["sampler"].items() if k != "guidance_scale"}
    _in_order(studio, lambda: begin(studio.out, facts, job.flags.restart))
    items = [(scale, request) for scale in job.scales for request in job.requests]
    absent = [item for item in items if not place_of(studio.out, *item, job.still).exists()]
    _in_order(studio, lambda: None)  # all have looked before any writes: the shares must be of one list
    if studio.rank == 0 and len(absent) < len(items):
        print(f"note: {len(items) - len(absent)} of {len(items)} are there already", file=sys.stderr, flush=True)
    for scale in job.scales:
        mine = [request for at, request in job.share(absent) if at == scale]
        sampler = studio.sampler.but(guidance_scale=scale)
        for i in range(0, len(mine), job.size):
            part = mine[i : i + job.size]
            for request, frames in zip(part, studio.clips(part, sampler), strict=True):
                write_item(place_of(studio.out, scale, request, job.still), frames)
    _in_order(studio, lambda: None)


def _in_order(studio: Studio, first: Any) -> None:
    """Rank 0 does something, then all go on; a mistake that it finds is everybody's."""
    box: list[Any] = [None]
    if studio.rank == 0:
        try:
            first()
        except UserError as error:
            box = [str(error)]
    if studio.world > 1:
        dist.broadcast_object_list(box, src=0)
        dist.barrier()
    if box[0] is not None:
        raise UserError(box[0])


def _generated(job: Evaluation, scale: float, requests: Sequence[Request]) -> Iterator[Batch]:
    for i in range(0, len(requests), job.size):
        part = requests[i : i + job.size]
        frames = [read_item(place_of(job.studio.out, scale, request, job.still)) for request in part]
        yield as_clips(frames), [request.prompt for request in part]


def _real(job: Evaluation, keys: list[Any]) -> Iterator[Batch]:
    parts = [keys[i : i + job.size] for i in range(0, len(keys), job.size)]
    for batch in batches(job.data, parts, workers=0, pin=False):
        yield batch["pixel_values"], batch.get("caption", [""] * len(batch["pixel_values"]))


def _measured(job: Evaluation, found: Iterator[Batch]) -> Measured:
    """All ranks' shares of a set together."""
    mine = measure(found, job.by, job.score, job.studio.device)
    parts: list[Any] = [mine]
    if job.studio.world > 1:
        parts = [None] * job.studio.world
        dist.all_gather_object(parts, mine)
    return Measured.joined(parts)


# ---------------------------------------------------------------------------------------------------------- the scores


def _rows(job: Evaluation) -> list[Row]:
    """A row a guidance scale, then the baselines."""
    count = len(job.requests)
    sets: list[tuple[str, float | None, Measured]] = [
        (f"{MADE} {scale:g}", scale, _measured(job, _generated(job, scale, job.share(job.requests))))
        for scale in job.scales
    ]
    real = None
    if job.data is not None:
        keys = fixed_keys(job.data, 2 * count)
        half = len(keys) // 2
        real = _measured(job, _real(job, job.share(keys[:half])))
        sets.append((REAL, None, _measured(job, _real(job, job.share(keys[half:])))))
        sets.append((MEAN, None, _mean_picture(job, real, keys[:half])))
    given = read_statistics(job.flags.statistics, sets[0][2].features.shape[1]) if job.flags.statistics else None
    if job.flags.write_statistics and real is not None and job.studio.rank == 0:
        write_statistics(job.flags.write_statistics, *moments(real.features))
    rows: list[Row] = [
        {"set": name, "guidance": scale, "count": found.count, **distances(found, real, given, job.by)}
        | clip_mean(found)
        for name, scale, found in sets
    ]
    return _with_attributes(job, rows) if job.studio.rank == 0 else rows


def _mean_picture(job: Evaluation, real: Measured, keys: Sequence[Any]) -> Measured:
    """One picture, the mean of the real ones, for every caption of theirs."""
    assert real.total is not None
    mean = torch.from_numpy(real.total / real.count / 127.5 - 1).float()[None]
    mine = job.share(keys)
    told = [""] * len(mine) if job.score is None else [text for _, part in _real(job, mine) for text in part]
    parts = [told[i : i + job.size] for i in range(0, len(told), job.size)]
    return _measured(job, ((mean.expand(len(part), -1, -1, -1, -1), part) for part in parts))


def _with_attributes(job: Evaluation, rows: list[Row]) -> list[Row]:
    """The recipe's own metric, where it has one, of every scale; of the last one with shuffled captions too."""
    slot = job.studio.source.recipe.validation.metric
    if slot is None or job.data is None:
        return rows
    real = real_clips(job.data, len(job.requests))
    texts, told = [request.prompt for request in job.requests], captions_of(job.data, len(real))
    named = {row["set"]: row for row in rows}
    for scale in job.scales:
        made = torch.cat([clips for clips, _ in _generated(job, scale, job.requests)])
        for name, value in slot.build()(made, texts, real, told).items():
            attribute, _, which = name.partition("_score")
            place = BESIDE[which[1:]] if which else f"{MADE} {scale:g}"
            named.setdefault(place, {"set": place, "guidance": None})[attribute] = value
    return list(named.values())


def _written(job: Evaluation, rows: list[Row]) -> Path:
    """Table and plot, in a folder of their own that is logged to the run."""
    folder = job.studio.out / "scores"
    folder.mkdir(exist_ok=True)
    write_table(folder / TABLE, rows)
    write_plot(folder / PLOT, rows, job.by.distance)
    print("\n".join(columns(shown(rows))))
    run = job.studio.source.run
    if run and job.flags.log:
        log_to_run(run, folder, job.flags.store, f"eval/{job.studio.out.name}")
    return folder

"""The verb `data`: parts of captioned pictures made, listed and converted; a recipe's data read and counted, planned
into buckets, or what is frozen computed of them once. What does the work on data is handed in.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from core.cli import parse
from core.errors import UserError, did_you_mean
from core.slots import Recipe
from core.verbs.flags import VerbFlags

SHOWN = 5  # skipped records that are named


class MakeFlags(VerbFlags):
    """Flags of `data make laion`."""

    out: Path | None = None
    """Folder to write; it must be new or empty."""
    records: int = 1000
    """Pictures, at most."""
    parts: int = 4
    """Files that they are spread over."""
    size: int = 256
    """Height and width of synthetic pictures."""
    seed: int = 0
    """Another seed, other synthetic pictures."""
    plain: bool = False
    """Write text as it is, not gzip."""
    pictures: Path | None = None
    """Take the pictures of this folder, and their captions (a.txt beside a.jpg), instead of synthetic ones."""

    def check(self) -> None:
        for name in ("records", "parts", "size"):
            if getattr(self, name) < 1:
                self.refuse(name, "must be at least 1")


class ListFlags(VerbFlags):
    """Flags of `data list laion`."""

    to: Path | None = None
    """Folder to write the lists into. None: the folder of the parts."""
    format: str = "laion400m"
    """What the lists say of the parts: laion400m, laion_aes, webdataset, or columns: caption=0,image=2."""
    overwrite: bool = False
    """Replace lists that are there."""


class ConvertFlags(VerbFlags):
    """Flags of `data convert`."""

    to: Path | None = None
    """Folder to write; it must be new or empty."""
    root: Path | None = None
    """Folder that the parts are below. None: that of the list."""
    format: str = "laion400m"
    """Of lists that state none: laion400m, laion_aes, or columns: caption=0,image=2."""
    records: int = 10_000
    """Records of a shard, at most."""

    def check(self) -> None:
        if self.records < 1:
            self.refuse("records", "must be at least 1")


class CheckFlags(VerbFlags):
    """Flags of `data check`, beside the recipe's."""

    samples: int | None = 256
    """Samples that are read, of the training data and of the held-out ones. None: every one."""

    def check(self) -> None:
        if self.samples is not None and self.samples < 1:
            self.refuse("samples", "must be at least 1, or None for every one")


class CacheFlags(VerbFlags):
    """Flags of `data cache`, beside the recipe's."""

    to: Path | None = None
    """Folder of the cache. None: caches/<recipe>. One that was not finished is gone on with."""
    draws: int = 1
    """Times that each sample is kept: crops, first frames and flips of the first epochs, then over and over. One is all
    where nothing of these is random."""
    samples_per_shard: int = 256
    """What is lost by a kill, at most, of each process."""
    nproc: int = 1
    """Processes on this machine (torchrun), which share the shards."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one."""

    def check(self) -> None:
        for name in ("draws", "samples_per_shard", "nproc"):
            if getattr(self, name) < 1:
                self.refuse(name, "must be at least 1")


class PlanFlags(VerbFlags):
    """Flags of `data plan`, beside the recipe's."""


class Work(NamedTuple):
    """What the verb is handed.

    `make(out, …)` yields name and records of each part; `write_lists(folder, to, …)` gives the list of lists and the
    number of parts; `convert(list, root, format, to, records)` gives the shards that it yields and the records that it
    skipped; `check(dataset, seed, count)` reads samples and counts; `get` makes a recipe of its name.
    """

    make: Callable[..., Iterable[tuple[str, int]]]
    write_lists: Callable[..., tuple[Path, int]]
    convert: Callable[..., tuple[Iterable[tuple[str, int]], list[tuple[str, str]]]]
    check: Callable[[Any, int, int | None], Any]
    get: Callable[[str], Recipe]


FLAGS: dict[str, type[VerbFlags]] = {
    "make": MakeFlags,
    "list": ListFlags,
    "convert": ConvertFlags,
    "check": CheckFlags,
    "cache": CacheFlags,
    "plan": PlanFlags,
}


def read(words: list[str]) -> tuple[str, str, Any]:
    """What is to be done, to what, and the flags. Raises UserError."""
    what, where, *rest = words
    if what not in FLAGS:
        raise UserError(f"data {what}: unknown{did_you_mean(what, FLAGS)}; {', '.join(FLAGS)}")
    if what in ("make", "list") and where != "laion":
        raise UserError(f"data {what} {where}: only laion can be made and listed{did_you_mean(where, ['laion'])}")
    folder = rest.pop(0) if what == "list" and rest and not rest[0].startswith("-") else where
    (flags,) = parse(rest, FLAGS[what]())
    return what, folder, flags


def data(words: list[str], work: Work) -> int:
    """Do what the words say."""
    if words[0] == "check":
        recipe, flags = parse(words[2:], work.get(words[1]), CheckFlags())
        return _check(recipe, flags, work)
    if words[0] == "cache":
        recipe, cached = parse(words[2:], work.get(words[1]), CacheFlags())
        return _cache(recipe, cached, words)
    if words[0] == "plan":
        (recipe,) = parse(words[2:], work.get(words[1]))
        return _plan(recipe)
    what, where, flags = read(words)
    do: dict[str, Callable[[Path, Any, Work], int]] = {"make": _make, "list": _list, "convert": _convert}
    return do[what](Path(where).expanduser(), flags, work)


def _make(where: Path, flags: MakeFlags, work: Work) -> int:
    if flags.out is None:
        raise UserError("data make laion: --out DIR says where the parts go")
    arguments = flags.arguments() | {"out": flags.out}
    total = _told(flags.out, work.make(**arguments))
    print(f"{flags.out}: {total} records; --data-root {flags.out} trains on them")
    return 0


def _list(where: Path, flags: ListFlags, work: Work) -> int:
    if where == Path("laion"):
        raise UserError(
            "data list laion needs the folder of the parts, for example: data list laion datasets/laion400m"
        )
    path, parts = work.write_lists(where, **flags.arguments())
    named = f" --data.file-list {path}" if flags.to else ""
    print(f"{path}: {parts} parts; --data-root {where}{named} trains on them")
    return 0


def _convert(where: Path, flags: ConvertFlags, work: Work) -> int:
    if flags.to is None:
        raise UserError("data convert: --to DIR says where the shards go")
    shards, skipped = work.convert(where, flags.root, flags.format, flags.to, flags.records)
    total = _told(flags.to, shards)
    print(f"{flags.to}: {total} records, {len(skipped)} skipped; --data-root {flags.to} trains on them")
    for name, reason in skipped[:SHOWN]:
        print(f"  {name}: {reason}")
    return 0


def _check(recipe: Recipe, flags: CheckFlags, work: Work) -> int:
    """Both parts of a recipe's data; 1 where more of them are bad than a run would bear."""
    worst = 0
    for part, slot in (("training", recipe.data), ("held out", recipe.validation_data)):
        dataset = slot.build()
        described = dataset.describe()
        print(f"{recipe.name}, {part}: {described.pop('samples'):,} samples")
        for name, value in described.items():
            print(f"  {name}: {value}")
        found = work.check(dataset, recipe.loop.seed, flags.samples)
        limit = getattr(slot, "max_bad_share", 0.0)
        print(
            f"  read: {found.read:,}, bad: {found.bad.total():,} ({found.share():.1%}; a run stops above {limit:.1%})"
        )
        for kind, count in found.bad.most_common():
            print(f"    {count:,} {kind}, the first: {found.examples[kind]}")
        if found.captions["captions"]:
            print(f"  captions: {found.captions['empty']:,} empty, {found.captions['sided']:,} speak of sides")
        worst = max(worst, int(found.share() > limit))
    return worst


def _cache(recipe: Recipe, flags: CacheFlags, words: list[str]) -> int:
    """Cache what is frozen, on this process or several."""
    from core.caches.facts import refuse_what_has_no_latents
    from core.preflight import preflight

    if flags.nproc > 1 and "WORLD_SIZE" not in os.environ:
        refuse_what_has_no_latents(recipe)
        preflight(recipe)  # said once, not by each process
        from core.verbs.run import torchrun

        return torchrun(flags.nproc, ["data", *words])
    from core.caches.write import make

    to = flags.to or Path("caches") / recipe.name
    say = functools.partial(print, flush=True)
    whole = make(recipe, to, draws=flags.draws, samples_per_shard=flags.samples_per_shard, device=flags.device, say=say)
    if whole:
        print(f"{to} is whole: python -m registry run {recipe.name} --cache {to} trains from it")
    return 0


def _plan(recipe: Recipe) -> int:
    """The table of buckets and dropped records, and the updates that an epoch has."""
    dataset = recipe.data.build()
    if not recipe.data.many_shapes:
        raise UserError(f"data plan: {recipe.name}: {type(recipe.data).__name__} has no buckets; data check reads it")
    for line in dataset.lines():
        print(line)
    updates = dataset.updates(recipe.loop.seed, recipe.loop.global_batch)
    print(f"an epoch: {updates.updates_in(0):,} updates")
    print(f"index: {dataset.planned.folder}")
    return 0


def _told(folder: Path, written: Iterable[tuple[str, int]]) -> int:
    """Say what was written, as it is written; the sum."""
    total = 0
    for name, records in written:
        print(f"{folder / name}: {records} records", flush=True)
        total += records
    return total

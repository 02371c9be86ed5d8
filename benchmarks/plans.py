"""Planning and buckets: speed against a loop over records, and both originals' updates on the same list.

The originals' samplers are written here from their description (Open-Sora sheet §5), as plain baselines.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from benchmarks.measure import Row, alternate
from core.hashing import mix64_array
from data.plan import declared
from data.plan.rules import Planner
from data.plan.sources import batch_of
from data.plan.updates import Updates, costs, micro_of, update_sizes
from data.slots import BucketedVideos, Buckets

RECORDS = 1 << 16
MILLION = 1_000_000
SIZES = ((720, 1280), (1080, 1920), (480, 640), (512, 512), (1280, 720), (360, 640))
RULES = BucketedVideos(num_frames=93, drop_short_ratio=0.5, max_hxw=236544, min_hxw=102400)
MIX = {(93, 352, 640): 4000, (61, 352, 640): 2500, (29, 352, 640): 1800, (1, 352, 640): 3001}
"""The sheet's list (§5.3): shape → samples."""
HPC_BATCH = {93: 1, 61: 2, 29: 4, 1: 32}
BUDGET = 21_120 * 16
"""Tokens of an update on 8 ranks: two samples of 93 frames a rank; on 64 ranks eight times that."""


def rows() -> list[Row]:
    """Seconds for a million records; then figures of the updates, of which 1 (or 0 samples lost) is the best."""
    return [_speed(), _lookup(), *(row for ranks in (8, 64) for row in _compared(ranks))]


# ---- speed ----------------------------------------------------------------------------------------------------------


def _speed() -> Row:
    records = _records()
    batch = batch_of(0, records)
    hashes = mix64_array(np.arange(len(records), dtype=np.uint64))
    wanted: dict[str, Any] = {}

    def ours() -> None:
        wanted["ours"] = int((Planner(RULES).shapes(batch, hashes).reason == 0).sum())

    def loop() -> None:
        chances = np.random.default_rng(0).random(len(records)).tolist()
        wanted["loop"] = sum(_one(record, chance) is not None for record, chance in zip(records, chances, strict=True))

    this, limit = alternate(ours, loop, 3)
    assert abs(wanted["ours"] - wanted["loop"]) < 0.02 * len(records)  # they draw different short clips
    scale = MILLION / len(records)
    return Row("a million records planned / a loop over them", this * scale, limit * scale, "s", "")


TABLE = {
    "256px": {1: [1.0, 45]} | {frames: [1.0, 6] for frames in range(5, 130, 4)},
    "768px": {1: [0.5, 13]},
    "1024px": {1: [0.5, 7]},
}
"""Of the second project's 2.0, first stage (§5.2)."""


def _lookup() -> Row:
    """Placing clips in a declared table, in columns and one by one."""
    table = declared.table(TABLE, "2.0")
    rng = np.random.default_rng(1)
    sizes = np.array(SIZES)[rng.integers(0, len(SIZES), RECORDS)]
    clips = declared.Clips(rng.integers(1, 200, RECORDS), sizes[:, 0].astype(float), sizes[:, 1].astype(float))
    chances = rng.random((len(table.cells), RECORDS))
    one_by_one = list(zip(*(column.tolist() for column in clips), chances.T.tolist(), strict=True))
    found: dict[str, list[int]] = {}

    def ours() -> None:
        found["ours"] = declared.place(table, clips, 1, lambda rows, number, _: chances[number, rows]).tolist()

    def loop() -> None:
        found["loop"] = [_placed(table, *clip) for clip in one_by_one]

    this, limit = alternate(ours, loop, 3)
    assert found["ours"] == found["loop"]
    scale = MILLION / RECORDS
    return Row("a million placed in a declared table / a loop", this * scale, limit * scale, "s", "<= 0.2")


def _placed(table: declared.Table, frames: int, height: float, width: float, chances: list[float]) -> int:
    taken = None
    for number, cell in enumerate(table.cells):
        if cell.resolution == taken or height * width < declared.NEAR * table.pixels[cell.resolution]:
            continue
        if (frames == 1) != (cell.frames == 1) or frames < cell.frames:
            continue
        if cell.take < 1 and chances[number] >= cell.take:
            taken = cell.resolution  # the length was found, and the resolution does not take it
            continue
        far = [abs(height / width - tall) for tall in table.tall[cell.resolution]]
        return table.first(number) + far.index(min(far))
    return -1


def _records() -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    sizes, frames = rng.integers(0, len(SIZES), RECORDS).tolist(), rng.integers(20, 400, RECORDS).tolist()
    rates = rng.choice([24, 25, 29.97, 30, 60], RECORDS).tolist()
    return [
        {
            "path": f"{n:07}.mp4" if n % 4 else f"{n:07}.jpg",
            "cap": f"caption {n}",
            "resolution": dict(zip(("height", "width"), SIZES[size], strict=True)),
            "num_frames": count,
            "fps": rate,
        }
        for n, (size, count, rate) in enumerate(zip(sizes, frames, rates, strict=True))
    ]


def _one(record: dict[str, Any], chance: float) -> tuple[int, int, int] | None:
    """The shape of one record by the same rules, in plain Python."""
    height, width = record["resolution"]["height"], record["resolution"]["width"]
    scale = min(1.0, math.sqrt(RULES.max_hxw / (height * width)))  # type: ignore[operator]
    high = math.floor(height * scale + 1e-6) // RULES.hw_stride * RULES.hw_stride
    wide = math.floor(width * scale + 1e-6) // RULES.hw_stride * RULES.hw_stride
    if high * wide < RULES.least_area() or not 1 / RULES.max_aspect <= height / width <= RULES.max_aspect:
        return None
    if record["path"].endswith(".jpg"):
        return 1, high, wide
    rate = record["fps"] / RULES.train_fps
    if record["num_frames"] > 5 * RULES.num_frames * rate:
        return None
    count = math.ceil(record["num_frames"] / (1.0 if abs(record["fps"] - RULES.train_fps) < 0.1 else rate))
    if count < RULES.num_frames and chance < RULES.drop_short_ratio:
        return None
    length = (min(count, RULES.num_frames) - 1) // 4 * 4 + 1
    return (length, high, wide) if length >= 29 else None


# ---- updates --------------------------------------------------------------------------------------------------------


class Figures(NamedTuple):
    """balance: work over what the slowest rank makes of it; spread: the dearest step over the cheapest; lost: samples
    that no step of the epoch has.
    """

    balance: float
    spread: float
    lost: int


def _tokens(shape: tuple[int, int, int]) -> int:
    return ((shape[0] - 1) // 4 + 1) * (shape[1] // 16) * (shape[2] // 16)


def _figures(steps: list[list[list[int]]], shapes: list[tuple[int, int, int]]) -> Figures:
    """`steps`: samples by step and rank."""
    cost = np.array([_tokens(shape) for shape in shapes])
    slowest = [max(int(cost[batch].sum()) for batch in step) for step in steps]
    done = sum(int(cost[batch].sum()) for step in steps for batch in step)
    seen = {sample for step in steps for batch in step for sample in batch}
    return Figures(done / (len(steps[0]) * sum(slowest)), max(slowest) / min(slowest), len(shapes) - len(seen))


def _compared(ranks: int) -> list[Row]:
    shapes = [shape for shape, count in MIX.items() for _ in range(count)]
    ours, padding = _figures(_ours(shapes, ranks), shapes), _padding(shapes)
    rows = [Row("  useless tokens, buckets / one padded envelope", 0.0, padding, "", "0")] if ranks == 8 else []
    for name, steps in (("OSP groups", _groups(shapes, ranks, 2)), ("HPC buckets", _hpc(shapes, ranks))):
        theirs = _figures(steps, shapes)
        rows += [
            Row(f"  imbalance on {ranks} ranks / {name}", 1 - ours.balance, 1 - theirs.balance or 1e-9, "", "<= 1"),
            Row(f"  dearest step over the cheapest / {name}", ours.spread, theirs.spread, "", "<= 1"),
            Row(f"  samples lost in an epoch / {name}", ours.lost, theirs.lost or 1e-9, "", "<= 1"),
        ]
    return rows


def _padding(shapes: list[tuple[int, int, int]]) -> float:
    """Share of tokens that are padding when every sample is padded to the largest."""
    cost = np.array([_tokens(shape) for shape in shapes])
    return float(1 - cost.sum() / (cost.max() * len(cost)))


class _List:
    """A plain list of shapes as the updates want it."""

    fixed = True

    def __init__(self, shapes: list[tuple[int, int, int]]) -> None:
        known = list(dict.fromkeys(shapes))
        self.shapes = np.array(known)
        self.own = np.array([known.index(shape) for shape in shapes])

    def hashes(self) -> np.ndarray:
        return mix64_array(np.arange(len(self.own), dtype=np.uint64))

    def images(self) -> np.ndarray:
        return self.shapes[:, 0] == 1

    def buckets(self, seed: int, epoch: int) -> np.ndarray:
        return self.own

    def item(self, number: np.ndarray, bucket: int) -> np.ndarray:
        return number + len(self.own) * (bucket + 1)


def _ours(shapes: list[tuple[int, int, int]], ranks: int) -> list[list[list[int]]]:
    """An epoch by token budget; what is carried into the next one counts as done there."""
    data = _List(shapes)
    slot = Buckets(batch="tokens", budget=BUDGET * ranks // 8, multiple=ranks)
    cost = costs(slot, np.array([_tokens(tuple(shape)) for shape in data.shapes.tolist()]))
    names = ["x".join(map(str, shape)) for shape in data.shapes.tolist()]
    found = Updates(data, slot, update_sizes(slot, names, cost, ranks, None), cost, 0)
    micro, steps, position = micro_of(slot, 1 << 30), [], (0, 0)
    while position[0] == 0 and position[1] < int(found.epoch(0).ends[-1]):
        keys, position = found.update(position)
        size = found.micro_batch(keys, ranks, micro)
        items = [key[2] % len(shapes) for key in keys]
        steps.append([items[rank * size : (rank + 1) * size] for rank in range(ranks)])
    return steps


def _groups(shapes: list[tuple[int, int, int]], ranks: int, batch: int) -> list[list[list[int]]]:
    """Open-Sora-Plan's: shapes by falling count, shuffled within, cut into megabatches; mixed chunks are repaired by
    repeats of their most frequent shape.
    """
    rng = np.random.default_rng(42)
    counts = Counter(shapes)
    ordered: list[int] = []
    for shape in sorted(counts, key=lambda s: -counts[s]):
        ordered += rng.permutation([n for n, other in enumerate(shapes) if other == shape]).tolist()
    mega = batch * ranks
    steps = []
    for start in range(0, len(ordered), mega):
        part = ordered[start : start + mega]
        chunks = [part[rank::ranks] for rank in range(ranks)]
        chunks = [chunk or chunks[0] for chunk in chunks]
        steps.append([_repaired(chunk, batch, shapes, rng) for chunk in chunks])
    return [steps[n] for n in rng.permutation(len(steps))]


def _repaired(chunk: list[int], batch: int, shapes: list[tuple[int, int, int]], rng: np.random.Generator) -> list[int]:
    most = Counter(shapes[n] for n in chunk).most_common(1)[0][0]
    same = [n for n in chunk if shapes[n] == most]
    return same + rng.choice(same, batch - len(same)).tolist()


def _hpc(shapes: list[tuple[int, int, int]], ranks: int) -> list[list[list[int]]]:
    """Open-Sora's: each bucket cut into batches of its own size, the remainder dropped; all batches shuffled and dealt,
    so that ranks work on different buckets.
    """
    rng = np.random.default_rng(0)
    batches: list[list[int]] = []
    for shape in dict.fromkeys(shapes):
        members = rng.permutation([n for n, other in enumerate(shapes) if other == shape]).tolist()
        size = HPC_BATCH[shape[0]]
        batches += [members[start : start + size] for start in range(0, len(members) - size + 1, size)]
    dealt = [batches[n] for n in rng.permutation(len(batches))][: len(batches) // ranks * ranks]
    return [dealt[start : start + ranks] for start in range(0, len(dealt), ranks)]

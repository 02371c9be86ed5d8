"""Which samples make which update, where every update is of one bucket: computed from (seed, position), never replayed.

A bucket has a stream: epoch after epoch, its members in the order of a hash of (seed, epoch, id). An update takes the
next samples of one bucket's stream. It belongs to the epoch of its first sample, and the updates of an epoch come in
the order of a hash. Ranks and workers do not occur in any of this.
"""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from core.errors import UserError
from core.hashing import hash_of, mix64_array

if TYPE_CHECKING:
    from data.bucketed_slots import Buckets

Key = tuple[int, int, int, int]  # seed, epoch, item, place in the update
Micro = Callable[[float], int]  # samples of a cost that one rank can hold at a time
Position = tuple[int, int]  # epoch, samples drawn by the updates of that epoch

IDLE = 64
"""Epochs in a row without an update, where buckets are drawn by chance, before there never will be one."""


class Bucketed(Protocol):
    """What updates are made of: samples by number, their hashes, and the bucket of each in an epoch."""

    shapes: np.ndarray  # (buckets, 3) frames, height, width

    def hashes(self) -> np.ndarray: ...
    def images(self) -> np.ndarray: ...
    def buckets(self, seed: int, epoch: int) -> np.ndarray: ...
    def item(self, number: np.ndarray, bucket: int) -> np.ndarray: ...
    @property
    def fixed(self) -> bool: ...


class Epoch(NamedTuple):
    """The updates of an epoch, in order. (updates,) each; `ends`: samples drawn after each."""

    bucket: np.ndarray
    first: np.ndarray  # place in the bucket's stream: of the run with carry, of the epoch without
    size: np.ndarray
    ends: np.ndarray


class Updates:
    """The stream of updates: a provider of positions for the loop.

    `sizes`: (buckets,) samples an update. `cost`: (buckets,) of a sample.
    """

    def __init__(self, data: Bucketed, slot: Buckets, sizes: np.ndarray, cost: np.ndarray, seed: int) -> None:
        self.data, self.slot, self.sizes, self.cost, self.seed = data, slot, sizes, cost, seed
        self.carries = slot.remainder == "carry"
        if self.carries and not data.fixed:
            raise UserError(
                "data.buckets.remainder = carry, but the declared table draws buckets anew each epoch: set it to drop "
                "or short."
            )
        self.epoch = functools.lru_cache(maxsize=2)(self._epoch)
        self._members = functools.lru_cache(maxsize=2)(self._by_bucket)
        self._ordered = functools.lru_cache(maxsize=4 * len(sizes) + 4)(self._in_order)

    # ------------------------------------------------------------------------------------------------ for the loop

    def update(self, position: Position) -> tuple[list[Key], Position]:
        """The samples of the update at `position`, by place, and the position after it. Raises UserError where no
        bucket fills an update.
        """
        epoch, drawn = position
        for _ in range(self._patience()):
            plan = self.epoch(epoch)
            number = int(np.searchsorted(plan.ends - plan.size, drawn, side="left"))
            if number < len(plan.ends):
                bucket, first, size = int(plan.bucket[number]), int(plan.first[number]), int(plan.size[number])
                return self._keys(epoch, bucket, first, size), (epoch, int(plan.ends[number]))
            epoch, drawn = epoch + 1, 0
        raise UserError(
            f"no bucket holds enough samples for an update: the largest has {self._counts(0).max()}, and an update "
            f"takes {int(self.sizes[self.sizes > 0].min())} or more. Set data.buckets.remainder to carry, or make "
            "updates smaller."
        )

    def _patience(self) -> int:
        """Epochs after which there is an update, or never will be one."""
        if self.carries:
            return int(self.sizes.max()) + 2
        return 2 if self.data.fixed else IDLE

    def micro_batch(self, keys: Sequence[Key], ranks: int, micro: Micro) -> int:
        """Samples that a rank holds at a time in this update: what `micro` allows, cut to a divisor of its share."""
        share, odd = divmod(len(keys), ranks)
        if odd:
            raise UserError(
                f"an update of {len(keys)} samples cannot be shared by {ranks} ranks: set data.buckets.multiple to a "
                "multiple of the ranks."
            )
        most = min(micro(float(self.cost[self.bucket_of(keys)])), share)
        return max(size for size in range(1, max(most, 1) + 1) if share % size == 0)

    def bucket_of(self, keys: Sequence[Key]) -> int:
        """The bucket of an update."""
        return int(keys[0][2]) // len(self.data.hashes()) - 1

    def updates_in(self, epoch: int) -> int:
        """How many updates an epoch has."""
        return len(self.epoch(epoch).ends)

    # ---------------------------------------------------------------------------------------------------- an epoch

    def _epoch(self, epoch: int) -> Epoch:
        buckets, firsts, sizes = [], [], []
        for bucket, count in enumerate(self._counts(epoch).tolist()):
            size = int(self.sizes[bucket])
            if not count or not size:
                continue
            if self.carries:
                first = np.arange(-(-epoch * count // size), -(-(epoch + 1) * count // size)) * size
            else:
                first = np.arange(0, count - size + 1, size)
            taken = np.full(len(first), size)
            rest = (count - len(first) * size) // self.slot.multiple * self.slot.multiple
            if self.slot.remainder == "short" and rest:
                first, taken = np.append(first, len(first) * size), np.append(taken, rest)
            buckets.append(np.full(len(first), bucket))
            firsts.append(first)
            sizes.append(taken)
        if not buckets:
            return Epoch(*(np.zeros(0, np.int64) for _ in range(4)))
        of, at, many = (np.concatenate(parts) for parts in (buckets, firsts, sizes))
        names = mix64_array(at.astype(np.uint64) ^ mix64_array(of.astype(np.uint64)))
        order = np.argsort(mix64_array(names ^ np.uint64(hash_of("updates", self.seed, epoch))), kind="stable")
        return Epoch(of[order], at[order], many[order], np.cumsum(many[order]))

    def _keys(self, epoch: int, bucket: int, first: int, size: int) -> list[Key]:
        if not self.carries:
            items = self._ordered(epoch, bucket)[first : first + size]
            return [(self.seed, epoch, int(item), place) for place, item in enumerate(items)]
        count = int(self._counts(0)[bucket])
        keys: list[Key] = []
        for stream in range(first, first + size):
            of, at = divmod(stream, count)
            keys.append((self.seed, of, int(self._ordered(of, bucket)[at]), len(keys)))
        return keys

    def _in_order(self, epoch: int, bucket: int) -> np.ndarray:
        """Items of a bucket's epoch: those lowest by a hash of (seed, epoch, id)."""
        order, starts = self._members(self._drawn(epoch))
        members = order[starts[bucket] : starts[bucket + 1]]
        ranked = mix64_array(self.data.hashes()[members] ^ np.uint64(hash_of(self.seed, epoch)))
        chosen = members[np.argsort(ranked, kind="stable")]
        return self.data.item(chosen[: self._counts(epoch)[bucket]], bucket)

    def _drawn(self, epoch: int) -> int:
        """The epoch that decides who is in which bucket."""
        return 0 if self.data.fixed else epoch

    def _by_bucket(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples sorted by bucket, and where each bucket starts."""
        buckets = self.data.buckets(self.seed, epoch)
        order = np.argsort(buckets, kind="stable")
        return order, np.searchsorted(buckets[order], np.arange(len(self.sizes) + 1))

    def _counts(self, epoch: int) -> np.ndarray:
        """(buckets,) samples of each in an epoch: all, or fewer of the kind that is in excess of its share."""
        _, starts = self._members(self._drawn(epoch))
        counts = np.diff(starts)
        share = self.slot.image_share
        if share is None:
            return counts
        is_image = self.data.images()
        images, videos = int(counts[is_image].sum()), int(counts[~is_image].sum())
        if not images or not videos:
            kind = "images" if not images else "videos"
            raise UserError(f"data.buckets.image_share = {share}, but there are no {kind}: set it to None.")
        total = min(images / share, videos / (1 - share))
        quota = np.array(counts)
        for mask, wanted in ((is_image, round(total * share)), (~is_image, round(total * (1 - share)))):
            quota[mask] = apportioned(counts[mask], wanted)
        return quota


def apportioned(counts: np.ndarray, wanted: int) -> np.ndarray:
    """`wanted` of all, each bucket by its share: whole numbers, the largest remainders rounded up."""
    wanted = min(wanted, int(counts.sum()))
    exact = counts * (wanted / max(int(counts.sum()), 1))
    found = np.floor(exact).astype(np.int64)
    up = np.argsort(found - exact, kind="stable")[: wanted - int(found.sum())]
    found[up] += 1
    return np.minimum(found, counts)


# ---- how large an update is -----------------------------------------------------------------------------------------


def costs(slot: Buckets, tokens: np.ndarray) -> np.ndarray:
    """(buckets,) of a sample: its tokens, and what attention adds, which grows with their square."""
    return tokens * (1.0 + (tokens / slot.attention_tokens if slot.attention_tokens else 0.0))


def update_sizes(
    slot: Buckets, shapes: Sequence[str], cost: np.ndarray, global_batch: int, declared: Sequence[int] | None
) -> np.ndarray:
    """(buckets,) samples an update; always a multiple of `slot.multiple`. Raises UserError that names the setting."""
    if slot.batch == "samples":
        if global_batch % slot.multiple:
            raise UserError(
                f"loop.global_batch = {global_batch} is no multiple of data.buckets.multiple = {slot.multiple}."
            )
        return np.full(len(shapes), global_batch)
    if slot.batch == "tokens":
        assert slot.budget is not None
        fits = np.floor(slot.budget / cost).astype(np.int64) // slot.multiple * slot.multiple
        if (fits < 1).any():
            most = int(np.argmax(cost))
            raise UserError(
                f"data.buckets.budget = {slot.budget} is less than {slot.multiple} samples of {shapes[most]} cost: "
                f"{int(np.ceil(cost[most] * slot.multiple))}."
            )
        return fits
    if declared is not None and not slot.sizes:
        return np.array(declared) * slot.multiple
    return np.array([_size(slot, shape) for shape in shapes])


def _size(slot: Buckets, shape: str) -> int:
    for entry in slot.sizes:
        pattern, _, number = entry.partition("=")
        if fnmatch.fnmatchcase(shape, pattern):
            if int(number) % slot.multiple:
                raise UserError(
                    f"data.buckets.sizes: {entry} is no multiple of data.buckets.multiple = {slot.multiple}."
                )
            return int(number)
    raise UserError(f"data.buckets.sizes has no entry for {shape}: end it with *=SAMPLES.")


def micro_of(slot: Buckets, micro_batch: int, device_bytes: int | None = None) -> Micro:
    """What one rank holds at a time: by `rank_budget`, by the device's memory, or `micro_batch` samples."""
    budget: float | None = slot.rank_budget
    if budget is None and slot.bytes_per_token is not None:
        if device_bytes is None:
            raise UserError(
                "data.buckets.bytes_per_token needs a device of known memory; set data.buckets.rank_budget."
            )
        budget = (device_bytes - slot.reserve_gb * 2**30) / slot.bytes_per_token
    if budget is None:
        return lambda cost: micro_batch
    return lambda cost: int(budget // cost)

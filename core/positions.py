"""Which samples make which update: computed from (seed, position), never replayed.

The training stream is epoch after epoch, each a permutation of the dataset; an update takes the next `global_batch`
samples of the stream. So nothing is dropped at an epoch's end, each sample is seen once an epoch, and the number of
ranks does not matter. Data of many shapes have updates of their own (`Bucketed`), each of one shape.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from core.errors import UserError
from core.slots import Loop


class Position(NamedTuple):
    """Where the stream stands: `drawn` samples of `epoch` are behind."""

    epoch: int = 0
    drawn: int = 0


START = Position()


class Key(NamedTuple):
    """What a dataset needs to make a sample: which one, with what randomness, for which place of the global batch."""

    seed: int
    epoch: int
    item: int
    place: int


class Ordered(Protocol):
    """A dataset that has an order for every epoch."""

    def __len__(self) -> int: ...
    def order(self, seed: int, epoch: int) -> np.ndarray: ...


class Plan:
    """The stream of updates over a dataset."""

    def __init__(self, dataset: Ordered, seed: int, global_batch: int, micro_batch: int) -> None:
        self.dataset, self.seed = dataset, seed
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self._order = functools.lru_cache(maxsize=2)(lambda epoch: dataset.order(seed, epoch))

    def update(self, position: Position) -> tuple[list[Key], Position]:
        """The samples of the update at `position`, by place, and the position after it."""
        epoch, drawn = position
        keys: list[Key] = []
        while len(keys) < self.global_batch:
            if drawn == len(self.dataset):
                epoch, drawn = epoch + 1, 0
            take = min(self.global_batch - len(keys), len(self.dataset) - drawn)
            indices = self._order(epoch)[drawn : drawn + take]
            keys += [Key(self.seed, epoch, int(index), len(keys) + n) for n, index in enumerate(indices)]
            drawn += take
        return keys, Position(epoch, drawn)

    def steps(self, epochs: float) -> int:
        """Updates of so many epochs, rounded up."""
        return max(1, -(-int(epochs * len(self.dataset)) // self.global_batch))

    def micro(self, keys: Sequence[Key], ranks: int) -> int:
        """Samples of an update that one of `ranks` data ranks holds at a time."""
        return self.micro_batch

    def accumulation(self, keys: Sequence[Key], ranks: int) -> int:
        """Micro-batches of an update on each of `ranks` data ranks."""
        return len(keys) // (self.micro(keys, ranks) * ranks)

    def rank(self, rank: int, ranks: int, start: Position, updates: int) -> Iterator[list[Key]]:
        """Micro-batches of one rank from `start` on: micro-batch a of rank r holds places (a·ranks + r)·micro_batch
        onwards.
        """
        position = start
        for _ in range(updates):
            keys, position = self.update(position)
            micro = self.micro(keys, ranks)
            for a in range(self.accumulation(keys, ranks)):
                first = (a * ranks + rank) * micro
                yield keys[first : first + micro]


class Bucketed(Plan):
    """The stream of a dataset of many shapes: which samples make an update, and how many of a cost a rank holds at a
    time (`micro`), is the dataset's to say. Raises UserError where an update cannot be shared by `ranks`.
    """

    def __init__(self, updates: Any, micro: Callable[[float], int], ranks: int) -> None:
        self.updates, self._micro = updates, micro
        odd = next((int(size) for size in self.updates.sizes if size % ranks), None)
        if odd is not None:
            raise UserError(
                f"an update of {odd} samples cannot be shared by {ranks} ranks: set data.buckets.multiple (and "
                "--global-batch, where that is an update's size) to a multiple of the ranks"
            )

    def update(self, position: Position) -> tuple[list[Key], Position]:
        keys, after = self.updates.update(position)
        return [Key(*key) for key in keys], Position(*after)

    def micro(self, keys: Sequence[Key], ranks: int) -> int:
        return int(self.updates.micro_batch(keys, ranks, self._micro))

    def steps(self, epochs: float) -> int:
        whole, part = divmod(epochs, 1)
        count = sum(self.updates.updates_in(epoch) for epoch in range(int(whole)))
        return max(1, count + (math.ceil(part * self.updates.updates_in(int(whole))) if part else 0))


def plan_of(dataset: Any, loop: Loop, ranks: int, memory: int | None) -> Plan:
    """The stream of a dataset for `ranks` data ranks. `memory`: bytes of a rank's device, None where unknown."""
    if hasattr(dataset, "updates"):
        updates = dataset.updates(loop.seed, loop.global_batch)
        return Bucketed(updates, dataset.micro(loop.micro_batch, memory), ranks)
    return Plan(dataset, loop.seed, loop.global_batch, loop.micro_batch)

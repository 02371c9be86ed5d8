"""Which samples make which update: computed from (seed, position), never replayed.

The training stream is epoch after epoch, each a permutation of the dataset; an update takes the next `global_batch`
samples of the stream. So nothing is dropped at an epoch's end, each sample is seen once an epoch, and the number of
ranks does not matter.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np


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

    def accumulation(self, ranks: int) -> int:
        """Micro-batches of an update on each of `ranks` data ranks."""
        return self.global_batch // (self.micro_batch * ranks)

    def rank(self, rank: int, ranks: int, start: Position, updates: int) -> Iterator[list[Key]]:
        """Micro-batches of one rank from `start` on: micro-batch a of rank r holds places (a·ranks + r)·micro_batch
        onwards.
        """
        position = start
        for _ in range(updates):
            keys, position = self.update(position)
            for a in range(self.accumulation(ranks)):
                first = (a * ranks + rank) * self.micro_batch
                yield keys[first : first + self.micro_batch]

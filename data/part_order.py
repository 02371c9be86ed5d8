"""The order of records in parts: any stretch of any epoch is computed, nothing is replayed, and workers do not matter.

What the original did with a random choice of lists, shuffled part names and a buffer of 100 records (LDM sheet §5.4) is
a function of (seed, epoch, position) here:

1. which list a position draws from: exactly its share of every stretch, by division with remainder;
2. a list's chunks (256 neighbouring records) in the order of their hashes;
3. windows of eight such chunks, and the records of a window in the order of theirs.

A list whose weight is more than its share of the records comes round more often, one with less is gone on with in the
next epoch: nothing is left out.
"""

from __future__ import annotations

import functools

import numpy as np

from core.hashing import hash_of, mix64_array

WINDOW = 8  # chunks that are shuffled together: what is decompressed at a time, some 40 MB


class Chunks:
    """The chunks of one list. `hashes` (C,) uint64: of their names; `sizes` (C,): of their records, those that are
    kept; `first`: the dataset's index of the first of them.
    """

    def __init__(self, hashes: np.ndarray, sizes: np.ndarray, first: int):
        self.hashes, self.sizes = hashes, sizes
        self.firsts = first + np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
        self.records = int(sizes.sum())
        self.shuffled = functools.lru_cache(maxsize=3)(self._shuffled)
        self.window = functools.lru_cache(maxsize=6)(self._window)

    def at(self, salt: int, places: np.ndarray) -> np.ndarray:
        """Indices of the records at some places of the order that belongs to `salt`."""
        _, starts = self.shuffled(salt)
        windows = np.searchsorted(starts[::WINDOW], places, side="right") - 1
        found = np.empty(len(places), np.int64)
        for window in np.unique(windows).tolist():
            here = windows == window
            found[here] = self.window(salt, window)[places[here] - starts[window * WINDOW]]
        return found

    def _shuffled(self, salt: int) -> tuple[np.ndarray, np.ndarray]:
        """Chunks in their order, and the place of the first record of each (C,); chunks without records come last."""
        order = np.argsort(mix64_array(self.hashes ^ np.uint64(salt)), kind="stable")
        order = order[self.sizes[order] > 0]
        return order, np.concatenate([[0], np.cumsum(self.sizes[order])[:-1]])

    def _window(self, salt: int, window: int) -> np.ndarray:
        """Indices of a window's records, in their order."""
        chunks = self.shuffled(salt)[0][window * WINDOW : (window + 1) * WINDOW].tolist()
        within = [np.arange(self.sizes[chunk]) for chunk in chunks]
        keys = [self.hashes[c] + mix64_array(n.astype(np.uint64)) for c, n in zip(chunks, within, strict=True)]
        indices = [self.firsts[chunk] + number for chunk, number in zip(chunks, within, strict=True)]
        order = np.argsort(mix64_array(np.concatenate(keys) ^ np.uint64(salt)), kind="stable")
        return np.concatenate(indices)[order]


class Mixture:
    """Several lists, drawn from by weights (integers below 2 ** 31)."""

    def __init__(self, lists: list[Chunks], weights: list[int]):
        self.lists = lists
        self.weights = np.array(weights, np.int64)
        self.rests = np.cumsum(self.weights[::-1])[::-1]  # of a list and those behind it
        self.records = sum(chunks.records for chunks in lists)
        self.quotas = self.drawn(np.array([self.records]))[:, 0].tolist()  # of each list, an epoch

    def drawn(self, positions: np.ndarray) -> np.ndarray:
        """(lists, positions): how often each list was drawn from before a position. Each count rises by one at a time,
        and they sum up to the position: a list takes its share of what those before it leave, rounded down.
        """
        left, counts = positions.astype(np.int64), []
        for weight, rest in zip(self.weights, self.rests, strict=True):
            counts.append(left * weight // rest)
            left = left - counts[-1]
        return np.stack(counts)

    def stretch(self, seed: int, epoch: int, start: int, stop: int) -> np.ndarray:
        """(stop - start,) int64: what stands at these positions of an epoch. `records` is added to an index each time
        that its list has come round within the epoch: the same record again, with other randomness.
        """
        positions = np.arange(start, stop)
        before = self.drawn(positions)
        lists = (self.drawn(positions + 1) - before).argmax(axis=0)
        found = np.empty(len(positions), np.int64)
        for number in np.unique(lists).tolist():
            chunks, here = self.lists[number], lists == number
            began = epoch * self.quotas[number]
            rounds, places = np.divmod(began + before[number, here], chunks.records)
            part = np.empty(len(places), np.int64)
            for turn in np.unique(rounds).tolist():
                now = rounds == turn
                salt = hash_of("parts", seed, number, turn)
                part[now] = chunks.at(salt, places[now]) + (turn - began // chunks.records) * self.records
            found[here] = part
        return found


class Order:
    """An epoch's order as the loader takes it: an array that is computed where it is read."""

    def __init__(self, mixture: Mixture, seed: int, epoch: int):
        self.mixture, self.seed, self.epoch = mixture, seed, epoch

    def __len__(self) -> int:
        return self.mixture.records

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, step = part.indices(len(self))
        return self.mixture.stretch(self.seed, self.epoch, start, max(start, stop))[::step]

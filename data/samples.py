"""What every dataset of the project shares: a sample is a pure function of (seed, epoch, id).

Neither the number of workers, nor the ranks, nor the place of the root folder can change what is read, so a run that
was killed goes on with the very samples it would have seen.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from core.errors import UserError
from core.hashing import hash_of, hash_text, mix64_array

Sample = dict[str, Any]
Key = tuple[int, int, int, int]  # seed, epoch, index in the dataset, place in the global batch

REPLACEMENTS = 8
CHUNK = 1 << 20


class BadSample(Exception):
    """A sample that cannot be read: which one, and why. It is replaced, counted and named, never hidden."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class Samples(Dataset[Sample]):
    """Base of the map-style datasets. A subclass fills the constructor and implements `read`.

    `ids`: unique names, which do not depend on where the root folder is; a list, or a view of a table that is too long
    for one. `dropped`: reason -> how many were left out while scanning. `fingerprint`: hash of what the data are,
    independent of the root's path and of the scan's order.
    Workers receive a pickled copy: keep paths and numbers in it, and open files in `read`.
    """

    def __init__(self, ids: Sequence[str], *, fingerprint: str, dropped: dict[str, int] | None = None):
        self.ids = ids
        self.fingerprint = fingerprint
        self.dropped = dropped or {}
        self._id_hashes: np.ndarray | None = None

    def read(self, index: int, rng: np.random.Generator) -> Sample:
        """The sample's tensors (and captions), with `rng` as the only source of chance. Raises BadSample."""
        raise NotImplementedError

    def stand_in(self, index: int, chance: int) -> int:
        """The index that replaces the bad sample `index`, given 64 random bits. Bucketed sets stay in the bucket."""
        return chance % len(self)

    @staticmethod
    def collate(samples: Sequence[Sample]) -> Sample:
        """How samples become a batch; a subclass may override it."""
        return collate(samples)

    def describe(self) -> dict[str, str | int]:
        """What was found, for the run's log: numbers, fingerprint, and what was left out and why."""
        left_out = {f"dropped: {reason}": count for reason, count in self.dropped.items()}
        return {"samples": len(self), "fingerprint": self.fingerprint, **left_out}

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, key: Key) -> Sample:
        """The sample of `key`, or the first readable one of its hash chain.

        Adds `id` (of the sample that was read), `place`, and `bad`: (name, reason) of each sample that was not.
        Raises UserError when the sample and all its replacements are bad.
        """
        seed, epoch, index, place = key
        bad: list[tuple[str, str]] = []
        for candidate in self._candidates(seed, epoch, index):
            name = self.ids[candidate]
            try:
                sample = self.read(candidate, np.random.default_rng(hash_of(seed, epoch, name)))
            except BadSample as fault:
                bad.append((fault.name, fault.reason))
                continue
            return sample | {"id": name, "place": place, "bad": bad}
        raise UserError(_all_bad(bad))

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The epoch's order: indices (int64; int32 where there are millions), sorted by `hash_of(seed, epoch, id)`.

        Two datasets that share samples visit them in the same relative order.
        """
        salt, hashes = np.uint64(hash_of(seed, epoch)), self.id_hashes()
        return sorted_places(hashes, lambda part: mix64_array(part ^ salt))

    def id_hashes(self) -> np.ndarray:
        """`hash_text` of every id, uint64, kept after the first call."""
        if self._id_hashes is None:
            self._id_hashes = np.fromiter(map(hash_text, self.ids), np.uint64, len(self.ids))
        return self._id_hashes

    def __getstate__(self) -> dict[str, Any]:
        """Workers never sort: the hashes stay behind."""
        return self.__dict__ | {"_id_hashes": None}

    def _candidates(self, seed: int, epoch: int, index: int) -> Iterator[int]:
        """The sample itself, then its replacements: a chain that belongs to (seed, epoch, id) alone."""
        yield index
        for attempt in range(1, REPLACEMENTS + 1):
            yield self.stand_in(index, hash_of(seed, epoch, self.ids[index], attempt))


def sorted_places(values: np.ndarray, key: Callable[[np.ndarray], np.ndarray] = np.asarray) -> np.ndarray:
    """`np.argsort(key(values), kind="stable")` for a `key` of uint64 elements. Millions are sorted bucket by bucket, so
    that neither their keys nor a sort's workspace ever stand in memory as a whole.
    """
    count = len(values)
    if count <= CHUNK:
        return np.argsort(key(values), kind="stable")
    places, buckets = np.empty(count, np.int32 if count < 1 << 31 else np.int64), np.empty(count, np.uint8)
    for start in range(0, count, CHUNK):
        buckets[start : start + CHUNK] = key(values[start : start + CHUNK]) >> np.uint64(56)
    filled = 0
    for bucket in range(256):
        members = np.flatnonzero(buckets == bucket)
        places[filled : filled + len(members)] = members[np.argsort(key(values[members]), kind="stable")]
        filled += len(members)
    return places


def collate(samples: Sequence[Sample]) -> Sample:
    """A batch: tensors stacked, `bad` concatenated, everything else (id, place, caption) as a list in batch order."""
    batch: Sample = {}
    for name, first in samples[0].items():
        values = [sample[name] for sample in samples]
        if isinstance(first, torch.Tensor):
            batch[name] = _stack(name, values, samples)
        else:
            batch[name] = list(chain.from_iterable(values)) if name == "bad" else values
    return batch


def _stack(name: str, values: list[torch.Tensor], samples: Sequence[Sample]) -> torch.Tensor:
    """`torch.stack`, with the odd one out named when the shapes differ."""
    for value, sample in zip(values, samples, strict=True):
        if value.shape != values[0].shape:
            raise UserError(
                f"{name} of {samples[0]['id']} is {list(values[0].shape)} and of {sample['id']} {list(value.shape)}: "
                "samples of different shapes cannot share a batch. Choose a spatial_transform that gives one size, "
                "or a micro-batch of 1."
            )
    return torch.stack(values)


def _all_bad(bad: list[tuple[str, str]]) -> str:
    (first, why_first), (last, why_last) = bad[0], bad[-1]
    return (
        f"{len(bad)} samples in a row cannot be read: the first is {first} ({why_first}), the last {last} "
        f"({why_last}). Is the data folder complete, and are its files what the layout expects?"
    )

"""What a dataset holds, before a run trains on it: samples of its first epoch, read one after the other and counted."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import numpy as np

from core.hashing import hash_of
from data.captioned import speaks_of_sides
from data.samples import BadSample, Samples

EPOCH = 0


class Found:
    """What reading gave. `bad`: kind of fault → how many; `examples`: kind → the first of them, with its reason."""

    def __init__(self) -> None:
        self.read = 0
        self.bad: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self.captions: Counter[str] = Counter()
        """Of readable samples: those with a caption, without words in it, and that speak of sides."""

    def share(self) -> float:
        """Of what was read, the part that is bad."""
        return self.bad.total() / self.read if self.read else 0.0


def check(dataset: Samples, seed: int, count: int | None) -> Found:
    """Read the first `count` samples (None: all) of the epoch that training with `seed` begins with."""
    found = Found()
    for index in islice(map(int, dataset.order(seed, EPOCH)), count):
        found.read += 1
        try:
            sample = dataset.read(index, np.random.default_rng(hash_of(seed, EPOCH, dataset.ids[index])))
        except BadSample as fault:
            kind = fault.reason.partition(":")[0]
            found.bad[kind] += 1
            found.examples.setdefault(kind, str(fault))
            continue
        if "caption" in sample:
            caption = sample["caption"]
            found.captions.update(captions=1, empty=not caption.strip(), sided=speaks_of_sides(caption))
    return found

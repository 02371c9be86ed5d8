"""A dataset whose samples come from a cache: in the order of the original, and read as it would have read them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from core.caches.facts import Part
from core.caches.shards import Shards, content_of, read_index
from core.errors import UserError

LOOKED_AT = 4
"""Samples that are read again at the start of a run and held against the index."""


class CachedSamples(Dataset[dict[str, Any]]):
    """The part of a cache that stands for the dataset `original`.

    A sample: `posterior_mean` and `posterior_std` (C, T', H', W') in the autoencoder's dtype, `text_states` (N, D)
    where the text encoder is frozen, and `caption`, `id`, `place` and `bad` as the original gives them. A batch has
    `empty_states` (1, N, D) beside `text_states`. Clips are cut as in the first `draws` epochs of the cache's seed.
    """

    def __init__(self, original: Any, folder: Path, part: Part, empty: Tensor | None):
        self.original, self.part, self.empty = original, part, empty
        self.folder = folder / part.name
        self.shards = Shards(self.folder)
        self.index = read_index(self.folder, part.rows, part.shards)
        self._rows = (
            {sample: row for row, sample in enumerate(self.index["sample"].to_pylist())} if self._some else None
        )

    @property
    def _some(self) -> bool:
        """Whether these are not all samples of the original, in order."""
        return self.part.rows != len(self.original) * self.part.draws

    def __getstate__(self) -> dict[str, Any]:
        """Workers map the index themselves."""
        return self.__dict__ | {"index": None}

    def __len__(self) -> int:
        return len(self.original)

    @property
    def ids(self) -> Sequence[str]:
        return self.original.ids  # type: ignore[no-any-return]

    @property
    def fingerprint(self) -> str:
        return self.original.fingerprint  # type: ignore[no-any-return]

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The original's."""
        return self.original.order(seed, epoch)  # type: ignore[no-any-return]

    def describe(self) -> dict[str, Any]:
        """The original's figures, and where latents and states are from."""
        part = self.part
        return self.original.describe() | {
            "cache": str(self.folder),
            "cached draws": part.draws,
            "draws' seed": part.seed,
        }

    def __getitem__(self, key: tuple[int, int, int, int]) -> dict[str, Any]:
        _, epoch, item, place = key
        row = self._entry(self._row(item, epoch))
        tensors = self.shards.read(row["shard"], row["row"], row["text"], row["crc"])
        sample = {"posterior_mean": tensors["mean"], "posterior_std": tensors["std"]}
        if self.empty is not None:
            sample["text_states"] = tensors["text_states"]
        if row["caption"] is not None:
            sample["caption"] = row["caption"].decode("utf-8", "surrogateescape")
        bad = [tuple(one) for one in json.loads(row["bad"])]
        return sample | {"id": row["id"].decode("utf-8", "surrogateescape"), "place": place, "bad": bad}

    def collate(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The original's way, with the states of the empty caption."""
        batch: dict[str, Any] = self.original.collate(samples)
        return batch if self.empty is None else batch | {"empty_states": self.empty}

    def _row(self, item: int, epoch: int) -> int:
        if self._rows is None:
            return item * self.part.draws + epoch % self.part.draws
        if item not in self._rows:
            raise UserError(f"{self.folder} has {self.part.rows} samples, and {self.ids[item]} is none of them")
        return self._rows[item]

    def _entry(self, row: int) -> dict[str, Any]:
        if self.index is None:
            self.index = read_index(self.folder, self.part.rows, 0)
        return {name: self.index[name][row].as_py() for name in _READ}

    def refuse_other_content(self) -> None:
        """Raise UserError where a few of the samples are read as others than when they were cached."""
        part = self.part
        for row in np.unique(np.linspace(0, part.rows - 1, LOOKED_AT, dtype=np.int64)).tolist():
            item, draw = self.index["sample"][row].as_py(), self.index["draw"][row].as_py()
            if not 0 <= item < len(self.original):
                raise UserError(f"{self.folder}: its index names sample {item} of {len(self.original)}")
            now = self.original[part.seed, draw, item, 0]
            if content_of(now) != self.index["content"][row].as_py():
                raise UserError(
                    f"the cache {self.folder.parent} is stale: the pixels or the caption of {now['id']} are not those "
                    "that were cached (another file under its name, or another decoder); make another with `data cache`"
                )


_READ = ("id", "caption", "bad", "shard", "row", "text", "crc")

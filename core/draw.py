"""Randomness of a batch, sample by sample: a pure function of the seed, the step and the sample's place.

So noise does not depend on micro-batch size, ranks or what was drawn before. Everything is drawn on the CPU and then
moved: the same on every device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from core.hashing import hash_of


class Draw:
    """Noise and uniforms for the samples of one micro-batch.

    `keys` are one 64-bit integer a sample; `places` are positions 0…total-1 in the global batch (or in the evaluated
    set).
    """

    def __init__(
        self, keys: Sequence[int], places: Sequence[int], total: int, device: torch.device | str = "cpu"
    ) -> None:
        if len(keys) != len(places):
            raise ValueError(f"{len(keys)} keys for {len(places)} places")
        self.keys, self.places, self.total, self.device = list(keys), list(places), total, torch.device(device)

    @classmethod
    def training(
        cls, seed: int, step: int, places: Sequence[int], total: int, device: torch.device | str = "cpu"
    ) -> Draw:
        """Fresh randomness at every step."""
        return cls([hash_of(seed, "train", step, place) for place in places], places, total, device)

    @classmethod
    def fixed(
        cls,
        purpose: str,
        ids: Sequence[str | int],
        places: Sequence[int],
        total: int,
        device: torch.device | str = "cpu",
    ) -> Draw:
        """The same randomness for a sample at every step and in every run."""
        return cls([hash_of(purpose, i) for i in ids], places, total, device)

    def _generator(self, key: int, name: str) -> torch.Generator:
        # the CPU generator uses only the low 32 bits of its seed
        return torch.Generator().manual_seed(hash_of(key, name) & 0xFFFFFFFF)

    def noise(self, shape: Sequence[int], name: str = "noise") -> Tensor:
        """Standard normal, (B, *shape). Each sample is drawn whole: `randn` has no prefix property."""
        if self.device.type == "meta":
            return torch.empty(len(self.keys), *shape, device="meta")
        rows = [torch.randn(*shape, generator=self._generator(key, name), device="cpu") for key in self.keys]
        return torch.stack(rows).to(self.device, non_blocking=True)

    def generators(self, name: str) -> list[torch.Generator]:
        """What `noise` of this name is drawn from, one a sample, for libraries that draw themselves."""
        return [self._generator(key, name) for key in self.keys]

    def chances(self, name: str) -> list[float]:
        """Uniform in [0, 1), one a sample, on the host: for what is decided there."""
        return [torch.rand((), generator=self._generator(key, name), device="cpu").item() for key in self.keys]

    def uniform(self, name: str) -> Tensor:
        """The same on the device, (B,)."""
        if self.device.type == "meta":
            return torch.empty(len(self.keys), device="meta")
        return torch.tensor(self.chances(name), dtype=torch.float32).to(self.device, non_blocking=True)

    def stratified(self, strata: int, name: str) -> Tensor:
        """Uniform in one of `strata` equal slices of [0, 1), (B,): by the sample's place, as many places a slice."""
        slices = [place * strata // self.total for place in self.places]
        drawn = self.uniform(name)
        return drawn if strata == 1 else (drawn + torch.tensor(slices).to(self.device, non_blocking=True)) / strata

    def quantiles(self) -> Tensor:
        """The middle of the sample's stratum, (place + 1/2) / total, (B,): no randomness, evenly spread over the whole
        set.
        """
        if self.device.type == "meta":
            return torch.empty(len(self.keys), device="meta")
        return ((torch.tensor(self.places, dtype=torch.float32) + 0.5) / self.total).to(self.device)

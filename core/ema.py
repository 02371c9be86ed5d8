"""Exponential moving average of the weights that learn, on each rank's own shards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from core.distributed import local
from core.models.partly import learnt

if TYPE_CHECKING:
    from core.slots import EMA as EMASlot


class EMA:
    """average ← d·average + (1-d)·weights with d = min(decay, (1+n)/(10+n)) at the n-th update, n from 1."""

    def __init__(self, slot: EMASlot, modules: nn.Module) -> None:
        self.slot, self.count = slot, 0
        self.weights = learnt(modules)
        self.average = {name: p.detach().clone() for name, p in self.weights.items()}

    def decay(self) -> float:
        """The decay of the update whose number is `count`."""
        n = self.count
        return min(self.slot.decay, (1 + n) / (10 + n)) if self.slot.warmup else self.slot.decay

    @torch.no_grad()
    def update(self) -> None:
        """Take the current weights in. A few kernel launches for all tensors together."""
        self.count += 1
        torch._foreach_lerp_(self._local(self.average), self._local(self.weights), 1.0 - self.decay())

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within: the modules hold the average. Swapped in place, so no second copy of the weights is needed."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for a, w in zip(self._local(self.average), self._local(self.weights), strict=True):
            kept = w.clone()
            w.copy_(a)
            a.copy_(kept)

    @staticmethod
    def _local(tensors: Mapping[str, Tensor]) -> list[Tensor]:
        return [local(t.detach()) for t in tensors.values()]

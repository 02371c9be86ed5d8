"""The parallel slot: how a run spreads over ranks."""

from __future__ import annotations

from core.errors import UserError
from core.slots.slot import Slot


class Parallel(Slot):
    """Replicas x shards. What is not given follows from the number of ranks."""

    replicate: int | None = None
    """Copies of the model, each on its own samples. None: ranks / shard."""
    shard: int = 1
    """Ranks over which weights, gradients and optimizer state of one copy are split (FSDP2)."""

    def check(self) -> None:
        for name in ("replicate", "shard"):
            value = getattr(self, name)
            if value is not None and value < 1:
                self.refuse(name, "must be at least 1")

    def mesh(self, world: int) -> tuple[int, int]:
        """(replicate, shard) for `world` ranks. Raises UserError that says which numbers would fit."""
        replicate = self.replicate if self.replicate is not None else max(world // self.shard, 1)
        if replicate * self.shard != world:
            fits = ", ".join(f"{world // s} x {s}" for s in range(1, world + 1) if world % s == 0)
            raise UserError(
                f"parallel: replicate {replicate} x shard {self.shard} needs {replicate * self.shard} ranks, "
                f"there are {world}; what fits: {fits}"
            )
        return replicate, self.shard

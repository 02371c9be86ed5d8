"""The parallel slot: how a run spreads over ranks."""

from __future__ import annotations

from math import prod
from typing import Any, ClassVar, Literal

from core.errors import UserError
from core.slots.slot import Slot


class Parallel(Slot):
    """Replicas x shards x sequence parts, over one mesh of ranks. What is None follows from the number of ranks."""

    since: ClassVar[dict[str, Any]] = {"shard_frozen_from": 1_000_000_000}

    replicate: int | None = None
    """Copies of the model, each on its own samples."""
    shard: int | None = 1
    """Ranks over which weights, gradients and optimizer state of one copy are split (FSDP2), each with its own samples.
    None: all that replicate leaves; where that is None too, all of a machine, which has a copy of its own (HSDP).
    """
    sequence: int = 1
    """Ranks over which the tokens of one sample are split; they share their samples. For denoisers that can."""
    param_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What the sharded weights are gathered and computed in; they are kept in fp32."""
    reduce_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What gradients are averaged in."""
    offload: bool = False
    """Keep shards of weights, gradients and optimizer state in the host's memory (slow, but large models fit)."""
    shard_frozen_from: int = 1_000_000_000
    """Parameters from which a frozen network (text encoder, autoencoder) is split over the shard ranks too, and
    gathered for each call. It is read whole on each rank first.
    """

    def check(self) -> None:
        if self.shard_frozen_from < 0:
            self.refuse("shard_frozen_from", "must not be negative")
        for name in ("replicate", "shard", "sequence"):
            value = getattr(self, name)
            if value is not None and value < 1:
                self.refuse(name, "must be at least 1")

    def mesh(self, world: int, local: int | None = None) -> tuple[int, int, int]:
        """(replicate, shard, sequence) for `world` ranks, `local` of them on each machine (None: all on one). Ranks are
        numbered machine by machine, so shards are neighbours. Raises UserError that says which numbers would fit.
        """
        replicate, shard = self.replicate, self.shard
        if shard is None:
            together = world // replicate if replicate else local or world
            shard = max(together // self.sequence, 1)
        if replicate is None:
            replicate = max(world // (shard * self.sequence), 1)
        found = (replicate, shard, self.sequence)
        if prod(found) != world:
            raise UserError(
                f"parallel: replicate {replicate} x shard {shard} x sequence {self.sequence} needs {prod(found)} "
                f"ranks, there are {world}; what fits: {self._fitting(world)}"
            )
        return found

    def _fitting(self, world: int) -> str:
        """The meshes of `world` ranks, those with the wanted sequence if there are some."""
        parts = [n for n in range(1, world + 1) if world % n == 0]
        sequence = self.sequence if self.sequence in parts else 1
        rest = world // sequence
        return ", ".join(f"{rest // s} x {s} x {sequence}" for s in parts if rest % s == 0)

"""The loop slot: length, batch, precision, seed and switches of the training loop."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from core.slots.slot import Slot


class Loop(Slot):
    """How long, in what batches and in what precision a recipe trains. A step is an optimizer update."""

    since: ClassVar[dict[str, Any]] = {"recompute_every": 1, "recompute_keep": (), "mfu": True}

    max_steps: int | None = None
    """Length in updates. Give this or epochs."""
    epochs: float | None = None
    """Length in passes over the data."""
    global_batch: int = 1
    """Samples of an update, over all ranks and micro-batches."""
    micro_batch: int = 1
    """Samples that one rank holds at a time; accumulation follows: global_batch / (micro_batch * data ranks)."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """bf16, fp16: autocast over fp32 weights; fp16 with a loss scaler."""
    seed: int = 0
    """Seed of initialisation, order, crops, noise and dropout."""
    compile: bool = False
    """torch.compile of each block."""
    activation_checkpointing: bool = False
    """Recompute each block's activations in the backward pass: less memory, about a third more time."""
    recompute_every: int = 1
    """With activation_checkpointing: recompute every n-th block, and keep what the others computed. 1: all."""
    recompute_keep: tuple[Literal["products", "attention", "convolutions"], ...] = ()
    """With activation_checkpointing: operators whose outputs are kept, so that they are not computed a second time."""
    tf32: bool = True
    """On CUDA: TF32 for fp32 matrix products and convolutions."""
    num_workers: int = 0
    """Processes that read data, a rank. The samples do not depend on it."""
    log_every: int = 10
    """Updates between logged metrics."""
    mfu: bool = True
    """Count the FLOPs of a batch, and log them as a share of what the device can do."""
    profile: int = 0
    """Write a trace of this many updates (after three of warm-up) into the output directory. 0: none."""
    max_nonfinite: int = 10
    """Updates with a non-finite loss or gradient are skipped; this many in a row stop the run."""

    def check(self) -> None:
        if (self.max_steps is None) == (self.epochs is None):
            self.refuse("max_steps", f"give max_steps or epochs, one of the two (epochs is {self.epochs})")
        for name in (
            "max_steps",
            "epochs",
            "global_batch",
            "micro_batch",
            "log_every",
            "max_nonfinite",
            "recompute_every",
        ):
            value = getattr(self, name)
            if value is not None and value <= 0:
                self.refuse(name, "must be positive")
        for name in ("num_workers", "profile", "seed"):
            if getattr(self, name) < 0:
                self.refuse(name, "must not be negative")
        if not self.activation_checkpointing:
            for name, off in (("recompute_every", 1), ("recompute_keep", ())):
                if getattr(self, name) != off:
                    self.refuse(name, "says what activation_checkpointing recomputes, and that is False")
        if self.global_batch % self.micro_batch:
            self.refuse("global_batch", f"must be a multiple of micro_batch = {self.micro_batch}")

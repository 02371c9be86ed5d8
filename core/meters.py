"""What the loop measures between two logs: means of losses, rates, memory."""

from __future__ import annotations

import math
import resource
from typing import Any

import torch


class Window:
    """Sums over the updates since the last log."""

    def __init__(self) -> None:
        self.updates, self.seconds, self.data_s, self.skipped = 0, 0.0, 0.0, 0
        self.samples = 0  # not in the oldest checkpoints
        self.sums: dict[str, float] = {}
        self.counted = 0

    @classmethod
    def of(cls, numbers: dict[str, Any]) -> Window:
        """The window that was saved as `vars(window)`: a resumed run logs the mean of all updates since a log."""
        window = cls()
        for name in vars(window):
            setattr(window, name, numbers.get(name, getattr(window, name)))  # a checkpoint may be older than a field
        return window

    def end_update(self, seconds: float, samples: int) -> None:
        """An update is done. Only updates are timed: validation, samples and checkpoints are not in the rates."""
        self.updates += 1
        self.samples += samples
        self.seconds += seconds

    def add(self, loss: float, grad_norm: float, logs: dict[str, float]) -> None:
        """Account for one update that was applied."""
        self.counted += 1
        for name, value in ({"loss": loss, "grad_norm": grad_norm} | logs).items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def values(self, lr: float, nonfinite: int, device: torch.device) -> dict[str, float]:
        """The metrics of the window. Without an applied update loss and norm are NaN."""
        nothing = {"loss": math.nan, "grad_norm": math.nan}
        values = {name: value / self.counted for name, value in self.sums.items()} if self.counted else nothing
        return values | {
            "lr": lr,
            "time/step_s": self.seconds / self.updates,
            "time/data_share": self.data_s / self.seconds,
            "samples_per_s": self.samples / self.seconds,
            "memory_gb": memory_gb(device),
            "skipped_samples": float(self.skipped),
            "nonfinite_steps": float(nonfinite),
        }


def memory_gb(device: torch.device) -> float:
    """Peak memory: of the device on CUDA, of this process (resident) on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

"""Slots of sampling without further training: FreeInit against flicker, FreeNoise for clips longer than a network's."""

from __future__ import annotations

from typing import Literal

from core.slots.slot import Slot


class FreeInit(Slot):
    """FreeInit (arXiv 2312.07537): sample, noise the result again, keep its low frequencies in space and time with high
    ones of fresh noise, and sample from there. Motion flickers less; each round costs a whole sampling.
    """

    num_iters: int = 3
    """Rounds of sampling, the first included."""
    fast: bool = False
    """Round i of n takes i / n of the steps."""
    method: Literal["butterworth", "gaussian", "ideal"] = "butterworth"
    """The low-pass filter."""
    order: int = 4
    """Of the Butterworth filter."""
    spatial_stop_frequency: float = 0.25
    """Where the filter ends in space; 1 is the highest frequency there is."""
    temporal_stop_frequency: float = 0.25
    """Where it ends in time."""

    def check(self) -> None:
        for name in ("num_iters", "order"):
            if getattr(self, name) < 1:
                self.refuse(name, "must be at least 1")
        for name in ("spatial_stop_frequency", "temporal_stop_frequency"):
            if not 0.0 < getattr(self, name) <= 1.0:
                self.refuse(name, "must be in (0, 1]")

    def steps(self, iteration: int, steps: int) -> int:
        """Denoising steps of round `iteration`, from 0."""
        return max(1, steps * (iteration + 1) // self.num_iters) if self.fast else steps


class FreeNoise(Slot):
    """FreeNoise (arXiv 2310.15169): clips longer than the network's. Temporal attention sees windows of frames, and
    what several windows say of a frame is averaged; the noise of later frames is that of earlier ones, shuffled.
    """

    context_length: int = 16
    """Frames of a window: as many as in training."""
    context_stride: int = 4
    """Frames from one window to the next."""
    weighting: Literal["pyramid", "flat"] = "pyramid"
    """pyramid: a window counts most in its middle (equation 9); flat: the same everywhere."""
    shuffle: bool = True
    """False: every frame has noise of its own."""

    def check(self) -> None:
        if self.context_length < 2:
            self.refuse("context_length", "must be at least 2")
        if not 1 <= self.context_stride <= self.context_length:
            self.refuse("context_stride", f"must be from 1 to context_length = {self.context_length}")

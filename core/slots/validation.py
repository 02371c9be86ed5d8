"""The validation slot."""

from __future__ import annotations

from core.slots.data import Data
from core.slots.metric import Metric
from core.slots.sampler import DDIM, Sampler
from core.slots.slot import Slot


class Validation(Slot):
    """What is measured on held-out data, and how often. The end of a run always validates and samples."""

    every: int = 1000
    """Updates between validation losses (fixed noise and timesteps). 0: only at the end."""
    sample_every: int = 5000
    """Updates between samples and reconstructions. 0: only at the end."""
    data: Data | None = None
    """None: the held-out part of the training data."""
    batch_size: int = 4
    """Samples a rank holds at a time."""
    num_batches: int = 8
    """Batches of the validation loss, over all ranks."""
    num_samples: int = 4
    """Clips that are generated and shown."""
    metric_clips: int = 0
    """Clips that are generated for the Fréchet distance and the metric at the end of the run. 0: there is neither."""
    metric: Metric | None = None
    """What the clips are scored by besides the Fréchet distance."""
    sampler: Sampler = DDIM()
    """How samples are made."""
    prompts: tuple[str, ...] = ()
    """Texts of the samples, in turn. None given: the captions of the first held-out clips."""
    fps: int = 8
    """Frames a second of the clips that are written."""

    @property
    def generates(self) -> bool:
        """Whether a run makes samples, now and then or at its end."""
        return self.num_samples > 0 or self.metric_clips > 0

    def check(self) -> None:
        for name in ("every", "sample_every", "num_samples", "metric_clips"):
            if getattr(self, name) < 0:
                self.refuse(name, "must not be negative")
        for name in ("batch_size", "num_batches", "fps"):
            if getattr(self, name) < 1:
                self.refuse(name, "must be at least 1")
        if 0 < self.metric_clips < 8:
            self.refuse("metric_clips", "a Fréchet distance needs at least 8 clips")

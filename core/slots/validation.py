"""The validation slot, and the samplers it can use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from core.slots.data import Data
from core.slots.metric import Metric
from core.slots.slot import Slot

if TYPE_CHECKING:
    from core.slots.objective import Objective


class Sampler(Slot):
    """How noise becomes samples."""

    num_inference_steps: int = 50
    """Denoising steps."""
    guidance_scale: float = 1.0
    """Classifier-free guidance (arXiv 2207.12598): 1 is the conditional model, 0 the unconditional one, more is beyond.
    """
    negative_prompt: str = ""
    """What guidance leads away from. Empty: the unconditional model."""

    def check(self) -> None:
        if self.guidance_scale < 0:
            self.refuse("guidance_scale", "must not be negative")
        if self.num_inference_steps < 1:
            self.refuse("num_inference_steps", "must be at least 1")

    def build(self, objective: Objective) -> Any:
        """The diffusers scheduler for this objective."""
        raise NotImplementedError


class DDIM(Sampler):
    """DDIM (arXiv 2010.02502) as LVDM runs it: leading timesteps offset by one, the last step goes to abar_0."""

    eta: float = 0.0
    """0: deterministic, 1: as noisy as DDPM."""
    clip_x0: float | None = None
    """Clamp the predicted clean sample to this range at every step. None: no clamping."""

    def check(self) -> None:
        super().check()
        if not 0.0 <= self.eta <= 1.0:
            self.refuse("eta", "must be in [0, 1]")
        if self.clip_x0 is not None and self.clip_x0 <= 0:
            self.refuse("clip_x0", "must be positive, or None for no clamping")

    def build(self, objective: Objective) -> Any:
        from core.sampling import ddim

        return ddim(
            beta_start=objective.beta_start,
            beta_end=objective.beta_end,
            beta_schedule=objective.beta_schedule,
            num_train_timesteps=objective.num_train_timesteps,
            prediction_type=objective.prediction_type,
            clip_sample=self.clip_x0 is not None,
            clip_sample_range=self.clip_x0 or 1.0,
        )


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

    def check(self) -> None:
        for name in ("every", "sample_every", "num_samples", "metric_clips"):
            if getattr(self, name) < 0:
                self.refuse(name, "must not be negative")
        for name in ("batch_size", "num_batches", "fps"):
            if getattr(self, name) < 1:
                self.refuse(name, "must be at least 1")
        if 0 < self.metric_clips < 8:
            self.refuse("metric_clips", "a Fréchet distance needs at least 8 clips")

"""The objective of a diffusion system: noise schedule, prediction target, loss."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from core.slots.slot import Slot


class Objective(Slot):
    """DDPM training (arXiv 2006.11239): x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, t uniform."""

    since: ClassVar[dict[str, Any]] = {"noise_offset": 0.0}

    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    """What the network predicts."""
    loss: Literal["l1", "mse", "huber"] = "mse"
    """Distance between prediction and target, averaged over everything."""
    beta_start: float = 0.00085
    """First noise variance."""
    beta_end: float = 0.012
    """Last noise variance."""
    beta_schedule: Literal["scaled_linear", "linear"] = "scaled_linear"
    """scaled_linear: the square roots are spaced evenly."""
    num_train_timesteps: int = 1000
    """Steps of the schedule."""
    snr_gamma: float | None = None
    """Min-SNR loss weight (arXiv 2303.09556), e.g. 5.0. None: every timestep counts the same."""
    noise_offset: float = 0.0
    """Times a normal number that one channel of a sample shares is added to the noise, and to what is predicted: very
    dark and very bright pictures are then learnt too (crosslabs.org, offset noise). Usual: 0.05 to 0.1."""

    def check(self) -> None:
        if self.noise_offset < 0:
            self.refuse("noise_offset", "must not be negative")
        if not 0.0 < self.beta_start <= self.beta_end < 1.0:
            self.refuse("beta_start", f"need 0 < beta_start <= beta_end < 1 (beta_end is {self.beta_end})")
        if self.num_train_timesteps < 2:
            self.refuse("num_train_timesteps", "needs at least 2")

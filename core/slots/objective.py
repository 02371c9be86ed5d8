"""The objective of a diffusion system: noise schedule, prediction target, loss."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from core.slots.slot import Slot


class Objective(Slot):
    """DDPM training (arXiv 2006.11239): x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, t uniform. Or, where flow is
    predicted, that of a rectified flow (arXiv 2209.03003): x_s = (1 - s) x_0 + s noise.
    """

    since: ClassVar[dict[str, Any]] = {
        "noise_offset": 0.0,
        "zero_terminal_snr": False,
        "timestep_strata": 1,
        "flow_density": "uniform",
        "flow_mean": 0.0,
        "flow_std": 1.0,
        "flow_shift": 1.0,
    }

    prediction_type: Literal["epsilon", "v_prediction", "sample", "flow"] = "epsilon"
    """What the network predicts. flow: noise - x_0, at noise levels s; betas then mean nothing."""
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
    zero_terminal_snr: bool = False
    """Scale the schedule so that its last step is pure noise (arXiv 2305.08891, algorithm 1), where sampling starts."""
    timestep_strata: int = 1
    """The samples of an update are spread evenly over so many equal slices of the timesteps, by their places in it, on
    whatever ranks they are. Must divide loop.global_batch. 1: every sample draws from all."""
    snr_gamma: float | None = None
    """Min-SNR loss weight (arXiv 2303.09556), e.g. 5.0. None: every timestep counts the same."""
    noise_offset: float = 0.0
    """Times a normal number that one channel of a sample shares is added to the noise, and to what is predicted: very
    dark and very bright pictures are then learnt too (crosslabs.org, offset noise). Usual: 0.05 to 0.1."""
    flow_density: Literal["uniform", "logit_normal"] = "uniform"
    """How noise levels of a flow are drawn. logit_normal: those in the middle more often (arXiv 2403.03206, equation
    19)."""
    flow_mean: float = 0.0
    """Mean of the logit; above 0: less noise more often."""
    flow_std: float = 1.0
    """Deviation of the logit."""
    flow_shift: float = 1.0
    """More than 1: noise levels move up, for many pixels (arXiv 2403.03206, equation 23). Sample with the same."""

    def check(self) -> None:
        if self.noise_offset < 0:
            self.refuse("noise_offset", "must not be negative")
        if not 0.0 < self.beta_start <= self.beta_end < 1.0:
            self.refuse("beta_start", f"need 0 < beta_start <= beta_end < 1 (beta_end is {self.beta_end})")
        if self.num_train_timesteps < 2:
            self.refuse("num_train_timesteps", "needs at least 2")
        if self.timestep_strata < 1:
            self.refuse("timestep_strata", "must be at least 1, which is no strata")
        self._check_flow()

    def _check_flow(self) -> None:
        flow = self.prediction_type == "flow"
        for name in ("flow_std", "flow_shift"):
            if getattr(self, name) <= 0:
                self.refuse(name, "must be above 0")
        if self.zero_terminal_snr and self.prediction_type not in ("v_prediction", "sample"):
            why = "its last level is pure noise as it is" if flow else "pure noise says nothing of x_0; predict v"
            self.refuse("zero_terminal_snr", f"not where {self.prediction_type} is predicted: {why}")
        if flow and self.snr_gamma is not None:
            self.refuse("snr_gamma", "must be None for a flow, whose levels are weighed by how often they are drawn")
        plain = {"flow_density": "uniform", "flow_mean": 0.0, "flow_std": 1.0, "flow_shift": 1.0}
        for name, value in plain.items():
            if not flow and getattr(self, name) != value:
                self.refuse(name, f"must be {value!r} unless prediction_type is 'flow'")

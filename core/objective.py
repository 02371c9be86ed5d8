"""What a diffusion network is trained on: the noise schedule, what it is to predict, the distance and its weight.

The noise of a sample at time t is x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise (arXiv 2006.11239, equation 4),
abar_t the product of 1 - beta up to t. Everything here is a pure function of its arguments; who draws t and the noise
is someone else's business.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from core.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from core.slots import Objective

PredictionType = Literal["epsilon", "v_prediction", "sample"]
BetaSchedule = Literal["scaled_linear", "linear"]


def betas_of(start: float, end: float, schedule: str, steps: int) -> Tensor:
    """Noise variances (steps,) float64: evenly spaced, or with evenly spaced square roots ("scaled_linear", arXiv
    2112.10752).
    """
    if schedule == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float64)
    if schedule == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64).square()
    raise _unknown("beta_schedule", schedule, ("scaled_linear", "linear"))


def without_terminal_signal(alphas_cumprod: Tensor) -> Tensor:
    """abar (T,) with its root shifted and scaled so that the first stays and the last is 0 (arXiv 2305.08891, algorithm
    1).
    """
    root = alphas_cumprod.sqrt()
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))).square()


def _unknown(field: str, value: str, known: tuple[str, ...]) -> UserError:
    return UserError(f"{field} {value!r}: expected one of {', '.join(known)}{did_you_mean(value, known)}")


class NoiseSchedule:
    """Tables over the timesteps 0 ... T - 1, computed in float64, looked up in float32 on the device of the samples."""

    def __init__(
        self,
        beta_start: float,
        beta_end: float,
        beta_schedule: str = "scaled_linear",
        num_train_timesteps: int = 1000,
        zero_terminal_snr: bool = False,
    ) -> None:
        self.betas = betas_of(beta_start, beta_end, beta_schedule, num_train_timesteps)
        self.alphas_cumprod = torch.cumprod(1.0 - self.betas, dim=0)
        if zero_terminal_snr:
            self.alphas_cumprod = without_terminal_signal(self.alphas_cumprod)
            self.betas = 1.0 - self.alphas_cumprod / F.pad(self.alphas_cumprod[:-1], (1, 0), value=1.0)
        self._tables = {
            "alpha": self.alphas_cumprod.sqrt(),
            "sigma": (1.0 - self.alphas_cumprod).sqrt(),
            "snr": self.snr,
        }
        # copied to a device once: a copy in every step would wait for it
        self._on_device: dict[tuple[str, torch.device], Tensor] = {}

    def __len__(self) -> int:
        return len(self.betas)

    @property
    def snr(self) -> Tensor:
        """abar / (1 - abar) (T,) float64 (arXiv 2107.00630, equation 1 with alpha^2 = abar)."""
        return self.alphas_cumprod / (1.0 - self.alphas_cumprod)

    @property
    def last(self) -> int:
        """The timestep of most noise."""
        return len(self) - 1

    def times(self, u: Tensor) -> Tensor:
        """Timesteps (B,) int64 at quantiles u (B,) in [0, 1]."""
        return (u * len(self)).long().clamp_(max=len(self) - 1)

    def _at(self, table: str, t: Tensor, like: Tensor | None = None) -> Tensor:
        """Entries at t (B,) float32, as (B, 1, ..., 1) beside `like`."""
        key = (table, t.device)
        if key not in self._on_device:
            self._on_device[key] = self._tables[table].float().to(t.device)
        values = self._on_device[key][t]
        return values if like is None else values.view(-1, *[1] * (like.dim() - 1))

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t of samples (B, ...) at t (B,) int64, float32 (arXiv 2006.11239, equation 4)."""
        return self._at("alpha", t, x0) * x0.float() + self._at("sigma", t, x0) * noise.float()

    def target(self, x0: Tensor, noise: Tensor, t: Tensor, prediction_type: str) -> Tensor:
        """What the network is to output: the noise; v = alpha noise - sigma x_0 (arXiv 2202.00512, section 4); or
        x_0.
        """
        if prediction_type == "epsilon":
            return noise
        if prediction_type == "v_prediction":
            return self._at("alpha", t, x0) * noise - self._at("sigma", t, x0) * x0
        if prediction_type == "sample":
            return x0
        raise _unknown_prediction(prediction_type)

    def to_x0_and_epsilon(self, output: Tensor, x_t: Tensor, t: Tensor, prediction_type: str) -> tuple[Tensor, Tensor]:
        """The clean sample and the noise that an output stands for (arXiv 2202.00512, appendix D)."""
        alpha, sigma = self._at("alpha", t, x_t), self._at("sigma", t, x_t)
        if prediction_type == "epsilon":
            return (x_t - sigma * output) / alpha, output
        if prediction_type == "v_prediction":
            return alpha * x_t - sigma * output, sigma * x_t + alpha * output
        if prediction_type == "sample":
            return output, (x_t - alpha * output) / sigma
        raise _unknown_prediction(prediction_type)

    def min_snr_weight(self, t: Tensor, prediction_type: str, gamma: float) -> Tensor:
        """Weight (B,) of a squared error at t: min(SNR, gamma) in terms of x_0 (arXiv 2303.09556, section 3.4), divided
        by what an error of x_0 is in terms of the prediction: SNR for the noise, SNR + 1 for v.
        """
        snr = self._at("snr", t)
        if prediction_type == "epsilon":
            return snr.clamp(max=gamma) / snr
        if prediction_type == "v_prediction":
            return snr.clamp(max=gamma) / (snr + 1.0)
        if prediction_type == "sample":
            return snr.clamp(max=gamma)
        raise _unknown_prediction(prediction_type)


class FlowSchedule:
    """Straight paths x_s = (1 - s) x_0 + s noise (arXiv 2209.03003) at timesteps T s, float32, in (0, T]."""

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        density: str = "uniform",
        mean: float = 0.0,
        std: float = 1.0,
        shift: float = 1.0,
    ) -> None:
        self.steps, self.density, self.mean, self.std, self.shift = num_train_timesteps, density, mean, std, shift

    def __len__(self) -> int:
        return self.steps

    @property
    def last(self) -> int:
        """The timestep of pure noise."""
        return self.steps

    def times(self, u: Tensor) -> Tensor:
        """Timesteps (B,) at quantiles u (B,) in [0, 1]: u of the density, then T - floor(T u), then shifted."""
        if self.density == "logit_normal":  # arXiv 2403.03206, equation 19
            inside = u.double().clamp(1e-9, 1.0 - 1e-9)
            u = (self.mean + self.std * torch.special.ndtri(inside)).sigmoid()
        levels = 1.0 - (u * self.steps).floor().clamp(max=self.steps - 1) / self.steps
        return (self.steps * self.shift * levels / (1.0 + (self.shift - 1.0) * levels)).float()  # equation 23

    def _level(self, t: Tensor, like: Tensor) -> Tensor:
        return (t.float() / self.steps).view(-1, *[1] * (like.dim() - 1))

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_s of samples (B, ...) at t (B,), float32."""
        s = self._level(t, x0)
        return (1.0 - s) * x0.float() + s * noise.float()

    def target(self, x0: Tensor, noise: Tensor, t: Tensor, prediction_type: str) -> Tensor:
        """The velocity along the path."""
        return noise.float() - x0.float()

    def min_snr_weight(self, t: Tensor, prediction_type: str, gamma: float) -> Tensor:
        raise UserError("snr_gamma: a flow has no such weight")


def schedule_of(objective: Objective) -> NoiseSchedule | FlowSchedule:
    """The paths from samples to noise that an objective means."""
    if objective.prediction_type == "flow":
        shape = (objective.flow_density, objective.flow_mean, objective.flow_std, objective.flow_shift)
        return FlowSchedule(objective.num_train_timesteps, *shape)
    ends = (objective.beta_start, objective.beta_end, objective.beta_schedule)
    return NoiseSchedule(*ends, objective.num_train_timesteps, objective.zero_terminal_snr)


def _unknown_prediction(value: str) -> UserError:
    return _unknown("prediction_type", value, ("epsilon", "v_prediction", "sample"))


def l1(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error of each sample: (B, ...) -> (B,)."""
    return (output.float() - target.float()).abs().flatten(1).mean(1)


def mse(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample: (B, ...) -> (B,)."""
    return (output.float() - target.float()).square().flatten(1).mean(1)


def huber(output: Tensor, target: Tensor) -> Tensor:
    """Half the squared error up to 1, linear beyond (Huber 1964, delta = 1), mean of each sample: (B, ...) -> (B,)."""
    return F.huber_loss(output.float(), target.float(), reduction="none").flatten(1).mean(1)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l1": l1, "mse": mse, "huber": huber}

"""From noise to samples: one function over the schedulers of diffusers, and guidance.

All randomness is handed in, by sample and by step, so that the same seed gives the same clip whatever it shares a batch
with.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from core.errors import UserError

if TYPE_CHECKING:
    from core.slots import FreeNoise

T = TypeVar("T")
Denoise = Callable[[Tensor, Tensor], Tensor]
"""(x_t (B, ...), t (B,) int64 or float) -> the model's output (B, ...)."""
DenoiseTold = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The same, told a condition (B, N, D)."""
StepNoise = Callable[[int, Sequence[int]], Tensor]
"""(index of the step, shape) -> standard normal noise."""
Generators = Callable[[int], list[torch.Generator]]
"""index of the step -> what each sample's noise is drawn from, for schedulers that draw themselves."""


def ddim(
    beta_start: float,
    beta_end: float,
    beta_schedule: str = "scaled_linear",
    num_train_timesteps: int = 1000,
    *,
    prediction_type: str = "epsilon",
    clip_sample: bool = False,
    clip_sample_range: float = 1.0,
) -> DDIMScheduler:
    """DDIM (arXiv 2010.02502) as LVDM runs it: timesteps 1 + k floor(T / S), and the last step goes to abar_0, not to
    1.

    `clip_sample` holds the predicted x_0 within +-clip_sample_range at every step; the published samples were made
    without.
    """
    return DDIMScheduler(
        num_train_timesteps=num_train_timesteps,
        beta_start=beta_start,
        beta_end=beta_end,
        beta_schedule=beta_schedule,
        prediction_type=prediction_type,
        clip_sample=clip_sample,
        clip_sample_range=clip_sample_range,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
    )


def guided(denoise_cond: Denoise, denoise_uncond: Denoise, scale: float) -> Denoise:
    """Classifier-free guidance: u + scale * (c - u) (arXiv 2207.12598, equation 6, with scale = 1 + w)."""

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        unconditional = denoise_uncond(x_t, t)
        return unconditional + scale * (denoise_cond(x_t, t) - unconditional)

    return denoise


def told(denoise: DenoiseTold, conditional: Tensor, unconditional: Tensor | None, scale: float) -> Denoise:
    """A model with its condition (B, N, D) filled in, guided as in `guided`; both predictions in one forward pass of a
    doubled batch.

    Scale 1 is the conditional model and 0 the unconditional one, in a forward pass of their own.
    """
    alone = {1.0: conditional, 0.0: unconditional}.get(scale)
    if alone is not None:
        return lambda x_t, t: denoise(x_t, t, alone)
    both = torch.cat([_needed(unconditional, scale), conditional])  # (2 B, N, D)

    def guided_denoise(x_t: Tensor, t: Tensor) -> Tensor:
        without, given = denoise(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        return without + scale * (given - without)

    return guided_denoise


@torch.no_grad()
def sample(
    denoise: Denoise,
    noise: Tensor,
    scheduler: Any,
    *,
    num_inference_steps: int,
    eta: float = 0.0,
    step_noise: StepNoise | None = None,
    generators: Generators | None = None,
    guidance_scale: float = 1.0,
    unconditional: Denoise | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Samples of the shape of `noise` (B, ...), float32, after `num_inference_steps` steps of a diffusers scheduler.

    `eta` is DDIM's share of fresh noise (0 none, 1 as much as DDPM); step i adds `step_noise(i, shape)`, or where the
    scheduler takes none, what it draws from `generators(i)`; without them from torch's global generator.
    `unconditional` is needed where guidance_scale is not 1. `on_step(i, x)` sees x after each step.
    """
    if guidance_scale != 1.0:
        denoise = guided(denoise, _needed(unconditional, guidance_scale), guidance_scale)
    takes = inspect.signature(scheduler.step).parameters
    if eta and "eta" not in takes:
        raise UserError(f"eta {eta}: {type(scheduler).__name__} has no eta; use DDIM, or eta 0")
    start(scheduler, num_inference_steps)
    x = noise.float() * getattr(scheduler, "init_noise_sigma", 1.0)
    scaled = getattr(scheduler, "scale_model_input", lambda x, t: x)  # flow matching has neither
    for i, t in enumerate(scheduler.timesteps):
        extra: dict[str, Any] = {"eta": eta} if "eta" in takes else {}
        if step_noise is not None and "variance_noise" in takes and (eta or "eta" not in takes):
            extra["variance_noise"] = step_noise(i, x.shape).to(x)
        elif generators is not None and "generator" in takes:
            extra["generator"] = generators(i)
        output = denoise(scaled(x, t), t.to(x.device).expand(x.shape[0]))
        x = scheduler.step(output.float(), t, x, **extra).prev_sample
        if on_step is not None:
            on_step(i, x)
    return x


def shuffled(noise: Tensor, slot: FreeNoise, generators: Sequence[torch.Generator]) -> Tensor:
    """Noise (B, C, T, H, W) whose frames beyond the first window are those a window before, in another order: each
    sample's by its own generator.
    """
    frames = noise.shape[2]
    samples = []
    for sample, generator in zip(noise.clone(), generators, strict=True):
        for at in range(slot.context_length, frames, slot.context_stride):
            begin = at - slot.context_length
            order = begin + torch.randperm(slot.context_stride, generator=generator)
            fits = min(slot.context_stride, frames - at)
            sample[:, at : at + fits] = sample[:, order[:fits]]
        samples.append(sample)
    return torch.stack(samples)


def start(scheduler: Any, steps: int) -> None:
    """Set the timesteps, and make the scheduler count its steps: it would look them up, and rounded ones may repeat."""
    scheduler.set_timesteps(_checked_steps(steps, scheduler))  # on the CPU: looking them up waits for no device
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)


def signal_at_start(scheduler: Any, steps: int) -> float:
    """Share of a clean sample's amplitude at the first timestep, sqrt(abar_t). Sampling begins with pure noise, so that
    much is missing from it; 0 for schedulers that begin at noise by construction.
    """
    start(scheduler, steps)
    table = getattr(scheduler, "alphas_cumprod", None)
    return 0.0 if table is None else float(table[round(float(scheduler.timesteps[0]))] ** 0.5)


def _needed(unconditional: T | None, guidance_scale: float) -> T:
    if unconditional is None:
        raise UserError(
            f"guidance_scale {guidance_scale}: guidance needs an unconditional prediction; use 1.0 without one"
        )
    return unconditional


def _checked_steps(steps: int, scheduler: Any) -> int:
    """LVDM's timesteps start at 1, so that T steps would visit timestep T, which no network has seen."""
    total = scheduler.config.num_train_timesteps
    leading = scheduler.config.get("timestep_spacing") in (None, "leading")
    offset = scheduler.config.get("steps_offset", 0) if leading else 0
    last = (steps - 1) * (total // steps) + offset if 0 < steps <= total else total
    if last >= total:
        raise UserError(f"num_inference_steps {steps}: expected 1 to {total}, without visiting timestep {total}")
    return steps

"""Diffusion: a denoiser trained in the latent space of a frozen autoencoder or on pixels, told a text or nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from core.distributed import is_spread
from core.draw import Draw
from core.errors import UserError
from core.free_init import rounds
from core.objective import LOSSES, FlowSchedule, NoiseSchedule, schedule_of
from core.precision import DTYPES, no_autocast
from core.sampling import Denoise, sample, shuffled, told
from core.slots import DDIM, Diffusion, FlowMatchEuler, FreeNoise, Sampler, StableDiffusionUNet, StockDDIM
from core.systems import Batch, Logs, System
from core.weights.pipelines import complete

ENCODED = 2
"""Clips encoded at a time: memory stays bounded, and oneDNN convolves 8 small clips at once five times slower (121 ms
instead of 22 for 8 clips of 16 x 64 x 64 on two cores)."""


class DiffusionSystem(System):
    """Noise is added to latents z' = scale (z + shift) of posterior samples z; the denoiser learns to take it away."""

    def __init__(self, slot: Diffusion) -> None:
        self.slot = slot
        self.trained = nn.ModuleDict({slot.denoiser.component: slot.denoiser.build()})
        self.denoiser = self.trained[slot.denoiser.component]
        self.frozen = nn.ModuleDict()
        for condition in slot.conditions:
            if condition.trained:
                self.trained[condition.component] = condition.build()
        for part in (slot.autoencoder, *slot.conditions):
            if part is not None and part.component not in self.trained:
                built = part.build().requires_grad_(False).eval()
                # not diffusers' own `to`, which warns of every change of dtype
                self.frozen[part.component] = nn.Module.to(built, DTYPES[part.dtype])  # type: ignore[union-attr]

    @functools.cached_property
    def schedule(self) -> NoiseSchedule | FlowSchedule:
        """The tables of the noise schedule, made when they are first needed: no part of the modules."""
        return schedule_of(self.slot.objective)

    @property
    def autoencoder(self) -> nn.Module | None:
        """The frozen autoencoder; None in pixel space."""
        slot = self.slot.autoencoder
        return self.frozen[slot.component] if slot is not None and slot.component in self.frozen else None

    @property
    def text(self) -> nn.Module | None:
        """The text encoder, frozen or trained; None where the denoiser is told nothing."""
        if not self.slot.conditions:
            return None
        condition = self.slot.conditions[0]
        return (self.trained if condition.trained else self.frozen)[condition.component]

    def blocks(self) -> list[nn.Module]:
        return [block for network in self.trained.values() for block in network.blocks()]  # type: ignore[operator]

    @property
    def reads_frozen_text(self) -> bool:
        """Whether the denoiser is told states that a frozen text encoder makes."""
        return self.text is not None and not self.slot.conditions[0].trained

    @torch.no_grad()
    def latents(self, batch: Batch, draw: Draw) -> Tensor:
        """Latents (B, C, T', H', W') in fp32 of a batch's clips, a sample of the posterior, which is encoded here or
        comes with the batch; pixels where there is no autoencoder.
        """
        vae = self.autoencoder
        if vae is None:
            return batch["pixel_values"]  # type: ignore[no-any-return]
        if "posterior_mean" in batch:
            mean, std = batch["posterior_mean"], batch["posterior_std"]
        else:
            mean, std = self.posterior(batch["pixel_values"])
        z = mean + std * draw.noise(mean.shape[1:], "posterior").to(mean.dtype)
        return vae.to_latents(z).float()  # type: ignore[operator, no-any-return]

    @torch.no_grad()
    def posterior(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (B, 3, T, H, W) → mean and deviation of z, (B, C, T', H', W') in the autoencoder's dtype."""
        vae = self.autoencoder
        assert vae is not None
        with no_autocast(video.device):
            parts = [vae.encode(clips) for clips in video.to(_dtype(vae)).split(ENCODED)]  # type: ignore[operator]
        return torch.cat([part.mean for part in parts]), torch.cat([part.std for part in parts])

    @torch.no_grad()
    def pixels(self, latents: Tensor) -> Tensor:
        """The inverse of `latents`: clips (B, 3, T, H, W) in [-1, 1], in fp32."""
        vae = self.autoencoder
        if vae is None:
            return latents.clamp(-1, 1)
        with no_autocast(latents.device), self.working(vae):
            z = vae.from_latents(latents).to(_dtype(vae))  # type: ignore[operator]
            # one clip at a time: decoding is the peak of memory, and a batch of clips is no faster
            return torch.cat([vae.decode(one) for one in z.split(1)]).float().clamp(-1, 1)  # type: ignore[operator]

    def states(self, captions: Sequence[str]) -> Tensor:
        """What the denoiser is told of captions: (B, N, D) in fp32, with a gradient where the text encoder is
        trained.
        """
        assert self.text is not None
        if self.slot.conditions[0].trained:
            with self.working(self.text):
                return self.text(captions).float()  # type: ignore[no-any-return]
        with torch.no_grad(), self.working(self.text), no_autocast(next(self.text.parameters()).device):
            return self.text(captions)  # type: ignore[no-any-return]

    def _told(self, batch: Batch, dropped: Sequence[bool]) -> tuple[Tensor, ...]:
        """The states of a batch's captions, read or precomputed; those of the empty caption for `dropped` samples."""
        if self.text is None:
            return ()
        if "text_states" in batch:
            if self.slot.conditions[0].trained:
                raise UserError(
                    "the data give states of captions, but this recipe trains its text encoder on the texts"
                )
            given = batch["text_states"].float()  # (B, N, D)
            lost = torch.tensor(dropped, device=given.device)[:, None, None]
            if "empty_states" in batch:
                return (torch.where(lost, batch["empty_states"].float(), given),)
            # the call of a text encoder that is spread is a collective: every rank makes it
            needed = any(dropped) or is_spread(self.text)
            return (torch.where(lost, self.states([""]), given) if needed else given,)
        if "caption" not in batch:
            raise UserError("the data give no captions, and this denoiser is told a text: take data that have them")
        return (self.states(["" if lost else text for text, lost in zip(batch["caption"], dropped, strict=True)]),)

    def _losses(self, batch: Batch, t: Tensor, draw: Draw, dropout: float = 0.0) -> Tensor:
        """Loss of each sample (B,) at timesteps t; a share `dropout` of the captions is left out."""
        objective = self.slot.objective
        condition = self._told(batch, [chance < dropout for chance in draw.chances("caption dropout")])
        x0 = self.latents(batch, draw)
        noise = draw.noise(x0.shape[1:])
        if objective.noise_offset:
            noise = noise + objective.noise_offset * draw.noise((x0.shape[1], 1, 1, 1), "noise offset")
        x_t = self.schedule.add_noise(x0, noise, t)
        if samples := getattr(self.denoiser, "samples", None):
            samples.keys = draw.keys
        output = self.denoiser(x_t, t, *condition).float()
        target = self.schedule.target(x0, noise, t, objective.prediction_type)
        losses = LOSSES[objective.loss](output, target)
        if objective.snr_gamma is not None:
            losses = losses * self.schedule.min_snr_weight(t, objective.prediction_type, objective.snr_gamma)
        return losses

    def loss(self, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        t = self.schedule.times(draw.stratified(self.slot.objective.timestep_strata, "timesteps"))
        dropout = max((getattr(condition, "dropout", 0.0) for condition in self.slot.conditions), default=0.0)
        return self._losses(batch, t, draw, dropout).mean(), {}

    @torch.no_grad()
    def evaluate(self, batch: Batch, draw: Draw) -> Logs:
        t = self.schedule.times(draw.quantiles())
        return {"loss": self._losses(batch, t, draw)}

    @torch.no_grad()
    def sample(self, prompts: Sequence[str], clip: tuple[int, int, int], sampler: Sampler, draw: Draw) -> Tensor:
        noise = draw.noise(self._latent_shape(clip), "initial")
        scheduler = sampler.build(self.slot.objective)
        denoise = self._denoise(prompts, sampler)

        def from_noise(iteration: int, noise: Tensor) -> Tensor:
            again = f" of round {iteration}" * bool(iteration)
            steps = sampler.num_inference_steps
            return sample(
                denoise,
                noise,
                scheduler,
                num_inference_steps=sampler.free_init.steps(iteration, steps) if sampler.free_init else steps,
                eta=sampler.eta if isinstance(sampler, DDIM) else 0.0,
                step_noise=lambda i, shape: draw.noise(shape[1:], f"step {i}{again}"),
                generators=lambda i: draw.generators(f"step {i}{again}"),
            )

        free = sampler.free_noise
        windows = free if free and noise.shape[2] > free.context_length else None
        with self._windows(windows), self.working(self.denoiser):
            if free and free.shuffle:
                noise = shuffled(noise, free, draw.generators("order of frames"))
            latents = self._rounds(sampler, noise, draw, from_noise) if sampler.free_init else from_noise(0, noise)
        return self.pixels(latents)

    def _windows(self, slot: FreeNoise | None) -> AbstractContextManager[None]:
        if slot is None:
            return nullcontext()
        return self.denoiser.windowed(slot)  # type: ignore[operator, no-any-return]

    def _rounds(
        self, sampler: Sampler, noise: Tensor, draw: Draw, from_noise: Callable[[int, Tensor], Tensor]
    ) -> Tensor:
        """Latents after the rounds of FreeInit."""
        assert sampler.free_init is not None
        last = torch.full((len(noise),), self.schedule.last, device=noise.device)
        return rounds(
            sampler.free_init,
            noise,
            lambda i: draw.noise(noise.shape[1:], f"round {i}"),
            from_noise,
            lambda x, noise: self.schedule.add_noise(x, noise, last),
        )

    def _denoise(self, prompts: Sequence[str], sampler: Sampler) -> Denoise:
        """The denoiser of clips of these prompts, guided."""
        dtype = _dtype(self.denoiser)
        if self.text is None:
            return lambda x_t, t: self.denoiser(x_t.to(dtype), t).float()
        given = self.states(prompts)  # (B, N, D)
        nothing = self.states([sampler.negative_prompt]).expand_as(given)
        return told(
            lambda x_t, t, states: self.denoiser(x_t.to(dtype), t, states.to(dtype)).float(),
            given,
            nothing,
            sampler.guidance_scale,
        )

    def multiples(self) -> tuple[int, int, int]:
        """One step of the innermost level of the denoiser, in pixels."""
        vae, inner = self.autoencoder, getattr(self.denoiser, "spatial_factor", 1)
        space = inner * getattr(vae, "spatial_factor", 1)
        return getattr(vae, "temporal_factor", 1), space, space

    def lost_tokens(self, prompt: str) -> int:
        counted = getattr(self.text, "lost_tokens", None)
        return int(counted(prompt)) if counted else 0

    def _exported_sampler(self) -> Sampler:
        objective = self.slot.objective
        if objective.prediction_type == "flow":
            return FlowMatchEuler(shift=objective.flow_shift)
        if objective.zero_terminal_snr:
            return StockDDIM(timestep_spacing="trailing")
        return StockDDIM() if isinstance(self.slot.denoiser, StableDiffusionUNet) else DDIM()

    def _latent_shape(self, clip: Sequence[int]) -> tuple[int, ...]:
        """Pixel (T, H, W) → latent (C, T', H', W'), by the autoencoder's own factors."""
        vae = self.autoencoder
        return (3, *clip) if vae is None else vae.latent_shape(*clip)  # type: ignore[operator, no-any-return]

    @torch.no_grad()
    def reconstruct(self, batch: Batch, draw: Draw) -> Tensor | None:
        return None if self.autoencoder is None else self.pixels(self.latents(batch, draw))

    def write_frozen(self, name: str, module: nn.Module, folder: Path, state: dict[str, Tensor]) -> None:
        if module is self.text:
            module.write(folder, state)  # type: ignore[operator]
        else:
            super().write_frozen(name, module, folder, state)

    def export(self, folder: Path, weights: dict[str, dict[str, Tensor]]) -> None:
        super().export(folder, weights)
        self._exported_sampler().build(self.slot.objective).save_pretrained(folder / "scheduler")
        if self.slot.autoencoder is None or self.autoencoder is not None:  # a run from a cache may have none of them
            complete(folder, self.slot)


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype

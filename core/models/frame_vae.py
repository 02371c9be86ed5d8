"""diffusers' stock `AutoencoderKL` over clips, one frame at a time: the first stage of latent models that grew from
Stable Diffusion (LVDM text-to-video, AnimateDiff, LDM).

A clip's frames are folded into the batch, so time is neither shortened nor mixed, and an image is a clip of one frame.
Names of tensors and config are the stock ones: weights and folders pass between the two unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL
from einops import rearrange
from torch import Tensor, nn

from core.errors import UserError
from core.models.stock import StockConfig
from core.models.video_vae import Posterior

FRAMES = 16
"""Frames that go through the network at a time where nothing has to be kept for a backward pass. At 256 x 256 one frame
costs 273 GFLOP to encode and 622 to decode, so that 16 keep any device busy."""


class FrameAutoencoder(StockConfig, AutoencoderKL):
    """Clips (B, 3, T, H, W) in [-1, 1] to a posterior of z (B, C, T, H / f, W / f) and back.

    A denoiser sees latents = scale * (z + shift). The config holds them as diffusers does: `scaling_factor` = scale and
    `shift_factor` = -shift (None: 0).
    """

    stock: ClassVar[str] = "AutoencoderKL"
    frames_at_a_time: int = FRAMES
    """See FRAMES."""

    @property
    def temporal_factor(self) -> int:
        return 1

    @property
    def spatial_factor(self) -> int:
        return 2 ** (len(self.config.block_out_channels) - 1)

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, T, H / f, W / f) of the latents of a clip."""
        self._check(num_frames, height, width)
        space = self.spatial_factor
        return self.config.latent_channels, num_frames, height // space, width // space

    def _check(self, num_frames: int, height: int, width: int) -> None:
        space = self.spatial_factor
        if num_frames < 1 or height % space or width % space or not height * width:
            raise UserError(
                f"clip of {num_frames} frames at {height} x {width}: the autoencoder needs at least 1 frame, and "
                f"height and width in multiples of {space}"
            )

    def blocks(self) -> list[nn.Module]:
        """Units for activation checkpointing, compilation and sharding, in the order of their calls."""
        encoder, decoder = self.encoder, self.decoder
        return [*encoder.down_blocks, encoder.mid_block, decoder.mid_block, *decoder.up_blocks]

    def encode(self, video: Tensor) -> Posterior:
        """(B, 3, T, H, W) in [-1, 1] -> the posterior of z."""
        self._check(*video.shape[2:])
        return Posterior.of(self._by_frame(self._encode, video.to(self.dtype)))

    def decode(self, z: Tensor) -> Tensor:
        """z (B, C, T, h, w) -> (B, 3, T, H, W), about [-1, 1], not clamped."""
        return self._by_frame(lambda frames: self._decode(frames).sample, z.to(self.dtype))

    def to_latents(self, z: Tensor) -> Tensor:
        """What a denoiser sees: scale * (z + shift), the shift first."""
        scale, shift = self.constants_of(self.config)
        return scale * (z + shift)

    def from_latents(self, latents: Tensor) -> Tensor:
        """z of latents: the inverse of `to_latents`."""
        scale, shift = self.constants_of(self.config)
        return latents / scale - shift

    @staticmethod
    def constants_of(config: Mapping[str, Any]) -> tuple[float, float]:
        """Scale and shift in a config; a stock one without them means diffusers' own default, Stable Diffusion's."""
        return config.get("scaling_factor", 0.18215), -(config.get("shift_factor") or 0.0)

    @staticmethod
    def constants_config(scale: float, shift: float) -> dict[str, float]:
        """The entries of a config that say latents = scale * (z + shift)."""
        return {"scaling_factor": scale, "shift_factor": 0.0 - shift}

    def forward(self, video: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Posterior]:
        """The reconstruction from the posterior's mean, or from its sample if noise is given, and the posterior."""
        posterior = self.encode(video)
        return self.decode(posterior.mean if noise is None else posterior.sample(noise)), posterior

    def _by_frame(self, network: Callable[[Tensor], Tensor], video: Tensor) -> Tensor:
        """A 2D network over every frame of (B, C, T, H, W), a few at a time unless a backward pass needs them all."""
        frames = rearrange(video, "b c t h w -> (b t) c h w")
        at_a_time = len(frames) if torch.is_grad_enabled() else self.frames_at_a_time
        done = torch.cat([network(part) for part in frames.split(at_a_time)])
        return rearrange(done, "(b t) c h w -> b c t h w", b=len(video))

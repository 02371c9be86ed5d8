"""diffusers' stock `UNet2DConditionModel` as a denoiser of clips, frame by frame: LDM's and Stable Diffusion's UNet.

Names of tensors and config are the stock ones: weights and folders pass between the two unchanged.
"""

from __future__ import annotations

from typing import ClassVar, TypeVar

from diffusers import UNet2DConditionModel
from einops import rearrange
from torch import Tensor, nn

from core.models.stock import StockConfig

M = TypeVar("M", bound=nn.Module)


class ImageUNet(StockConfig, UNet2DConditionModel):
    """Predicts the target of (B, C, T, H, W) latents at timesteps (B,), told a text (B, N, cross_attention_dim)."""

    stock: ClassVar[str] = "UNet2DConditionModel"

    @property
    def spatial_factor(self) -> int:
        """What height and width must be multiples of."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def blocks(self) -> list[nn.Module]:
        """Units for activation checkpointing, compilation and sharding, in the order of their calls."""
        return [*self.down_blocks, self.mid_block, *self.up_blocks]

    def forward(self, x: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        frames = rearrange(x, "b c t h w -> (b t) c h w")
        steps = timesteps.reshape(-1).expand(len(x)).repeat_interleave(x.shape[2])
        text = encoder_hidden_states.repeat_interleave(x.shape[2], dim=0)  # (B T, N, D)
        out = super().forward(frames, steps, text).sample
        return rearrange(out, "(b t) c h w -> b c t h w", b=len(x)).to(x.dtype)


def zero_outputs(unet: M) -> M:
    """Zero the layers that CompVis' UNet starts at zero, and diffusers' constructor does not: the last convolution of
    the network, of every residual block, and of every transformer. A fresh network then outputs exactly zero.

    The rest is torch's own start, uniform within 1 / sqrt(fan-in), which is what the reference draws.
    """
    for name, layer in unet.named_modules():
        if name.rpartition(".")[2] in ("conv_out", "conv2", "proj_out"):
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)
    return unet

"""Autoencoder slots: what maps videos to latents and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from core.slots.slot import Slot

if TYPE_CHECKING:
    from torch import nn


class Autoencoder(Slot):
    """Maps pixels (B, 3, T, H, W) to latents (B, C, T', H', W') and back."""

    component: ClassVar[str] = "vae"
    """Its name in checkpoints, and its folder in an export."""

    weights: str | None = None
    """Trained weights: a folder, a checkpoint file, a hub id, run:<id> or shipped:<name>. Needed wherever it is frozen.
    """
    source: str = ""
    """Where weights for it were published; shown when they are missing."""
    fetch: str = ""
    """The command that gets them."""
    scale_factor: float | None = None
    """Latents are scale * (z + shift). None: the constants stored with the weights."""
    shift_factor: float | None = None
    """See scale_factor."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What it computes in where it is frozen."""

    def check(self) -> None:
        if (self.scale_factor is None) != (self.shift_factor is None):
            self.refuse("scale_factor", "give scale_factor and shift_factor together, or neither")

    def build(self) -> nn.Module:
        """The network with fresh weights, on torch's current default device."""
        raise NotImplementedError


class VideoVAE(Autoencoder):
    """The 3D KL autoencoder of LVDM (arXiv 2211.13221): 4x in time, 8x8 in space, 4 latent channels."""

    source: str = "the authors' checkpoint ae/ae_sky.ckpt, hub Yingqing/LVDM"
    fetch: str = "hf download Yingqing/LVDM ae/ae_sky.ckpt --local-dir weights/lvdm"
    n_hiddens: int = 32
    """Width; the encoder ends at 8 times this."""
    downsample: tuple[int, int, int] = (4, 8, 8)
    """Factors in time, height and width (powers of two)."""
    z_channels: int = 4
    """Channels before the quantisation convolution."""
    embed_dim: int = 4
    """Channels of the latents."""
    norm_num_groups: int = 32
    """Groups of every group norm; must divide twice n_hiddens."""

    def check(self) -> None:
        super().check()
        if any(f < 1 or f & (f - 1) for f in self.downsample):
            self.refuse("downsample", "each factor must be a power of two")
        if (2 * self.n_hiddens) % self.norm_num_groups:
            self.refuse("norm_num_groups", f"must divide 2 * n_hiddens = {2 * self.n_hiddens}")

    def build(self) -> nn.Module:
        from core.models.video_vae import VideoAutoencoder

        return VideoAutoencoder(
            n_hiddens=self.n_hiddens,
            downsample=self.downsample,
            z_channels=self.z_channels,
            embed_dim=self.embed_dim,
            norm_num_groups=self.norm_num_groups,
            scale_factor=1.0 if self.scale_factor is None else self.scale_factor,
            shift_factor=0.0 if self.shift_factor is None else self.shift_factor,
        )


class FrameVAE(Autoencoder):
    """diffusers' `AutoencoderKL` on every frame by itself: nothing is shared over time. Defaults: Stable Diffusion 1.x.

    83,653,863 parameters, 8x8 in space, 4 latent channels, arXiv 2112.10752.
    """

    source: str = (
        "any Stable Diffusion 1.x autoencoder, e.g. the folder vae of hub stable-diffusion-v1-5/stable-diffusion-v1-5"
    )
    fetch: str = "hf download stable-diffusion-v1-5/stable-diffusion-v1-5 --include 'vae/*' --local-dir weights/sd15"
    scale_factor: float | None = 0.18215
    """Latents are scale * (z + shift). None: the constants stored with the weights."""
    shift_factor: float | None = 0.0
    """See scale_factor."""
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    """Width of each level; space is halved between two."""
    layers_per_block: int = 2
    """Residual blocks of a level of the encoder; the decoder has one more."""
    latent_channels: int = 4
    """Channels of the latents."""
    norm_num_groups: int = 32
    """Groups of every group norm; must divide each width."""

    def check(self) -> None:
        super().check()
        if not self.block_out_channels or any(c % self.norm_num_groups for c in self.block_out_channels):
            self.refuse("block_out_channels", f"each must be a multiple of norm_num_groups = {self.norm_num_groups}")
        if self.layers_per_block < 1 or self.latent_channels < 1:
            self.refuse("layers_per_block", "layers_per_block and latent_channels must be at least 1")

    def build(self) -> nn.Module:
        from core.models.frame_vae import FrameAutoencoder

        levels = len(self.block_out_channels)
        scale, shift = (1.0, 0.0) if self.scale_factor is None else (self.scale_factor, self.shift_factor)
        return FrameAutoencoder(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=self.block_out_channels,
            layers_per_block=self.layers_per_block,
            latent_channels=self.latent_channels,
            norm_num_groups=self.norm_num_groups,
            sample_size=512,
            **FrameAutoencoder.constants_config(scale, shift or 0.0),
        )

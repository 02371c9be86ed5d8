"""Denoiser slots: the networks that are trained to take noise away."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from core.slots.slot import Slot

if TYPE_CHECKING:
    from torch import nn


class Denoiser(Slot):
    """A network `denoiser(x_t, t, encoder_hidden_states)` over (B, C, T, H, W)."""

    component: ClassVar[str] = "unet"
    """Its name in checkpoints, and its folder in an export."""

    in_channels: int = 4
    """Channels of the noisy input."""

    def build(self) -> nn.Module:
        """The network with fresh weights, on torch's current default device."""
        raise NotImplementedError


class LVDMShortUNet(Denoiser):
    """The unconditional UNet of LVDM (arXiv 2211.13221) with split space/time attention; no temporal convolution."""

    out_channels: int = 4
    """Channels of the prediction."""
    model_channels: int = 256
    """Width of the first level."""
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    """Width of each level in model_channels; the first must be 1."""
    num_res_blocks: int = 3
    """Residual blocks of a level."""
    attention_resolutions: tuple[int, ...] = (8, 4, 2)
    """Downsampling factors at which there is attention (1: full size). The middle block always has it."""
    num_heads: int = 4
    """Attention heads; the head width follows from the channels."""
    temporal_length: int = 4
    """Distance in latent frames at which relative positions are clipped."""
    use_relative_position: bool = True
    """Learned relative positions in temporal attention (with the transposed key term of the published weights)."""
    use_scale_shift_norm: bool = True
    """The time embedding scales and shifts the norm, instead of being added."""
    frame_positions: bool = False
    """Sinusoidal frame positions, in temporal attention or in all of a transformer. Off in the published weights."""
    norm_num_groups: int = 32
    """Groups of every group norm."""
    dropout: float = 0.0
    """Dropout of the residual blocks."""

    def check(self) -> None:
        if self.channel_mult[:1] != (1,):
            self.refuse("channel_mult", "must start with 1: the output convolution takes model_channels")
        if self.model_channels % self.norm_num_groups:
            self.refuse("model_channels", f"must be a multiple of norm_num_groups = {self.norm_num_groups}")
        if any((self.model_channels * m) % self.num_heads for m in self.channel_mult):
            self.refuse("num_heads", "must divide the channels of every level")
        if not 0.0 <= self.dropout < 1.0:
            self.refuse("dropout", "must be in [0, 1)")

    def build(self) -> nn.Module:
        from core.models.lvdm_unet import LVDMUNet
        from core.slots.slot import field_types

        return LVDMUNet(**{name: getattr(self, name) for name in field_types(type(self))})


class LVDMTextUNet(LVDMShortUNet):
    """The text-to-video UNet of LVDM (arXiv 2211.13221): as LVDMShortUNet, with space/time transformers and a text."""

    model_channels: int = 320
    """Width of the first level."""
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    """Width of each level in model_channels; the first must be 1."""
    num_res_blocks: int = 2
    """Residual blocks of a level."""
    attention_resolutions: tuple[int, ...] = (4, 2, 1)
    """Downsampling factors at which there are transformers (1: full size). The middle block always has one."""
    num_heads: int = 8
    """Attention heads; the head width follows from the channels."""
    transformer_depth: int = 1
    """Blocks of a transformer."""
    context_dim: int = 768
    """Width of the text: the hidden size of the text encoder."""
    temporal_length: int = 16
    """Distance in latent frames at which relative positions are clipped."""
    use_relative_position: bool = True
    """Learned relative positions in temporal attention."""
    use_scale_shift_norm: bool = False
    """The time embedding scales and shifts the norm, instead of being added."""
    dropout: float = 0.0
    """Dropout of residual blocks and transformers."""

    def check(self) -> None:
        super().check()
        for name in ("transformer_depth", "context_dim"):
            if getattr(self, name) < 1:
                self.refuse(name, "must be at least 1")

    def build(self) -> nn.Module:
        from core.models.lvdm_text_unet import LVDMTextUNet as Network
        from core.slots.slot import field_types

        return Network(**{name: getattr(self, name) for name in field_types(type(self))})


class LDMUNet(Denoiser):
    """diffusers' `UNet2DConditionModel` as LDM's text-to-image model has it (arXiv 2112.10752): Stable Diffusion 1.x
    but for the width of the text. Pictures are clips of one frame.
    """

    out_channels: int = 4
    """Channels of the prediction."""
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    """Width of each level; space is halved between two. All but the last attend to the text."""
    layers_per_block: int = 2
    """Residual blocks of a level on the way down; one more on the way up."""
    num_heads: int = 8
    """Attention heads; the head width follows from the channels. diffusers calls it attention_head_dim."""
    context_dim: int = 1280
    """Width of the text: the hidden size of the text encoder."""
    norm_num_groups: int = 32
    """Groups of every group norm; must divide each width."""
    sample_size: int = 32
    """Side of the latents that stock pipelines make when no size is asked for. The network takes others."""

    def check(self) -> None:
        if not self.block_out_channels or any(c % self.norm_num_groups for c in self.block_out_channels):
            self.refuse("block_out_channels", f"each must be a multiple of norm_num_groups = {self.norm_num_groups}")
        if self.num_heads < 1 or any(c % self.num_heads for c in self.block_out_channels):
            self.refuse("num_heads", "must divide the channels of every level")
        for name in ("layers_per_block", "context_dim", "sample_size"):
            if getattr(self, name) < 1:
                self.refuse(name, "must be at least 1")

    def build(self) -> nn.Module:
        from core.models.image_unet import ImageUNet, zero_outputs

        inner = len(self.block_out_channels) - 1
        return zero_outputs(
            ImageUNet(
                sample_size=self.sample_size,
                in_channels=self.in_channels,
                out_channels=self.out_channels,
                block_out_channels=self.block_out_channels,
                layers_per_block=self.layers_per_block,
                down_block_types=("CrossAttnDownBlock2D",) * inner + ("DownBlock2D",),
                up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * inner,
                cross_attention_dim=self.context_dim,
                attention_head_dim=self.num_heads,
                norm_num_groups=self.norm_num_groups,
            )
        )


class OpenSoraDiT(Denoiser):
    """The transformer of Open-Sora-Plan v1.3 (arXiv 2412.00131), told a text whose padding is rows of zeros."""

    component: ClassVar[str] = "transformer"

    in_channels: int = 8
    """Channels of the noisy input."""
    out_channels: int = 8
    """Channels of the prediction."""
    patch_size: int = 2
    """Side of a patch of a latent frame, which is a token."""
    num_attention_heads: int = 24
    """Attention heads."""
    attention_head_dim: int = 96
    """Width of a head, a multiple of 6: a third of it turns with time, height and width each."""
    num_layers: int = 32
    """Blocks."""
    context_dim: int = 4096
    """Width of the text: the hidden size of the text encoder."""
    sparse_n: int = 4
    """Skiparse attention: a token attends to one in so many others, and two blocks connect all. 1: dense. Weights are
    tied to it."""
    sparse_blocks: tuple[int, int] = (2, 30)
    """The first sparse block, counted from 0, and the first dense one after it."""
    interpolation_scale_t: float = 1.0
    """Rotary positions along time are divided by this."""
    interpolation_scale_h: float = 1.0
    """The same along height."""
    interpolation_scale_w: float = 1.0
    """The same along width."""
    dropout: float = 0.0
    """Dropout after attention and within the feed-forward."""

    def check(self) -> None:
        for name in ("in_channels", "out_channels", "patch_size", "num_attention_heads", "num_layers", "context_dim"):
            if getattr(self, name) < 1:
                self.refuse(name, "must be at least 1")
        if self.attention_head_dim < 6 or self.attention_head_dim % 6:
            self.refuse("attention_head_dim", "must be a multiple of 6: three axes, each in pairs of coordinates")
        if self.sparse_n < 1:
            self.refuse("sparse_n", "must be at least 1, which is dense attention")
        if not 0 <= self.sparse_blocks[0] <= self.sparse_blocks[1]:
            self.refuse("sparse_blocks", "must be two counts of blocks, the second not the smaller")
        for name in ("interpolation_scale_t", "interpolation_scale_h", "interpolation_scale_w"):
            if getattr(self, name) <= 0:
                self.refuse(name, "must be above 0")
        if not 0.0 <= self.dropout < 1.0:
            self.refuse("dropout", "must be in [0, 1)")

    def build(self) -> nn.Module:
        from core.models.opensora_dit import OpenSoraDiT as Network
        from core.slots.slot import field_types

        sizes = {name: getattr(self, name) for name in field_types(type(self))}
        return Network(caption_channels=sizes.pop("context_dim"), **sizes)

"""The denoiser of LVDM (He et al. 2022, arXiv 2211.13221): a UNet over (B, C, T, H, W).

Every convolution sees one frame. Time is mixed by attention only, and weakly by group norms whose statistics run over
T * H * W. Module names are those of the original (YingqingHe/LVDM), so that published state dicts fit without renaming.

Layouts were chosen on one core: tensors stay (B, C, T, H, W) contiguous. Channels last made the group norms five times
slower (0.49 ms instead of 0.08 for 32 channels, 2,048 pixels a sample) and the convolutions no faster; folding frames
into the batch changed nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from core.attention import attend, attend_frames, relative_logits, relative_rows
from core.errors import UserError


def sinusoids(positions: Tensor, dim: int) -> Tensor:
    """cos, then sin, of positions * 10000^(-2 i / dim): (N,) -> (N, dim) float32 (arXiv 1706.03762, section 3.5)."""
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=positions.device) * (-math.log(10_000) / half))
    angles = positions.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def zeroed(module: nn.Module) -> nn.Module:
    """The module with all parameters zero: a branch that starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class GroupNorm(nn.GroupNorm):
    """Group norm in float32 whatever the dtype around it; statistics run over T * H * W."""

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps).to(x.dtype)


class PixelNorm(GroupNorm):
    """The same for every pixel by itself: (B, C, T, P), statistics over the channels of a group and T.

    Written out because the library's kernel sees (B * P, C, T), rows of as few as 4 numbers: 1.2 ms instead of 0.5.
    """

    def forward(self, x: Tensor) -> Tensor:
        grouped = x.float().unflatten(1, (self.num_groups, -1))  # (B, groups, C / groups, T, P)
        centred = grouped - grouped.mean((2, 3), keepdim=True)
        scale = centred.square().mean((2, 3), keepdim=True).add(self.eps).rsqrt()
        normed = (centred * scale).flatten(1, 2)  # (B, C, T, P)
        return torch.addcmul(self.bias.float()[:, None, None], normed, self.weight.float()[:, None, None]).to(x.dtype)


class FrameConv(nn.Conv3d):
    """A convolution of each frame, kernel (1, k, k). Layers of a stage all take (x, embedding, context)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__(
            in_channels, out_channels, (1, kernel, kernel), (1, stride, stride), (0, kernel // 2, kernel // 2)
        )

    def forward(self, x: Tensor, embedding: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        return super().forward(x)


class Downsample(nn.Module):
    """Halves height and width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = FrameConv(channels, channels, stride=2)

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor | None = None) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Doubles height and width: nearest neighbours, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = FrameConv(channels, channels)

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor | None = None) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=(1.0, 2.0, 2.0), mode="nearest"))


class ResBlock(nn.Module):
    """Residual block; the time embedding (B, 4 * model_channels) shifts it, or scales and shifts it, halfway."""

    def __init__(self, channels: int, out: int, embedding: int, dropout: float, scale_shift: bool, groups: int) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.in_layers = nn.Sequential(GroupNorm(groups, channels), nn.SiLU(), FrameConv(channels, out))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * out if scale_shift else out))
        self.out_layers = nn.Sequential(
            GroupNorm(groups, out), nn.SiLU(), nn.Dropout(dropout), zeroed(FrameConv(out, out))
        )
        self.skip_connection = nn.Identity() if channels == out else FrameConv(channels, out, kernel=1)

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor | None = None) -> Tensor:
        h = self.in_layers(x)
        emb = self.emb_layers(embedding)[:, :, None, None, None].to(h.dtype)  # (B, C or 2C, 1, 1, 1)
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = self.out_layers[1:](torch.addcmul(shift, self.out_layers[0](h), 1 + scale))
        else:
            h = self.out_layers(h + emb)
        return self.skip_connection(x) + h


class TokenConv(nn.Conv1d):
    """A convolution of kernel 1 over tokens (..., C): the matrix product, on a parameter of shape (C', C, 1)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.squeeze(-1), self.bias)


class RelativePosition(nn.Module):
    """A learned row for every distance in frames, clipped at `reach`, shared by all heads."""

    def __init__(self, head_dim: int, reach: int) -> None:
        super().__init__()
        self.reach = reach
        self.embeddings_table = nn.Parameter(torch.empty(2 * reach + 1, head_dim))
        nn.init.xavier_uniform_(self.embeddings_table)

    def forward(self, frames: int) -> Tensor:
        """Rows (T, T, head_dim) of query i and key j."""
        return self.embeddings_table[relative_rows(frames, self.reach, self.embeddings_table.device)]


class STAttentionBlock(nn.Module):
    """Attention within each frame, added; then over frames at each pixel of the sum, added."""

    def __init__(self, channels: int, heads: int, reach: int | None, frame_positions: bool, groups: int) -> None:
        super().__init__()
        self.heads, self.frame_positions = heads, frame_positions
        self.attention_backend, self.head_dim = "sdpa", channels // heads
        self.norm_s, self.norm_t = GroupNorm(groups, channels), PixelNorm(groups, channels)
        self.qkv_s, self.qkv_t = TokenConv(channels, 3 * channels), nn.Conv1d(channels, 3 * channels, 1)
        if reach is not None:
            self.relative_position_k = RelativePosition(channels // heads, reach)
            self.relative_position_v = RelativePosition(channels // heads, reach)
        self.relative = reach is not None
        self.proj_out_s, self.proj_out_t = (
            zeroed(TokenConv(channels, channels)),
            zeroed(nn.Conv1d(channels, channels, 1)),
        )

    def forward(self, x: Tensor, embedding: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        return self._time(self._space(x))

    def _space(self, x: Tensor) -> Tensor:
        b, _, t, h, w = x.shape
        frames = x.transpose(1, 2).flatten(0, 1).flatten(2)  # (B T, C, H W)
        qkv = self.qkv_s(self.norm_s(frames).transpose(1, 2))  # (B T, H W, 3 C)
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # 3 of (B T, heads, H W, head_dim)
        out = attend(q, k, v, self.attention_backend).transpose(1, 2).flatten(2)  # (B T, H W, C)
        return x + self.proj_out_s(out).unflatten(1, (h, w)).unflatten(0, (b, t)).permute(0, 4, 1, 2, 3)

    def _time(self, x: Tensor) -> Tensor:
        normed = self.norm_t(x.flatten(3))  # (B, C, T, P)
        if self.frame_positions:
            positions = sinusoids(torch.arange(x.shape[2], device=x.device), x.shape[1])
            normed = normed + positions.T[:, :, None].to(normed.dtype)
        qkv = self.qkv_t(normed.flatten(2)).unflatten(2, (x.shape[2], -1))  # (B, 3 C, T, P)
        q, k, v = qkv.unflatten(1, (3, self.heads, -1)).unbind(1)  # 3 of (B, heads, head_dim, T, P)
        out = attend_frames(q, k, v, *self._positions(q)).flatten(3).flatten(1, 2)  # (B, C, T P)
        return x + self.proj_out_t(out).view_as(x)

    def _positions(self, q: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Relative terms of logits and values. The weights were trained with the key term transposed and scaled by
        head_dim^-1/4 only: logit (i, j) gains q_j . rows[j, i] head_dim^-1/4, against equation 4 of arXiv
        1803.02155.
        """
        if not self.relative:
            return None, None
        keys = self.relative_position_k(q.shape[3]).to(q.dtype) * q.shape[2] ** -0.25
        return relative_logits(q, keys).transpose(2, 3), self.relative_position_v(q.shape[3]).to(q.dtype)


class Stage(nn.Sequential):
    """Layers in a row that share the time embedding: one entry of input_blocks or output_blocks."""

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor | None = None) -> Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x, embedding, context)
        return x


class LVDMUNet(ModelMixin, ConfigMixin):
    """Predicts the target of (B, C, T, H, W) latents at timesteps (B,). A fresh one outputs exactly zero.

    `attention_resolutions` are downsampling factors; the middle block always has attention. `temporal_length` is the
    distance at which relative positions are clipped: any number of frames works. `frame_positions` adds sinusoidal
    frame positions to the input of temporal attention (no parameters; off in the published weights).
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        in_channels: int = 4,
        out_channels: int = 4,
        model_channels: int = 256,
        attention_resolutions: Sequence[int] = (8, 4, 2),
        num_res_blocks: int = 3,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        num_heads: int = 4,
        temporal_length: int = 4,
        use_relative_position: bool = True,
        use_scale_shift_norm: bool = True,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        frame_positions: bool = False,
    ) -> None:
        super().__init__()
        width = [model_channels * mult for mult in channel_mult]
        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, 4 * model_channels), nn.SiLU(), nn.Linear(4 * model_channels, 4 * model_channels)
        )
        self.input_blocks = nn.ModuleList([Stage(FrameConv(in_channels, model_channels))])
        skips = self._down(width)
        self.middle_block = Stage(
            self._res(width[-1], width[-1]), self._attention(width[-1]), self._res(width[-1], width[-1])
        )
        self.output_blocks = nn.ModuleList()
        self._up(width, skips)
        self.out = nn.Sequential(
            GroupNorm(norm_num_groups, width[0]), nn.SiLU(), zeroed(FrameConv(model_channels, out_channels))
        )

    def _down(self, width: list[int]) -> list[int]:
        """Fills input_blocks; the channels that each one hands to output_blocks."""
        channels = self.config.model_channels
        skips = [channels]
        for level, out in enumerate(width):
            for _ in range(self.config.num_res_blocks):
                self.input_blocks.append(Stage(self._res(channels, out), *self._attentions(level, out)))
                channels = out
                skips.append(channels)
            if level < len(width) - 1:
                self.input_blocks.append(Stage(Downsample(channels)))
                skips.append(channels)
        return skips

    def _up(self, width: list[int], skips: list[int]) -> None:
        """Fills output_blocks; one more a level than on the way down, the last of a level doubles height and width."""
        channels = width[-1]
        for level, out in reversed(list(enumerate(width))):
            for i in range(self.config.num_res_blocks + 1):
                layers = [self._res(channels + skips.pop(), out), *self._attentions(level, out)]
                if level and i == self.config.num_res_blocks:
                    layers.append(Upsample(out))
                self.output_blocks.append(Stage(*layers))
                channels = out

    def _res(self, channels: int, out: int) -> ResBlock:
        c = self.config
        return ResBlock(channels, out, 4 * c.model_channels, c.dropout, c.use_scale_shift_norm, c.norm_num_groups)

    def _attentions(self, level: int, channels: int) -> list[nn.Module]:
        return [self._attention(channels)] if 2**level in self.config.attention_resolutions else []

    def _attention(self, channels: int) -> nn.Module:
        """The one place that chooses the attention block."""
        c = self.config
        reach = c.temporal_length if c.use_relative_position else None
        return STAttentionBlock(channels, c.num_heads, reach, c.frame_positions, c.norm_num_groups)

    @property
    def spatial_factor(self) -> int:
        """What height and width must be multiples of."""
        return int(2 ** (len(self.config.channel_mult) - 1))

    def blocks(self) -> list[nn.Module]:
        """Units for activation checkpointing, compilation and sharding: each is called once a forward."""
        return [*self.input_blocks[1:], self.middle_block, *self.output_blocks]

    def forward(self, x: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor | None = None) -> Tensor:
        """(B, C, T, H, W) and (B,) or a 0-d timestep -> (B, out_channels, T, H, W) in the dtype of x."""
        self._check(x)
        dtype = next(self.time_embed.parameters()).dtype
        steps = timesteps.reshape(-1).expand(x.shape[0])
        embedding = self.time_embed(sinusoids(steps, self.config.model_channels).to(dtype))  # (B, 4 C)
        condition = (embedding,) if encoder_hidden_states is None else (embedding, encoder_hidden_states.to(dtype))
        h, skips = x.to(dtype), []
        for block in self.input_blocks:
            h = block(h, *condition)
            skips.append(h)
        h = self.middle_block(h, *condition)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), *condition)
        return self.out(h).to(x.dtype)

    def _check(self, x: Tensor) -> None:
        factor = self.spatial_factor
        if x.shape[1] != self.config.in_channels or x.shape[3] % factor or x.shape[4] % factor:
            raise UserError(
                f"x {tuple(x.shape)}: expected (B, {self.config.in_channels}, T, H, W), H and W multiples of {factor}"
            )

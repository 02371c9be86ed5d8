"""The text-to-video denoiser of LVDM (He et al. 2022, arXiv 2211.13221): the same UNet with space/time transformers.

Module names are those of the original (YingqingHe/LVDM), so that published state dicts fit without renaming. Inside a
transformer everything is tokens (B, T, P, C), P the pixels of a frame: each attention is then a view, and the text is
attended to by all frames at once instead of being repeated for each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from core.attention import attend, attend_frames, relative_logits
from core.errors import UserError
from core.models.lvdm_unet import FrameConv, GroupNorm, LVDMUNet, RelativePosition, sinusoids, zeroed


class Attention(nn.Module):
    """Projections of an attention over tokens; `context_dim` is the width of what is attended to."""

    def __init__(self, channels: int, heads: int, context_dim: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.head_dim, self.attention_backend = heads, channels // heads, "sdpa"
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim, channels, bias=False)
        self.to_v = nn.Linear(context_dim, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels), nn.Dropout(dropout))

    def split(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, heads, N, head_dim)."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def attend(self, x: Tensor, context: Tensor) -> Tensor:
        """Queries (B, N, C) to `context` (B, N', context_dim) -> (B, N, C)."""
        q, k, v = (self.split(part) for part in (self.to_q(x), self.to_k(context), self.to_v(context)))
        return self.to_out(attend(q, k, v, self.attention_backend).transpose(1, 2).flatten(2))


class SpatialAttention(Attention):
    """Over the pixels of each frame; over the text where there is one."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if context is not None:
            return self.attend(x.flatten(1, 2), context).view_as(x)  # every frame's pixels are queries to one text
        frames = x.flatten(0, 1)  # (B T, P, C)
        return self.attend(frames, frames).view_as(x)


class TemporalAttention(Attention):
    """Over the frames at each pixel. Starts as the identity: all projections are zero.

    A gradient then enters through the relative positions of the values alone, so without them (`reach` None) only the
    output projection is zero.
    """

    def __init__(self, channels: int, heads: int, reach: int | None, dropout: float) -> None:
        super().__init__(channels, heads, channels, dropout)
        self.relative = reach is not None
        zeroed(self.to_out if reach is None else self)
        if reach is not None:
            self.relative_position_k = RelativePosition(self.head_dim, reach)
            self.relative_position_v = RelativePosition(self.head_dim, reach)

    def split_frames(self, x: Tensor) -> Tensor:
        """(B, T, P, C) -> (B, heads, head_dim, T, P)."""
        return x.unflatten(3, (self.heads, -1)).permute(0, 3, 4, 1, 2)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        q, k, v = (self.split_frames(project(x)) for project in (self.to_q, self.to_k, self.to_v))
        out = attend_frames(q, k, v, *self._positions(q))  # (B, heads, head_dim, T, P)
        return self.to_out(out.permute(0, 3, 4, 1, 2).flatten(3))

    def _positions(self, q: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Relative terms of logits and values (arXiv 1803.02155, equations 3 and 4), here the usual way round."""
        if not self.relative:
            return None, None
        keys = self.relative_position_k(q.shape[3]).to(q.dtype) * self.head_dim**-0.5
        return relative_logits(q, keys), self.relative_position_v(q.shape[3]).to(q.dtype)


class GEGLU(nn.Module):
    """x * GELU(gate), exact; the gate is the second half (arXiv 2002.05202, equation 6)."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * out)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU four times as wide, and back."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Dropout(dropout), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class SpaceTimeBlock(nn.Module):
    """Space, time, text, time again, feed-forward, each on a layer norm and added. The norms' numbers are not in the
    order of use.
    """

    def __init__(self, channels: int, heads: int, context_dim: int, reach: int | None, dropout: float) -> None:
        super().__init__()
        self.attn1 = SpatialAttention(channels, heads, channels, dropout)
        self.attn1_tmp = TemporalAttention(channels, heads, reach, dropout)
        self.attn2 = SpatialAttention(channels, heads, context_dim, dropout)
        self.attn2_tmp = TemporalAttention(channels, heads, reach, dropout)
        self.ff = FeedForward(channels, dropout)
        self.norm1, self.norm2, self.norm3, self.norm4, self.norm5 = (nn.LayerNorm(channels) for _ in range(5))

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn1_tmp(self.norm4(x))
        x = x + self.attn2(self.norm2(x), context)
        x = x + self.attn2_tmp(self.norm5(x))
        return x + self.ff(self.norm3(x))


class SpatialTemporalTransformer(nn.Module):
    """Transformer blocks over (B, C, T, H, W), added to the input. Starts as the identity.

    Frame positions are added to the tokens, so that the text and the feed-forward see them too, not the attention over
    frames alone: a small network then learns in a thousand steps which way a cloud is told to drift.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        depth: int,
        context_dim: int,
        reach: int | None,
        frame_positions: bool,
        dropout: float,
        groups: int,
    ) -> None:
        super().__init__()
        self.frame_positions = frame_positions
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = FrameConv(channels, channels, kernel=1)
        self.transformer_blocks = nn.ModuleList(
            SpaceTimeBlock(channels, heads, context_dim, reach, dropout) for _ in range(depth)
        )
        self.proj_out = zeroed(FrameConv(channels, channels, kernel=1))

    def forward(self, x: Tensor, embedding: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        tokens = self.proj_in(self.norm(x)).flatten(3).permute(0, 2, 3, 1)  # (B, T, P, C)
        if self.frame_positions:
            tokens = tokens + sinusoids(torch.arange(x.shape[2], device=x.device), x.shape[1])[:, None].to(tokens.dtype)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + self.proj_out(tokens.permute(0, 3, 1, 2).unflatten(3, x.shape[3:]).contiguous())


class LVDMTextUNet(LVDMUNet):
    """Predicts the target of (B, C, T, H, W) latents at timesteps (B,), told a text (B, N, context_dim).

    As `LVDMUNet`, with space/time transformers where that has attention. A fresh one outputs exactly zero.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        in_channels: int = 4,
        out_channels: int = 4,
        model_channels: int = 320,
        attention_resolutions: Sequence[int] = (4, 2, 1),
        num_res_blocks: int = 2,
        channel_mult: Sequence[int] = (1, 2, 4, 4),
        num_heads: int = 8,
        transformer_depth: int = 1,
        context_dim: int = 768,
        temporal_length: int = 16,
        use_relative_position: bool = True,
        use_scale_shift_norm: bool = False,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        frame_positions: bool = False,
    ) -> None:
        super().__init__(
            in_channels=in_channels,
            out_channels=out_channels,
            model_channels=model_channels,
            attention_resolutions=attention_resolutions,
            num_res_blocks=num_res_blocks,
            channel_mult=channel_mult,
            num_heads=num_heads,
            temporal_length=temporal_length,
            use_relative_position=use_relative_position,
            use_scale_shift_norm=use_scale_shift_norm,
            dropout=dropout,
            norm_num_groups=norm_num_groups,
            frame_positions=frame_positions,
        )

    def _attention(self, channels: int) -> nn.Module:
        c = self.config
        return SpatialTemporalTransformer(
            channels,
            heads=c.num_heads,
            depth=c.transformer_depth,
            context_dim=c.context_dim,
            reach=c.temporal_length if c.use_relative_position else None,
            frame_positions=c.frame_positions,
            dropout=c.dropout,
            groups=c.norm_num_groups,
        )

    def forward(self, x: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor | None = None) -> Tensor:
        """(B, C, T, H, W), (B,) and (B, N, context_dim) -> (B, out_channels, T, H, W) in the dtype of x.

        Without a text every frame attends to itself in its place; that needs context_dim channels at every level.
        """
        self._check_context(x, encoder_hidden_states)
        return super().forward(x, timesteps, encoder_hidden_states)

    def _check_context(self, x: Tensor, context: Tensor | None) -> None:
        wide = self.config.context_dim
        if context is None and {self.config.model_channels * m for m in self.config.channel_mult} != {wide}:
            raise UserError(f"encoder_hidden_states: this denoiser needs a text (B, N, {wide}); add a condition")
        if context is not None and (context.dim() != 3 or context.shape[::2] != (x.shape[0], wide)):
            raise UserError(
                f"encoder_hidden_states {tuple(context.shape)}: expected ({x.shape[0]}, N, {wide}); is the text "
                "encoder as wide as context_dim?"
            )

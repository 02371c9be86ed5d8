"""The text-to-video transformer of Open-Sora-Plan v1.3 (arXiv 2412.00131), with dense or Skiparse attention.

Names of tensors are those of its released weights, which are also those of diffusers' `AllegroTransformer3DModel`. A
latent frame is cut into patches; tokens are (B, N, D), N running over frames, then rows, then columns. What the stock
class leaves to its caller is done here: rotary positions follow from the shape of the latents, and are float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from core.attention import attend
from core.errors import UserError
from core.models.lvdm_unet import sinusoids, zeroed

Grid = tuple[int, int, int]
"""Tokens along time, height and width."""

MASKED = -10_000.0
"""Added to the logits of a masked key. It is finite, so that a text or a part without any valid key has a mean."""
PADDED = -9_980.0
"""The same for keys that fill up the last part of sparse attention: the reference's number. It shows in parts of masked
tokens alone."""
TIME_CHANNELS = 256
"""Width of the sinusoids of the timestep."""
THETA = 10_000.0
"""Base of the rotary frequencies (arXiv 2104.09864)."""


def norm(x: Tensor) -> Tensor:
    """Layer norm without parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def rotary(grid: Grid, scales: Sequence[float], width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles of every token, (N, 3, width / 6) float32: a third of a head's `width` for time, height
    and width each, positions divided by their scale.
    """
    steps = torch.arange(0, width // 3, 2, device=device, dtype=torch.float32) / (width // 3)
    frequencies = 1.0 / THETA**steps  # (width / 6,)
    angles = []
    for axis, (length, scale) in enumerate(zip(grid, scales, strict=True)):
        at = torch.arange(length, device=device, dtype=torch.float32) / scale
        shape = [-1 if axis == other else 1 for other in range(3)]
        angles.append((at[:, None] * frequencies).view(*shape, len(steps)).expand(*grid, -1))
    table = torch.stack(angles, dim=3).flatten(0, 2)  # (N, 3, width / 6)
    return table.cos(), table.sin()


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads (B, heads, N, width), each third turned by its angles; its halves are the two coordinates."""
    a, b = x.float().unflatten(3, (3, 2, -1)).unbind(4)  # (B, heads, N, 3, width / 6) each
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=4).flatten(3).to(x.dtype)


def scattered(x: Tensor, parts: int, run: int) -> Tensor:
    """(B, heads, S, D) -> (B parts, heads, S / parts, D): token p goes to part floor(p / run) mod parts."""
    x = x.unflatten(2, (-1, parts, run)).permute(0, 3, 1, 2, 4, 5)  # (B, parts, heads, S / (parts run), run, D)
    return x.flatten(3, 4).flatten(0, 1)


def gathered(x: Tensor, parts: int, run: int) -> Tensor:
    """The inverse of `scattered`."""
    x = x.unflatten(2, (-1, run)).unflatten(0, (-1, parts))  # (B, parts, heads, S / (parts run), run, D)
    return x.permute(0, 2, 3, 1, 4, 5).flatten(2, 4)


class Attention(nn.Module):
    """Projections of an attention whose keys are as wide as its queries."""

    def __init__(self, heads: int, head_dim: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.head_dim, self.attention_backend = heads, head_dim, "sdpa"
        self.to_q, self.to_k, self.to_v = (nn.Linear(heads * head_dim, heads * head_dim) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(heads * head_dim, heads * head_dim), nn.Dropout(dropout))

    def split(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, heads, N, head_dim)."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def merged(self, x: Tensor) -> Tensor:
        """(B, heads, N, head_dim) -> (B, N, D), projected."""
        return self.to_out(x.transpose(1, 2).flatten(2))


class SelfAttention(Attention):
    """Over all tokens of a clip, or in Skiparse attention (arXiv 2412.00131, section 2.2.2) over one of `parts` of them
    at a time: token p is in part floor(p / run) mod parts. With run 1 and run `parts` in turn two blocks connect all.
    """

    def __init__(
        self, heads: int, head_dim: int, scales: Sequence[float], parts: int, run: int, dropout: float
    ) -> None:
        super().__init__(heads, head_dim, dropout)
        self.scales, self.parts, self.run = tuple(scales), parts, run

    def forward(self, x: Tensor, grid: Grid, bias: Tensor | None) -> Tensor:
        """Tokens (B, N, D) of a `grid`; `bias` (B, N) is added to the logits of each key."""
        angles = rotary(grid, self.scales, self.head_dim, x.device)  # here: sharding would cast an argument
        q, k = (rotated(self.split(project(x)), *angles) for project in (self.to_q, self.to_k))
        v = self.split(self.to_v(x))
        return self.merged((self._dense if self.parts == 1 else self._sparse)(q, k, v, bias))

    def _dense(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        return attend(q, k, v, self.attention_backend, bias)

    def _sparse(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        tokens = q.shape[2]
        if lacking := -tokens % self.parts**2:
            q, k, v = (F.pad(x, (0, 0, 0, lacking)) for x in (q, k, v))
            known = bias if bias is not None else q.new_zeros(q.shape[0], tokens)
            bias = F.pad(known, (0, lacking), value=PADDED)
        q, k, v = (scattered(x, self.parts, self.run) for x in (q, k, v))
        if bias is not None:
            bias = scattered(bias[:, None, :, None], self.parts, self.run)[:, 0, :, 0]  # (B parts, S / parts)
        return gathered(self._dense(q, k, v, bias), self.parts, self.run)[:, :, :tokens]


class CrossAttention(Attention):
    """From the tokens of a clip to those of its text."""

    def forward(self, x: Tensor, text: Tensor, bias: Tensor | None) -> Tensor:
        q, k, v = self.split(self.to_q(x)), self.split(self.to_k(text)), self.split(self.to_v(text))
        return self.merged(attend(q, k, v, self.attention_backend, bias))


class GELU(nn.Module):
    """GELU of a projection, by its approximation with tanh."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, out)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """GELU four times as wide, and back."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.net = nn.Sequential(GELU(channels, 4 * channels), nn.Dropout(dropout), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class DiTBlock(nn.Module):
    """Self-attention, text, feed-forward, each added; the first and the last are scaled, shifted and gated by the
    timestep. The text's has neither a norm nor a gate.
    """

    def __init__(
        self, heads: int, head_dim: int, scales: Sequence[float], parts: int, run: int, dropout: float
    ) -> None:
        super().__init__()
        width = heads * head_dim
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.attn1 = SelfAttention(heads, head_dim, scales, parts, run, dropout)
        self.attn2 = CrossAttention(heads, head_dim, dropout)
        self.ff = FeedForward(width, dropout)

    def forward(
        self, x: Tensor, text: Tensor, time: Tensor, grid: Grid, bias: Tensor | None, text_bias: Tensor | None
    ) -> Tensor:
        """Tokens (B, N, D), text (B, N', D) and (B, 6, D) of the timestep -> tokens."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.scale_shift_table + time).chunk(6, dim=1)  # (B, 1, D)
        x = x + gate1 * self.attn1(norm(x) * (1 + scale1) + shift1, grid, bias)
        x = x + self.attn2(x, text, text_bias)
        return x + gate2 * self.ff(norm(x) * (1 + scale2) + shift2)


class TwoLayers(nn.Module):
    """Linear, SiLU or GELU, linear: what embeds the timestep, and what brings the text to the width of the tokens."""

    def __init__(self, channels: int, out: int, gelu: bool = False) -> None:
        super().__init__()
        self.linear_1, self.linear_2, self.gelu = nn.Linear(channels, out), nn.Linear(out, out), gelu

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear_1(x)
        return self.linear_2(F.gelu(h, approximate="tanh") if self.gelu else F.silu(h))


class TimeModulation(nn.Module):
    """A timestep (B,) as its embedding (B, D) and as what all blocks share of their scales, shifts and gates (B, 6, D)
    (adaLN-single, arXiv 2310.00426, section 2.3).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.emb = nn.ModuleDict({"timestep_embedder": TwoLayers(TIME_CHANNELS, width)})
        self.linear = nn.Linear(width, 6 * width)

    def forward(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        waves = sinusoids(timesteps, TIME_CHANNELS).to(self.linear.weight.dtype)
        embedded = self.emb["timestep_embedder"](waves)
        return embedded, self.linear(F.silu(embedded)).unflatten(1, (6, -1))


class OpenSoraDiT(ModelMixin, ConfigMixin):
    """Predicts the target of (B, C, T, H, W) latents at timesteps (B,), told a text (B, N, caption_channels).

    Of the text, rows that are all zeros are padding. The defaults are those of v1.3. A fresh one outputs exactly zero.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        in_channels: int = 8,
        out_channels: int = 8,
        patch_size: int = 2,
        num_attention_heads: int = 24,
        attention_head_dim: int = 96,
        num_layers: int = 32,
        caption_channels: int = 4096,
        sparse1d: bool = True,
        sparse_n: int = 4,
        sparse_blocks: Sequence[int] = (2, 30),
        interpolation_scale_t: float = 1.0,
        interpolation_scale_h: float = 1.0,
        interpolation_scale_w: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        heads, head_dim, width = num_attention_heads, attention_head_dim, num_attention_heads * attention_head_dim
        if head_dim % 6:
            raise UserError(f"attention_head_dim {head_dim}: must be a multiple of 6, three axes in two coordinates")
        scales = (interpolation_scale_t, interpolation_scale_h, interpolation_scale_w)
        self.pos_embed = nn.ModuleDict({"proj": nn.Conv2d(in_channels, width, patch_size, stride=patch_size)})
        self.caption_projection = TwoLayers(caption_channels, width, gelu=True)
        self.adaln_single = TimeModulation(width)
        first, end = sparse_blocks
        ratios = [sparse_n if sparse1d and first <= i < end else 1 for i in range(num_layers)]
        self.transformer_blocks = nn.ModuleList(
            DiTBlock(heads, head_dim, scales, parts=k, run=k if i % 2 else 1, dropout=dropout)
            for i, k in enumerate(ratios)
        )
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.proj_out = nn.Linear(width, patch_size**2 * out_channels)
        self._start()

    @torch.no_grad()
    def _start(self) -> None:
        """Fresh weights as of PixArt (arXiv 2310.00426): the text and the output start at zero, what is told of the
        timestep and the text small, the rest as of Glorot and Bengio (2010).
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        for part in (*self.caption_projection.children(), *self.adaln_single.modules()):
            if isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, std=0.02)
        for block in self.transformer_blocks:
            zeroed(block.attn2.to_out)  # type: ignore[union-attr, arg-type]
        zeroed(self.proj_out)

    @property
    def spatial_factor(self) -> int:
        """What height and width must be multiples of."""
        return int(self.config.patch_size)

    def blocks(self) -> list[nn.Module]:
        """Units for activation checkpointing, compilation and sharding."""
        return list(self.transformer_blocks)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        encoder_hidden_states: Tensor,
        text_mask: Tensor | None = None,
        latent_mask: Tensor | None = None,
    ) -> Tensor:
        """(B, C, T, H, W), (B,) and (B, N, caption_channels) -> (B, out_channels, T, H, W) in the dtype of x.

        Masks are not 0 where something is to be seen: `text_mask` (B, N), without one that is so where a row of the
        text is not all zeros; `latent_mask` (B, T, H, W), without one everywhere.
        """
        self._check(x, encoder_hidden_states)
        text_mask = encoder_hidden_states.ne(0).any(2) if text_mask is None else text_mask.ne(0)
        embedded, time = self.adaln_single(timesteps.reshape(-1).expand(len(x)))
        frames = self.pos_embed["proj"](x.transpose(1, 2).flatten(0, 1))  # (B T, D, H', W')
        grid = (x.shape[2], frames.shape[2], frames.shape[3])
        tokens = frames.unflatten(0, (len(x), -1)).permute(0, 1, 3, 4, 2).flatten(1, 3)  # (B, N, D)
        text = self.caption_projection(encoder_hidden_states)
        biases = self._bias(latent_mask, tokens), _hidden(text_mask, tokens)
        for block in self.transformer_blocks:
            tokens = block(tokens, text, time, grid, *biases)
        shift, scale = (self.scale_shift_table + embedded[:, None]).chunk(2, dim=1)
        return self._unpatched(self.proj_out(norm(tokens) * (1 + scale) + shift), grid).to(x.dtype)

    def _bias(self, latent_mask: Tensor | None, like: Tensor) -> Tensor | None:
        """A patch is seen where any of its cells is: (B, T, H, W) -> (B, N)."""
        if latent_mask is None:
            return None
        return _hidden(F.max_pool2d(latent_mask.float(), self.config.patch_size).flatten(1).ne(0), like)

    def _unpatched(self, tokens: Tensor, grid: Grid) -> Tensor:
        """(B, N, p p C) -> (B, C, T, H, W)."""
        p = self.config.patch_size
        patches = tokens.unflatten(2, (p, p, -1)).unflatten(1, grid)  # (B, T, H', W', p, p, C)
        return patches.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4).contiguous()

    def _check(self, x: Tensor, text: Tensor) -> None:
        p, wide = self.config.patch_size, self.config.caption_channels
        if x.shape[3] % p or x.shape[4] % p:
            raise UserError(f"latents of {x.shape[3]} x {x.shape[4]}: height and width must be multiples of {p}")
        if text.dim() != 3 or text.shape[::2] != (x.shape[0], wide):
            raise UserError(
                f"encoder_hidden_states {tuple(text.shape)}: expected ({x.shape[0]}, N, {wide}); is the text encoder "
                "as wide as context_dim?"
            )


def _hidden(seen: Tensor, like: Tensor) -> Tensor:
    """What is added to the logits of keys, 0 where they are seen: (B, N) bool -> (B, N) in the dtype of `like`."""
    return (~seen).to(like.dtype) * MASKED

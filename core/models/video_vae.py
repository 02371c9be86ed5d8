"""The 3D KL autoencoder of LVDM (He et al. 2022, arXiv 2211.13221): clips to latents and back.

Latents are 4x shorter and 8x smaller. Not causal, any number of frames: T' = floor(T / 4), and 4 T' come back. Every
convolution is padded by repeating the edge, the odd element in front. Parameter names are those of the original
(YingqingHe/LVDM), each kernel under its one `conv` name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from core.errors import UserError

Stride = tuple[int, int, int]

NORM_EPS = 1e-6
# Up to this many numbers in B * C * T * H, torch's own kernel convolves a single sample on the CPU, ten times slower
# than oneDNN's: 34 ms against 2.9 for a batch of 4 (8 channels, 16 x 64 x 64 and 16 x 32 x 32).
SMALL_SAMPLE = 20_480


@dataclass(frozen=True)
class Posterior:
    """The encoder's normal distribution of z (B, C, T, H, W); the log variance is within [-30, 20]."""

    mean: Tensor
    logvar: Tensor

    @classmethod
    def of(cls, moments: Tensor) -> Posterior:
        """From (B, 2 C, T, H, W): means, then log variances."""
        mean, logvar = moments.chunk(2, dim=1)
        return cls(mean, logvar.clamp(-30.0, 20.0))

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise (arXiv 1312.6114, section 2.4)."""
        return self.mean + self.std * noise

    def kl(self) -> Tensor:
        """Divergence from the standard normal, summed over all but the batch: (B,) (arXiv 1312.6114, appendix B)."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar).flatten(1).sum(1)


class GroupNorm(nn.GroupNorm):
    """Group norm in float32 whatever the dtype around it; statistics run over T * H * W."""

    def __init__(self, groups: int, channels: int) -> None:
        super().__init__(groups, channels, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps).to(x.dtype)


def pad_edges(x: Tensor, kernel: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Repeats the edge so that a convolution of this kernel divides T, H and W by its stride: k - s elements, the odd
    one in front.
    """
    amounts = [k - s for k, s in zip(kernel, stride, strict=True)]
    sides = [side for p in reversed(amounts) for side in ((p + 1) // 2, p // 2)]  # torch counts axes from the last
    return F.pad(x, sides, mode="replicate") if any(sides) else x


class SameConv(nn.Module):
    """A convolution over (B, C, T, H, W) that divides the size by its stride and nothing else."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3, stride: Stride = (1, 1, 1)) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_edges(x, self.conv.kernel_size, self.conv.stride)
        if x.shape[0] == 1 and x.device.type == "cpu" and x[..., 0].numel() <= SMALL_SAMPLE:
            return self.conv(x.expand(2, *x.shape[1:]))[:1]
        return self.conv(x)


class SameConvTranspose(nn.Module):
    """Multiplies the size by its stride: edges repeated, then a transposed convolution cropped by kernel - 1."""

    def __init__(self, in_channels: int, out_channels: int, stride: Stride, kernel: int = 4) -> None:
        super().__init__()
        self.convt = nn.ConvTranspose3d(in_channels, out_channels, kernel, stride, padding=kernel - 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.convt(pad_edges(x, self.convt.kernel_size, self.convt.stride))


class ResBlock(nn.Module):
    """norm, SiLU, convolution, twice, added to the input."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = GroupNorm(groups, channels), SameConv(channels, channels)
        self.norm2, self.conv2 = GroupNorm(groups, channels), SameConv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class Down(nn.Module):
    """Halves the axes of stride 2, then one residual block."""

    def __init__(self, in_channels: int, out_channels: int, stride: Stride, groups: int) -> None:
        super().__init__()
        self.down = SameConv(in_channels, out_channels, 4, stride)
        self.res = ResBlock(out_channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.res(self.down(x))


class Up(nn.Module):
    """Doubles the axes of stride 2, then two residual blocks."""

    def __init__(self, in_channels: int, out_channels: int, stride: Stride, groups: int) -> None:
        super().__init__()
        self.up = SameConvTranspose(in_channels, out_channels, stride)
        self.res1, self.res2 = ResBlock(out_channels, groups), ResBlock(out_channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.res2(self.res1(self.up(x)))


def strides(factors: Sequence[int]) -> list[Stride]:
    """Stride of each stage: 2 an axis until its factor is used up, then 1. (4, 8, 8) -> (2, 2, 2), (2, 2, 2), (1, 2,
    2).
    """
    t, h, w = (factor.bit_length() - 1 for factor in factors)
    return [(1 + (i < t), 1 + (i < h), 1 + (i < w)) for i in range(max(t, h, w))]


class Encoder(nn.Module):
    """(B, image_channels, T, H, W) -> (B, 2 z_channels, T', H', W')."""

    def __init__(
        self, n_hiddens: int, downsample: Sequence[int], z_channels: int, image_channels: int, groups: int
    ) -> None:
        super().__init__()
        steps = strides(downsample)
        widths = [n_hiddens * 2**i for i in range(len(steps) + 1)]
        self.conv_first = SameConv(image_channels, n_hiddens)
        self.conv_blocks = nn.ModuleList(
            Down(before, after, stride, groups)
            for before, after, stride in zip(widths[:-1], widths[1:], steps, strict=True)
        )
        self.final_block = nn.Sequential(GroupNorm(groups, widths[-1]), nn.SiLU(), SameConv(widths[-1], 2 * z_channels))

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_first(x)
        for block in self.conv_blocks:
            h = block(h)
        return self.final_block(h)


class Decoder(nn.Module):
    """(B, z_channels, T', H', W') -> (B, image_channels, T, H, W)."""

    def __init__(
        self, n_hiddens: int, upsample: Sequence[int], z_channels: int, image_channels: int, groups: int
    ) -> None:
        super().__init__()
        steps = strides(upsample)
        widths = [z_channels, *(n_hiddens * 2**i for i in range(len(steps), 0, -1))]
        self.conv_blocks = nn.ModuleList(
            Up(before, after, stride, groups)
            for before, after, stride in zip(widths[:-1], widths[1:], steps, strict=True)
        )
        self.conv_out = SameConv(widths[-1], image_channels)

    def forward(self, z: Tensor) -> Tensor:
        for block in self.conv_blocks:
            z = block(z)
        return self.conv_out(z)


class VideoAutoencoder(ModelMixin, ConfigMixin):
    """Clips (B, 3, T, H, W) in [-1, 1] to a posterior of z (B, embed_dim, T', H', W') and back.

    A denoiser sees latents = scale_factor * (z + shift_factor): scale is 1 / std and shift -mean of the training clips'
    z, because the KL term is too weak to bring them there. The two are kept here, with the weights they belong to.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        n_hiddens: int = 32,
        downsample: Sequence[int] = (4, 8, 8),
        z_channels: int = 4,
        embed_dim: int = 4,
        image_channels: int = 3,
        norm_num_groups: int = 32,
        scale_factor: float = 1.0,
        shift_factor: float = 0.0,
    ) -> None:
        super().__init__()
        if any(factor < 1 or factor & (factor - 1) for factor in downsample) or downsample[1] != downsample[2]:
            raise UserError(f"downsample {tuple(downsample)}: expected powers of two, the same for height and width")
        self.encoder = Encoder(n_hiddens, downsample, z_channels, image_channels, norm_num_groups)
        self.decoder = Decoder(n_hiddens, downsample, z_channels, image_channels, norm_num_groups)
        self.quant_conv = SameConv(2 * z_channels, 2 * embed_dim, kernel=1)
        self.post_quant_conv = SameConv(embed_dim, z_channels, kernel=1)

    @property
    def temporal_factor(self) -> int:
        return self.config.downsample[0]

    @property
    def spatial_factor(self) -> int:
        return self.config.downsample[1]

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, T', H', W') of the latents of a clip."""
        self._check(num_frames, height, width)
        space = self.spatial_factor
        return self.config.embed_dim, num_frames // self.temporal_factor, height // space, width // space

    def _check(self, num_frames: int, height: int, width: int) -> None:
        space = self.spatial_factor
        if num_frames < self.temporal_factor or height % space or width % space or not height * width:
            raise UserError(
                f"clip of {num_frames} frames at {height} x {width}: the autoencoder needs at least "
                f"{self.temporal_factor} frames, and height and width in multiples of {space}"
            )

    def blocks(self) -> list[nn.Module]:
        """Units for activation checkpointing, compilation and sharding: each is called once in encode or decode."""
        return [*self.encoder.conv_blocks, *self.decoder.conv_blocks]

    def encode(self, video: Tensor) -> Posterior:
        """(B, 3, T, H, W) in [-1, 1] -> the posterior of z."""
        self._check(*video.shape[2:])
        return Posterior.of(self.quant_conv(self.encoder(video.to(self.quant_conv.conv.weight.dtype))))

    def decode(self, z: Tensor) -> Tensor:
        """z (B, embed_dim, T', H', W') -> (B, 3, T, H, W), about [-1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(z.to(self.post_quant_conv.conv.weight.dtype)))

    def to_latents(self, z: Tensor) -> Tensor:
        """What a denoiser sees: scale * (z + shift), the shift first."""
        return self.config.scale_factor * (z + self.config.shift_factor)

    def from_latents(self, latents: Tensor) -> Tensor:
        """z of latents: the inverse of `to_latents`."""
        return latents / self.config.scale_factor - self.config.shift_factor

    @staticmethod
    def constants_of(config: Mapping[str, Any]) -> tuple[float, float] | None:
        """Scale and shift in a config; None where it has none."""
        return (config["scale_factor"], config["shift_factor"]) if "scale_factor" in config else None

    @staticmethod
    def constants_config(scale: float, shift: float) -> dict[str, float]:
        """The entries of a config that say latents = scale * (z + shift)."""
        return {"scale_factor": scale, "shift_factor": shift}

    def forward(self, video: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Posterior]:
        """The reconstruction from the posterior's mean, or from its sample if noise is given, and the posterior."""
        posterior = self.encode(video)
        return self.decode(posterior.mean if noise is None else posterior.sample(noise)), posterior

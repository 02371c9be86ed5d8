"""I3D logits, 400 a clip (arXiv 1705.07750, Kinetics-400): what FVD and KVD are taken over (LVDM sheet §13).

The file that published values come from, i3d_pretrained_400.pt, is TorchScript, which is code and is refused. The same
network as a state dict is known as rgb_imagenet.pt, with the names used here. "SAME" padding is TensorFlow's: what is
missing is added, the smaller half in front.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from core.errors import UserError
from core.evaluation.weights import fill, read_weights

SIDE = 224
CLASSES = 400
# 1x1; 1x1, 3x3; 1x1, 3x3; 1x1 after a pool
MIXED = {
    "Mixed_3b": (192, 64, 96, 128, 16, 32, 32),
    "Mixed_3c": (256, 128, 128, 192, 32, 96, 64),
    "Mixed_4b": (480, 192, 96, 208, 16, 48, 64),
    "Mixed_4c": (512, 160, 112, 224, 24, 64, 64),
    "Mixed_4d": (512, 128, 128, 256, 24, 64, 64),
    "Mixed_4e": (512, 112, 144, 288, 32, 64, 64),
    "Mixed_4f": (528, 256, 160, 320, 32, 128, 128),
    "Mixed_5b": (832, 256, 160, 320, 32, 128, 128),
    "Mixed_5c": (832, 384, 192, 384, 48, 128, 128),
}
POOLS = {"Mixed_3b": ((1, 3, 3), (1, 2, 2)), "Mixed_4b": ((3, 3, 3), (2, 2, 2)), "Mixed_5b": ((2, 2, 2), (2, 2, 2))}
"""Kernel and stride of the max pool before a block."""


def same(x: Tensor, kernel: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Pad (N, C, T, H, W) with zeros so that each side comes out as ceil(side / stride)."""
    sides: list[int] = []
    for n, k, s in reversed(list(zip(x.shape[2:], kernel, stride, strict=True))):
        lacking = max(k - (n % s or s), 0)
        sides += [lacking // 2, lacking - lacking // 2]
    return functional.pad(x, sides)


def pool(x: Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> Tensor:
    return functional.max_pool3d(same(x, kernel, stride), kernel, stride)


class Unit(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, channels: int, out: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.kernel, self.stride = (kernel,) * 3, (stride,) * 3
        self.conv3d = nn.Conv3d(channels, out, kernel, stride, bias=False)
        self.bn = nn.BatchNorm3d(out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv3d(same(x, self.kernel, self.stride))))


class Mixed(nn.Module):
    """Four branches side by side."""

    def __init__(self, channels: int, one: int, a1: int, a3: int, b1: int, b3: int, pooled: int) -> None:
        super().__init__()
        self.b0 = Unit(channels, one)
        self.b1a, self.b1b = Unit(channels, a1), Unit(a1, a3, 3)
        self.b2a, self.b2b = Unit(channels, b1), Unit(b1, b3, 3)
        self.b3b = Unit(channels, pooled)

    def forward(self, x: Tensor) -> Tensor:
        pooled = pool(x, (3, 3, 3), (1, 1, 1))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)], 1)


class Logits(nn.Module):
    """The last convolution, which has a bias and neither norm nor ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(1024, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3d(x)  # type: ignore[no-any-return]


class Network(nn.Module):
    """(N, 3, T, 224, 224) in [-1, 1], T at least 9 -> (N, 400): logits averaged over time."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv3d_1a_7x7 = Unit(3, 64, 7, 2)
        self.Conv3d_2b_1x1 = Unit(64, 64)
        self.Conv3d_2c_3x3 = Unit(64, 192, 3)
        for name, channels in MIXED.items():
            self.add_module(name, Mixed(*channels))
        self.logits = Logits()

    def forward(self, x: Tensor) -> Tensor:
        x = self.Conv3d_2b_1x1(pool(self.Conv3d_1a_7x7(x), (1, 3, 3), (1, 2, 2)))
        x = self.Conv3d_2c_3x3(x)
        for name in MIXED:
            x = self.get_submodule(name)(pool(x, *POOLS[name]) if name in POOLS else x)
        return self.logits(functional.avg_pool3d(x, (2, 7, 7), 1)).mean((2, 3, 4))  # type: ignore[no-any-return]


class I3D(nn.Module):
    """Clips (N, 3, T, H, W) in [-1, 1] -> (N, 400), from a state dict."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        weights = read_weights(file)
        if "logits.conv3d.weight" not in weights:
            raise UserError(f"{file}: no I3D, it has no logits.conv3d.weight; expected a state dict as rgb_imagenet.pt")
        self.net = Network()
        fill(self.net, weights, file)
        self.net.eval().requires_grad_(False)

    def forward(self, clips: Tensor) -> Tensor:
        return self.net(preprocess(clips))  # type: ignore[no-any-return]


def preprocess(clips: Tensor) -> Tensor:
    """(N, 3, T, H, W) -> (N, 3, T, 224, 224), each frame bilinear without antialiasing."""
    frames = clips.transpose(1, 2).flatten(0, 1)  # (N T, 3, H, W)
    sized = functional.interpolate(frames, (SIDE, SIDE), mode="bilinear", align_corners=False)
    return sized.unflatten(0, (clips.shape[0], clips.shape[2])).transpose(1, 2)

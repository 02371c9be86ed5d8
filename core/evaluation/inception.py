"""Inception-v3 pool features, 2048 a picture, from a local file of weights: what FID and KID are taken over.

Two published networks share the names of their tensors and differ in pooling: torchvision's (1000 classes), and the one
ported from TensorFlow that published FID values use (pt_inception-2015-12-05-6726825d.pth of pytorch-fid and
torchmetrics, 1008 classes), whose average pools leave the padding out and whose last block takes the largest value.
Which one a file holds is told by its number of classes.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import inception_v3

from core.errors import UserError
from core.evaluation.weights import fill, read_weights

SIDE = 299
TENSORFLOW_CLASSES = 1008
DIMENSION = 2048


class PooledApart(nn.Module):
    """An Inception block whose pooling branch pools as TensorFlow's does."""

    def __init__(self, block: nn.Module, largest: bool) -> None:
        super().__init__()
        self.block, self.largest = block, largest

    def forward(self, x: Tensor) -> Tensor:
        if self.largest:
            pooled = functional.max_pool2d(x, 3, stride=1, padding=1)
        else:
            pooled = functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        *branches, _ = self.block._forward(x)  # type: ignore[operator]
        return torch.cat([*branches, self.block.branch_pool(pooled)], 1)  # type: ignore[operator]


class Inception(nn.Module):
    """Frames (N, 3, H, W) in [-1, 1] -> (N, 2048)."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        weights = read_weights(file)
        classes = weights["fc.bias"].shape[0] if "fc.bias" in weights else 0
        if classes == 0:
            raise UserError(f"{file}: no Inception-v3, it has no fc.bias; expected torchvision's or pytorch-fid's file")
        aux = any(name.startswith("AuxLogits.") for name in weights)
        net = inception_v3(weights=None, num_classes=classes, aux_logits=aux, transform_input=False, init_weights=False)
        fill(net, weights, file)
        net.fc = nn.Identity()
        if classes == TENSORFLOW_CLASSES:
            _pool_as_tensorflow(net)
        self.net = net.eval().requires_grad_(False)

    def forward(self, frames: Tensor) -> Tensor:
        sized = functional.interpolate(frames, (SIDE, SIDE), mode="bilinear", align_corners=False)
        return self.net(sized)  # type: ignore[no-any-return]


def _pool_as_tensorflow(net: nn.Module) -> None:
    for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b", "7c"):
        setattr(net, f"Mixed_{name}", PooledApart(getattr(net, f"Mixed_{name}"), largest=name == "7c"))

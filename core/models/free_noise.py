"""FreeNoise (arXiv 2310.15169) on AnimateDiff's motion modules: windows of frames."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from diffusers.models.attention import BasicTransformerBlock, FreeNoiseTransformerBlock
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from torch import nn

if TYPE_CHECKING:
    from core.models.motion_unet import MotionUNet
    from core.slots import FreeNoise

SHARED = ("pos_embed", "norm1", "attn1", "norm2", "attn2", "norm3", "ff")
"""The layers of a transformer block."""


@contextmanager
def windowed(unet: MotionUNet, slot: FreeNoise) -> Iterator[None]:
    """While it lasts the motion modules of `unet` see windows of frames, with the layers that they have."""
    parts = [part for part in unet.modules() if isinstance(part, AnimateDiffTransformer3D)]
    plain = [part.transformer_blocks for part in parts]
    try:
        for part, blocks in zip(parts, plain, strict=True):
            part.transformer_blocks = nn.ModuleList(_windows(block, slot) for block in blocks)
        unet.window = slot.context_length
        yield
    finally:
        unet.window = None
        for part, blocks in zip(parts, plain, strict=True):
            part.transformer_blocks = blocks


def _windows(block: BasicTransformerBlock, slot: FreeNoise) -> FreeNoiseTransformerBlock:
    with torch.device("meta"):
        windows = FreeNoiseTransformerBlock(
            dim=block.dim,
            num_attention_heads=block.num_attention_heads,
            attention_head_dim=block.attention_head_dim,
            cross_attention_dim=block.cross_attention_dim,
            attention_bias=block.attention_bias,
            only_cross_attention=block.only_cross_attention,
            double_self_attention=block.double_self_attention,
            positional_embeddings=block.positional_embeddings,
            num_positional_embeddings=block.num_positional_embeddings,
            context_length=slot.context_length,
            context_stride=slot.context_stride,
            weighting_scheme=slot.weighting,
        )
    for name in SHARED:
        setattr(windows, name, getattr(block, name))
    return windows.train(block.training)

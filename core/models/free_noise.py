"""FreeNoise (arXiv 2310.15169) on AnimateDiff's motion modules: windows of frames."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from diffusers.models.attention import BasicTransformerBlock, FreeNoiseTransformerBlock

if TYPE_CHECKING:
    from core.models.motion_unet import MotionUNet
    from core.slots import FreeNoise

SHARED = ("pos_embed", "norm1", "attn1", "norm2", "attn2", "norm3", "ff")
"""The layers of a transformer block."""


@contextmanager
def windowed(unet: MotionUNet, slot: FreeNoise) -> Iterator[None]:
    """While it lasts the motion modules of `unet` see windows of frames, with the layers that they have."""
    places = [(part, i) for part in unet.modules() for i in _blocks(part)]
    plain = [part.transformer_blocks[i] for part, i in places]  # type: ignore[union-attr, index]
    try:
        for (part, i), block in zip(places, plain, strict=True):
            part.transformer_blocks[i] = _windows(block, slot)  # type: ignore[union-attr, index, operator]
        unet.window = slot.context_length
        yield
    finally:
        unet.window = None
        for (part, i), block in zip(places, plain, strict=True):
            part.transformer_blocks[i] = block  # type: ignore[union-attr, index, operator]


def _blocks(part: torch.nn.Module) -> range:
    """Places of the blocks of a transformer over frames: those with positions."""
    blocks = getattr(part, "transformer_blocks", ())
    return range(len(blocks) if len(blocks) and getattr(blocks[0], "pos_embed", None) is not None else 0)


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

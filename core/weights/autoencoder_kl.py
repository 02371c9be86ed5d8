"""Autoencoders of Stable Diffusion 1.x: CompVis' names, diffusers' names, and those of its attention before 2023."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from core.weights.lazy import State
from core.weights.network import Network, Shapes

COMPVIS = (
    (r"\.down\.(\d+)\.block\.(\d+)\.", r".down_blocks.\1.resnets.\2."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d+)\.block\.(\d+)\.", r".up_blocks.\1.resnets.\2."),
    (r"\.up\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
)
OLD_ATTENTION = (
    (r"(attentions\.\d+)\.query\.", r"\1.to_q."),
    (r"(attentions\.\d+)\.key\.", r"\1.to_k."),
    (r"(attentions\.\d+)\.value\.", r"\1.to_v."),
    (r"(attentions\.\d+)\.proj_attn\.", r"\1.to_out.0."),
)
UP = re.compile(r"decoder\.up\.(\d+)\.")


def from_compvis(state: State) -> dict[str, Any]:
    """CompVis' names as diffusers': levels of the decoder are counted from the other end. The loss network goes."""
    last = max(int(found[1]) for name in state if (found := UP.match(name)))
    renamed = {}
    for name, entry in state.items():
        if not name.startswith("loss."):
            renamed[_by(COMPVIS, UP.sub(lambda m: f"decoder.up.{last - int(m[1])}.", name))] = entry
    return renamed


def from_diffusers(state: State) -> dict[str, Any]:
    return {_by(OLD_ATTENTION, name): entry for name, entry in state.items()}


def _by(rules: tuple[tuple[str, str], ...], name: str) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def settings(shapes: Shapes) -> dict[str, Any]:
    """Sizes of an AutoencoderKL under diffusers' names; groups of norms do not show, 32 is everybody's."""
    conv = re.compile(r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.conv1\.weight")
    widths: dict[int, int] = {}
    layers = 0
    for name, shape in shapes.items():
        if found := conv.fullmatch(name):
            widths[int(found[1])] = shape[0]
            layers = max(layers, int(found[2]) + 1)
    return {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "block_out_channels": tuple(widths[level] for level in sorted(widths)),
        "layers_per_block": layers,
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "sample_size": 512,
    }


def _kind() -> type[nn.Module]:
    from core.models.frame_vae import FrameAutoencoder

    return FrameAutoencoder


NETWORKS = (
    Network(
        name="autoencoder of Stable Diffusion, CompVis names",
        component="vae",
        marks=(r"encoder\.down\.0\.block\.", UP.pattern, r"post_quant_conv\.", r"quant_conv\."),
        rename=from_compvis,
        settings=settings,
        kind=_kind,
    ),
    Network(
        name="AutoencoderKL of diffusers",
        component="vae",
        marks=(r"encoder\.down_blocks\.0\.resnets\.", r"decoder\.up_blocks\.0\."),
        rename=from_diffusers,
        settings=settings,
        kind=_kind,
    ),
)

"""LVDM's networks in checkpoints: of its authors (YingqingHe/LVDM) and of PaddleMIX, whose names are the same."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from core.weights.fit import load_strict
from core.weights.lazy import State, lazily
from core.weights.names import component, sort_out
from core.weights.network import Network, Shapes
from core.weights.stored import open_stored

__all__ = ["NETWORKS", "Part", "load_strict", "original_state"]

Part = Literal["unet", "unet_ema", "vae", "text_encoder"]
FIRST_CONV = "encoder.conv_first.conv.weight"


def original_state(source: str | Path | Mapping[str, Tensor], part: Part) -> dict[str, Tensor]:
    """One part's tensors under the names of the networks here, from a checkpoint file or a dict.

    A part is found under its prefix in a full checkpoint, or bare. "unet_ema" is the moving average.
    """
    stored = lazily(source) if isinstance(source, Mapping) else open_stored(Path(source)).tensors
    found = component(sort_out(stored), part.removesuffix("_ema"), averaged=part.endswith("_ema"))
    named = without_aliases(found) if part == "vae" else found
    return {name: entry.read() for name, entry in named.items()}


def without_aliases(state: State) -> dict[str, Any]:
    """Drops the loss network, and X.weight where X.conv.weight is the same kernel under its other name."""
    return {
        name: entry
        for name, entry in state.items()
        if not name.startswith("loss.") and f"{name.removesuffix('weight')}conv.weight" not in state
    }


# ------------------------------------------------------------------------------------------- sizes from tensors' shapes


def unet_settings(shapes: Shapes) -> dict[str, Any]:
    """Sizes of the UNet. Levels are told by their downsampling, heads by the width of the relative positions."""
    width, in_channels = shapes["input_blocks.0.0.weight"][:2]
    mult, blocks, attended = _levels(shapes, width)
    found: dict[str, Any] = {
        "in_channels": in_channels,
        "out_channels": shapes["out.2.weight"][0],
        "model_channels": width,
        "channel_mult": tuple(mult),
        "num_res_blocks": blocks,
        "attention_resolutions": tuple(attended),
        "use_scale_shift_norm": shapes["input_blocks.1.0.emb_layers.1.bias"][0] == 2 * mult[0] * width,
    }
    table = next(
        (shape for name, shape in shapes.items() if name.startswith("middle_block.1.") and "table" in name), None
    )
    if table is not None:
        found |= {"temporal_length": table[0] // 2, "num_heads": mult[-1] * width // table[1]}
    return found | {"use_relative_position": table is not None}


def _levels(shapes: Shapes, width: int) -> tuple[list[int], int, list[int]]:
    """Width of each level in multiples, residual blocks of a level, factors at which there is attention."""
    mult: list[int] = []
    attended: list[int] = []
    level = blocks = 0
    for i in range(1, 1 + max(int(n.split(".")[1]) for n in shapes if n.startswith("input_blocks."))):
        if f"input_blocks.{i}.0.op.weight" in shapes:
            level += 1
            continue
        blocks += level == 0
        mult[level:] = [shapes[f"input_blocks.{i}.0.in_layers.2.weight"][0] // width]
        if any(name.startswith(f"input_blocks.{i}.1.") for name in shapes):
            attended[len(attended) - (2**level in attended) :] = [2**level]
    return mult, blocks, attended


def text_unet_settings(shapes: Shapes) -> dict[str, Any]:
    depth = max(int(found[1]) for name in shapes if (found := re.search(r"transformer_blocks\.(\d+)\.", name)))
    block = "middle_block.1.transformer_blocks.0"
    # (channels, context), or the reverse in Paddle
    context = sum(shapes[f"{block}.attn2.to_k.weight"]) - shapes[f"{block}.norm1.weight"][0]
    return unet_settings(shapes) | {"transformer_depth": depth + 1, "context_dim": context}


def vae_settings(shapes: Shapes) -> dict[str, Any]:
    """Sizes of the 3D autoencoder. Strides do not show in shapes: as published, time is halved once less than space."""
    levels = 1 + max(int(name.split(".")[2]) for name in shapes if name.startswith("encoder.conv_blocks."))
    return {
        "n_hiddens": shapes[FIRST_CONV][0],
        "image_channels": shapes[FIRST_CONV][1],
        "downsample": (2 ** (levels - 1), 2**levels, 2**levels),
        "embed_dim": shapes["post_quant_conv.conv.weight"][1],
        "z_channels": shapes["post_quant_conv.conv.weight"][0],
    }


def _short() -> type[nn.Module]:
    from core.models.lvdm_unet import LVDMUNet

    return LVDMUNet


def _text() -> type[nn.Module]:
    from core.models.lvdm_text_unet import LVDMTextUNet

    return LVDMTextUNet


def _vae() -> type[nn.Module]:
    from core.models.video_vae import VideoAutoencoder

    return VideoAutoencoder


NETWORKS = (
    Network(
        name="LVDM's text-to-video UNet",
        component="unet",
        marks=(r"input_blocks\.", r"middle_block\.1\.transformer_blocks\.0\.attn1_tmp\."),
        settings=text_unet_settings,
        kind=_text,
    ),
    Network(
        name="LVDM's unconditional UNet",
        component="unet",
        marks=(r"input_blocks\.", r"middle_block\.1\.qkv_t\."),
        settings=unet_settings,
        kind=_short,
    ),
    Network(
        name="LVDM's 3D autoencoder",
        component="vae",
        marks=(r"encoder\.conv_first\.", r"decoder\.conv_blocks\.0\."),
        rename=without_aliases,
        settings=vae_settings,
        kind=_vae,
        renamed_settings=(("image_channel", "image_channels"),),
    ),
)

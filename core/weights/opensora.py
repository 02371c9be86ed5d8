"""The denoiser of Open-Sora-Plan v1.3 in checkpoints, and Allegro's (diffusers' `AllegroTransformer3DModel`), whose
names are the same.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from core.weights.network import Network, Shapes

HEAD_DIM = 96
ALLEGRO_CHANNELS = 4


def settings(shapes: Shapes) -> dict[str, Any]:
    """Sizes of the transformer. Width of a head, sparse ratio and scales of positions do not show in shapes: as
    published, Allegro's for 4 latent channels, those of Open-Sora-Plan v1.3 for others.
    """
    width, channels, patch = shapes["pos_embed.proj.weight"][:3]
    # (D, text channels), or the reverse in Paddle
    text = sum(shapes["caption_projection.linear_1.weight"]) - width
    allegro = channels == ALLEGRO_CHANNELS
    return {
        "in_channels": channels,
        "out_channels": shapes["proj_out.bias"][0] // patch**2,
        "patch_size": patch,
        "num_attention_heads": max(width // HEAD_DIM, 1),
        "attention_head_dim": HEAD_DIM,
        "num_layers": sum(name.endswith(".attn1.to_q.weight") for name in shapes),
        "caption_channels": text,
        "sparse_n": 1 if allegro else 4,
        "interpolation_scale_t": 2.2 if allegro else 1.0,
        "interpolation_scale_h": 2.0 if allegro else 1.0,
        "interpolation_scale_w": 2.0 if allegro else 1.0,
    }


def _kind() -> type[nn.Module]:
    from core.models.opensora_dit import OpenSoraDiT

    return OpenSoraDiT


NETWORKS = (
    Network(
        name="transformer of Open-Sora-Plan v1.3 or Allegro",
        component="transformer",
        marks=(r"pos_embed\.proj\.", r"adaln_single\.linear\.", r"transformer_blocks\.0\.attn2\."),
        settings=settings,
        kind=_kind,
    ),
)

"""Motion modules of AnimateDiff: the original files (guoyww/AnimateDiff, v1 to v3), diffusers' MotionAdapter, and whole
UNets with motion modules in them. Names (reference: the two programs' own modules):

    original   down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.1.to_q.weight
    diffusers  down_blocks.0.motion_modules.0.transformer_blocks.0.attn2.to_q.weight

A bijection over the weights. The table of positions is a function of the place, no weight: the original has one for
each attention (`pos_encoder.pe`), diffusers one for each block (`pos_embed.pe`). Programs tell the version by it: 24
places are v1; with a module in the middle it is v2, else v3.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from core.errors import UserError
from core.weights.lazy import Lazy, State
from core.weights.network import Network, Shapes

INSIDE = r"(?:(?:down|up)_blocks\.\d+|mid_block)\.motion_modules\.\d+\."
"""How names of weights in motion modules start."""
COMPONENT = "motion_adapter"
"""Their folder in a pipeline."""
PLACES = 32
"""Length of the table of positions where a file has none: v2's and v3's. A shorter one is its beginning."""
FROM_ORIGINAL = (
    (r"\.temporal_transformer\.", "."),
    (r"\.attention_blocks\.0\.", ".attn1."),
    (r"\.attention_blocks\.1\.", ".attn2."),
    (r"\.norms\.0\.", ".norm1."),
    (r"\.norms\.1\.", ".norm2."),
    (r"\.ff_norm\.", ".norm3."),
)
TO_ORIGINAL = (
    (r"\.attn1\.", ".attention_blocks.0."),
    (r"\.attn2\.", ".attention_blocks.1."),
    (r"\.norm1\.", ".norms.0."),
    (r"\.norm2\.", ".norms.1."),
    (r"\.norm3\.", ".ff_norm."),
)
THEIRS, OURS = "pos_encoder.pe", "pos_embed.pe"


def in_motion_module(name: str) -> bool:
    """Whether a tensor or layer of this name (diffusers' or the original's) is in a motion module."""
    return re.match(INSIDE, name) is not None


def from_original(name: str) -> str:
    """The original's name of a tensor or layer as diffusers'; any other as it is."""
    return _by(FROM_ORIGINAL, name) if in_motion_module(name) and ".temporal_transformer." in name else name


def to_original(name: str) -> str:
    """The reverse, of a name in a motion module."""
    stem = re.match(INSIDE, name)
    assert stem, name
    return f"{stem[0]}temporal_transformer.{_by(TO_ORIGINAL, name[stem.end() :])}"


def _by(rules: Iterable[tuple[str, str]], name: str) -> str:
    for pattern, new in rules:
        name = re.sub(pattern, new, name)
    return name


# ---------------------------------------------------------------------------------------------------------- positions


def positions(length: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The table (1, length, width): sines and cosines by turns, of frequencies 10,000 ^ (-2i / width)."""
    at = torch.arange(length).unsqueeze(1)
    frequency = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    table = torch.zeros(1, length, width)
    table[0, :, 0::2], table[0, :, 1::2] = torch.sin(at * frequency), torch.cos(at * frequency)
    return table.to(dtype)


def placed(name: str, entry: Lazy, shape: tuple[int, ...]) -> Lazy:
    """A table of positions in the length that is wanted; other tensors, and tables of another width, as they are."""
    if not name.endswith(OURS) or entry.shape == shape or len(shape) != 3 or entry.shape[-1:] != shape[-1:]:
        return entry
    return Lazy(shape, entry.dtype, functools.partial(_remade, name, entry, shape, entry.dtype))


def _remade(name: str, stored: Lazy, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The table in this shape, after the stored one was seen to be the same as far as both go."""
    table, known = positions(shape[1], shape[2]), stored.read().float().reshape(-1, shape[2])
    both = min(len(known), shape[1])
    if not torch.allclose(known[:both], table[0, :both], atol=1e-2):  # bfloat16 is off by 4e-3
        raise UserError(f"{name}: these positions are not the sines and cosines that diffusers computes")
    return table.to(dtype)


def named(state: State) -> dict[str, Lazy]:
    """Tensors under diffusers' names, with a table of positions for each block."""
    found = {from_original(name): entry for name, entry in state.items()}
    renamed = {name: entry for name, entry in found.items() if not name.endswith(THEIRS)}
    for name, entry in found.items():
        if in_motion_module(name) and name.endswith(".norm1.weight"):
            block, like = name.removesuffix("norm1.weight"), (entry.shape[-1], entry.dtype)
            renamed.setdefault(f"{block}{OURS}", _table(block, found.get(f"{block}attn1.{THEIRS}"), *like))
    return renamed


def _table(block: str, stored: Lazy | None, width: int, dtype: torch.dtype) -> Lazy:
    if stored is None:
        return Lazy((1, PLACES, width), dtype, lambda: positions(PLACES, width, dtype))
    shape = (1, stored.shape[-2] if len(stored.shape) > 1 else 0, width)
    return Lazy(shape, dtype, functools.partial(_remade, f"{block}{THEIRS}", stored, shape, dtype))


def original(state: State) -> dict[str, Lazy]:
    """The weights of a MotionAdapter under the original's names: what ComfyUI, the WebUI and diffusers'
    `MotionAdapter.from_single_file` open. They recognise it by the tables of positions, which are written twice.
    """
    out: dict[str, Lazy] = {}
    for name, entry in state.items():
        if name.endswith(OURS):
            block = name.removesuffix(OURS)
            out |= {to_original(f"{block}attn{i}.{THEIRS}"): entry for i in (1, 2)}
        else:
            out[to_original(name)] = entry
    return out


def version(shapes: Shapes) -> str:
    """v1, v2 or v3, of shapes under diffusers' names."""
    if any(name.startswith("mid_block.motion_modules.") for name in shapes):
        return "v2"
    return "v1" if next((shape[1] for name, shape in shapes.items() if name.endswith(OURS)), PLACES) == 24 else "v3"


# -------------------------------------------------------------------------------------------------------------- sizes


def settings(shapes: Shapes) -> dict[str, Any]:
    """Arguments of a MotionAdapter, of shapes under diffusers' names. Heads and the groups of norms do not show: 8 and
    32, as published.
    """
    levels = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("down_blocks."))
    downs = [f"down_blocks.{level}.motion_modules." for level in range(levels)]
    return {
        "block_out_channels": tuple(shapes[f"{down}0.norm.weight"][0] for down in downs),
        "motion_layers_per_block": _one([_count(shapes, down) for down in downs]),
        "motion_transformer_layers_per_block": _one([_count(shapes, f"{down}0.transformer_blocks.") for down in downs]),
        "motion_num_attention_heads": 8,
        "motion_norm_num_groups": 32,
        "motion_max_seq_length": next(shape[1] for name, shape in shapes.items() if name.endswith(OURS)),
        "use_motion_mid_block": "mid_block.motion_modules.0.norm.weight" in shapes,
    }


def _count(shapes: Shapes, stem: str) -> int:
    return len({name[len(stem) :].partition(".")[0] for name in shapes if name.startswith(stem)})


def _one(counts: list[int]) -> int | tuple[int, ...]:
    """diffusers' way: a number where it is the same in every block."""
    return counts[0] if len(set(counts)) == 1 else tuple(counts)


def _kind() -> type[nn.Module]:
    from diffusers import MotionAdapter

    return MotionAdapter


MARKS = (r"down_blocks\.0\.motion_modules\.0\.", r"up_blocks\.0\.motion_modules\.0\.")
OF_UNET = (
    ("norm_num_groups", "motion_norm_num_groups"),
    ("layers_per_block", "motion_layers_per_block"),
    ("temporal_transformer_layers_per_block", "motion_transformer_layers_per_block"),
    ("temporal_transformer_layers_per_mid_block", "motion_transformer_layers_per_mid_block"),
    ("mid_block_layers", "motion_mid_block_layers_per_block"),
)
"""What the config of a UNetMotionModel calls a MotionAdapter's arguments."""
UNET = Network(
    name="UNet with motion modules (UNetMotionModel, or AnimateDiff's own)",
    component="unet",
    marks=(r"conv_in\.", r"down_blocks\.0\.resnets\.", *MARKS),
    rename=named,
    settings=settings,
    kind=_kind,
    takes=INSIDE,
    becomes=COMPONENT,
    renamed_settings=OF_UNET,
)
NETWORKS = (
    UNET,
    Network(
        name="motion modules of AnimateDiff, original names",
        component=COMPONENT,
        marks=tuple(rf"{mark}temporal_transformer\." for mark in MARKS),
        rename=named,
        settings=settings,
        kind=_kind,
        renamed_settings=OF_UNET,
    ),
    Network(
        name="MotionAdapter of diffusers",
        component=COMPONENT,
        marks=MARKS,
        rename=named,
        settings=settings,
        kind=_kind,
        renamed_settings=OF_UNET,
    ),
)

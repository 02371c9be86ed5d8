"""Networks of latent diffusion in checkpoints (LDM sheet, section 8): CompVis' names and diffusers', which are also
PaddleMIX's, and the names of PaddleMIX's text encoder before 2023.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from core.weights.lazy import State
from core.weights.network import Network, Shapes

RESIDUAL = (
    ("in_layers.0.", "norm1."),
    ("in_layers.2.", "conv1."),
    ("out_layers.0.", "norm2."),
    ("out_layers.3.", "conv2."),
    ("emb_layers.1.", "time_emb_proj."),
    ("skip_connection.", "conv_shortcut."),
)
"""Names in a residual block of the UNet; those in a transformer are equal."""
ENDS = (
    ("time_embed.0.", "time_embedding.linear_1."),
    ("time_embed.2.", "time_embedding.linear_2."),
    ("input_blocks.0.0.", "conv_in."),
    ("middle_block.0.", "mid_block.resnets.0."),
    ("middle_block.1.", "mid_block.attentions.0."),
    ("middle_block.2.", "mid_block.resnets.1."),
    ("out.0.", "conv_norm_out."),
    ("out.2.", "conv_out."),
)
BLOCK = re.compile(r"(input|output)_blocks\.(\d+)\.(\d+)\.(.*)")
TEXT = (
    (r"token_emb\.", "model.embed_tokens."),
    (r"pos_emb\.emb\.", "model.embed_positions."),
    (r"norm\.", "model.layer_norm."),
)
TEXT_PART = re.compile(r"attn_layers\.layers\.(\d+)\.([01])\.(.*)")
ATTENTION = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
OLD_TEXT = (
    (r"embeddings\.word_embeddings\.", "model.embed_tokens."),
    (r"embeddings\.position_embeddings\.", "model.embed_positions."),
    (r"encoder\.layers\.(\d+)\.norm1\.", r"model.layers.\1.self_attn_layer_norm."),
    (r"encoder\.layers\.(\d+)\.norm2\.", r"model.layers.\1.final_layer_norm."),
    (r"encoder\.layers\.(\d+)\.linear([12])\.", r"model.layers.\1.fc\2."),
    (r"encoder\.layers\.", "model.layers."),
    (r"final_layer_norm\.", "model.layer_norm."),
)


# ---------------------------------------------------------------------------------------------------------------- UNet


def unet_from_compvis(state: State) -> dict[str, Any]:
    """CompVis' names as diffusers': blocks are counted within a level, not through the network."""
    last = max(int(found[2]) for name in state if (found := BLOCK.match(name)))
    downs = [i for i in range(last + 1) if f"input_blocks.{i}.0.op.weight" in state]
    blocks = (downs or [last + 1])[0] - 1  # residual blocks of a level on the way down
    return {_unet_name(name, blocks): entry for name, entry in state.items()}


def _unet_name(name: str, blocks: int) -> str:
    for theirs, ours in ENDS:
        if name.startswith(theirs):
            return _residual(ours + name.removeprefix(theirs))
    found = BLOCK.match(name)
    if found is None:
        return name
    side, index, layer, rest = found[1], int(found[2]), int(found[3]), found[4]
    level, place = divmod(index - (side == "input"), blocks + 1)
    stem = f"{'down' if side == 'input' else 'up'}_blocks.{level}"
    if rest.startswith("op."):
        return f"{stem}.downsamplers.0.conv.{rest.removeprefix('op.')}"
    if layer and rest.startswith("conv."):
        return f"{stem}.upsamplers.0.{rest}"
    return _residual(f"{stem}.{'attentions' if layer else 'resnets'}.{place}.{rest}")


def _residual(name: str) -> str:
    for theirs, ours in RESIDUAL:
        name = name.replace(f".{theirs}", f".{ours}")
    return name


def unet_settings(shapes: Shapes) -> dict[str, Any]:
    """Sizes of the UNet under diffusers' names. Heads do not show: 8 at every level, as published."""
    levels = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("down_blocks."))
    block = "mid_block.attentions.0.transformer_blocks.0"
    # (channels, context), or the reverse in Paddle
    context = sum(shapes[f"{block}.attn2.to_k.weight"]) - shapes[f"{block}.norm1.weight"][0]
    return {
        "sample_size": 32,
        "in_channels": shapes["conv_in.weight"][1],
        "out_channels": shapes["conv_out.weight"][0],
        "block_out_channels": tuple(shapes[f"down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(levels)),
        "layers_per_block": sum(name.endswith("conv1.weight") and name.startswith("down_blocks.0.") for name in shapes),
        "down_block_types": tuple(
            "CrossAttnDownBlock2D" if _attends(shapes, f"down_blocks.{i}") else "DownBlock2D" for i in range(levels)
        ),
        "up_block_types": tuple(
            "CrossAttnUpBlock2D" if _attends(shapes, f"up_blocks.{i}") else "UpBlock2D" for i in range(levels)
        ),
        "cross_attention_dim": context,
        "attention_head_dim": 8,
    }


def _attends(shapes: Shapes, stem: str) -> bool:
    return any(name.startswith(f"{stem}.attentions.") for name in shapes)


# -------------------------------------------------------------------------------------------------------- text encoder


def text_from_compvis(state: State) -> dict[str, Any]:
    """CompVis' names as diffusers': a layer there is two entries, attention and feed-forward, each with its norm."""
    return {_text_name(name): entry for name, entry in state.items()}


def _text_name(name: str) -> str:
    found = TEXT_PART.match(name)
    if found is None:
        return _by(TEXT, name)
    index, is_body, rest = int(found[1]), found[2] == "1", found[3]
    stem, feeds = f"model.layers.{index // 2}", index % 2
    if not is_body:
        return f"{stem}.{'final_layer_norm' if feeds else 'self_attn_layer_norm'}.{rest}"
    if feeds:
        return f"{stem}.{rest.replace('net.0.0.', 'fc1.').replace('net.2.', 'fc2.')}"
    head, _, kind = rest.partition(".")
    return f"{stem}.self_attn.{ATTENTION.get(head, head)}.{kind}"


def text_from_old_paddle(state: State) -> dict[str, Any]:
    return {_by(OLD_TEXT, name): entry for name, entry in state.items()}


def _by(rules: tuple[tuple[str, str], ...], name: str) -> str:
    """The name by the first rule that fits its start."""
    return next((re.sub(f"^{rule}", new, name) for rule, new in rules if re.match(rule, name)), name)


def text_from_diffusers(state: State) -> dict[str, Any]:
    """The head aside, all names begin with `model.`, which may have been taken for the prefix of a framework."""
    return {n if n.startswith(("model.", "to_logits.")) else f"model.{n}": entry for n, entry in state.items()}


def text_settings(shapes: Shapes) -> dict[str, Any]:
    """Sizes of the text encoder. Heads do not show: they are 64 wide, as published."""
    layers = 1 + max(int(found[1]) for name in shapes if (found := re.match(r"model\.layers\.(\d+)\.", name)))
    vocabulary, width = shapes["model.embed_tokens.weight"]
    # (heads x 64, width), or the reverse in Paddle
    inner = sum(shapes["model.layers.0.self_attn.q_proj.weight"]) - width
    return {
        "vocab_size": vocabulary,
        "max_position_embeddings": shapes["model.embed_positions.weight"][0],
        "encoder_layers": layers,
        "encoder_ffn_dim": shapes["model.layers.0.fc1.bias"][0],
        "encoder_attention_heads": max(inner // 64, 1),
        "head_dim": 64 if inner >= 64 else inner,
        "d_model": width,
        "logits": "to_logits.weight" in shapes,
    }


def _unet() -> type[nn.Module]:
    from core.models.image_unet import ImageUNet

    return ImageUNet


def _text() -> type[nn.Module]:
    from core.models.ldm_bert import LDMBertEncoder

    return LDMBertEncoder


NETWORKS = (
    Network(
        name="UNet of latent diffusion, CompVis names",
        component="unet",
        marks=(r"input_blocks\.", r"middle_block\.1\.transformer_blocks\.0\.attn2\."),
        rename=unet_from_compvis,
        settings=unet_settings,
        kind=_unet,
    ),
    Network(
        name="UNet2DConditionModel of diffusers",
        component="unet",
        marks=(r"conv_in\.", r"down_blocks\.0\.resnets\.", r"mid_block\.attentions\.0\.transformer_blocks\.0\.attn2\."),
        settings=unet_settings,
        kind=_unet,
    ),
    Network(
        name="LDM's text encoder, CompVis names",
        component="text_encoder",
        marks=(r"token_emb\.", r"attn_layers\.layers\.0\.0\."),
        rename=text_from_compvis,
        settings=text_settings,
        kind=_text,
    ),
    Network(
        name="LDM's text encoder, PaddleMIX's old names",
        component="text_encoder",
        marks=(r"embeddings\.word_embeddings\.", r"encoder\.layers\.0\.linear1\."),
        rename=text_from_old_paddle,
        settings=text_settings,
        kind=_text,
    ),
    Network(
        name="LDMBertModel of diffusers",
        component="text_encoder",
        marks=(r"(model\.)?embed_tokens\.", r"(model\.)?layers\.0\.self_attn_layer_norm\."),
        rename=text_from_diffusers,
        settings=text_settings,
        kind=_text,
    ),
)

"""Exports that a stock pipeline of diffusers opens whole: its index, its folders, and what it knows nothing of."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from torch import Tensor

from core.slots import CLIPText, Diffusion, FrameVAE, LDMBert, LDMUNet, MotionUNet, StableDiffusionUNet
from core.weights.folder import NAME, write_weights
from core.weights.lazy import Lazy, safetensors
from core.weights.names import INDEX


@dataclass(frozen=True)
class Pipeline:
    """A class of diffusers."""

    name: str
    folders: Mapping[str, str]
    """Our folder of a network or tokenizer → the pipeline's."""
    classes: Mapping[str, tuple[str | None, str | None]]
    """Library and class of what is in each of the pipeline's folders; None for what it does without."""


LDM = Pipeline(
    name="LDMTextToImagePipeline",
    folders={"vae": "vqvae", "text_encoder": "bert"},
    classes={
        "vqvae": ("diffusers", "AutoencoderKL"),
        "bert": ("latent_diffusion", "LDMBertModel"),
        "tokenizer": ("transformers", "BertTokenizer"),
        "unet": ("diffusers", "UNet2DConditionModel"),
        "scheduler": ("diffusers", "DDIMScheduler"),
    },
)
"""LDM's text-to-image pipeline. It always asks for 77 tokens, and takes latents for an eighth of the picture."""

STABLE_DIFFUSION = Pipeline(
    name="StableDiffusionPipeline",
    folders={},
    classes={
        "vae": ("diffusers", "AutoencoderKL"),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "tokenizer": ("transformers", "CLIPTokenizer"),
        "unet": ("diffusers", "UNet2DConditionModel"),
        "scheduler": ("diffusers", "DDIMScheduler"),
        "safety_checker": (None, None),
        "feature_extractor": (None, None),
    },
)
"""Stable Diffusion's, and with a motion adapter beside it the base of AnimateDiff's. It asks for as many tokens as the
text encoder knows."""


def pipeline_of(system: Diffusion) -> Pipeline | None:
    """The stock pipeline that these networks make up, if there is one."""
    vae, told = system.autoencoder, system.conditions[0] if system.conditions else None
    if isinstance(vae, FrameVAE) and isinstance(told, LDMBert) and isinstance(system.denoiser, LDMUNet):
        return LDM if told.max_length == 77 and len(vae.block_out_channels) == 4 else None
    if isinstance(vae, FrameVAE) and isinstance(told, CLIPText) and type(system.denoiser) is StableDiffusionUNet:
        return STABLE_DIFFUSION if told.max_length == told.max_position_embeddings else None
    return None


def complete(folder: Path, system: Diffusion) -> None:
    """Make an export what a stock pipeline opens, as far as there is one for these networks."""
    if pipeline := pipeline_of(system):
        arrange(folder, pipeline)
    elif isinstance(system.denoiser, MotionUNet) and isinstance(system.autoencoder, FrameVAE):
        shift_into_weights(folder / "vae")  # AnimateDiff's pipeline is put together from a base and what has learnt


def arrange(folder: Path, pipeline: Pipeline) -> None:
    """Turn an export into a folder of the pipeline: `DiffusionPipeline.from_pretrained` opens it."""
    shift_into_weights(folder / "vae")
    for ours, theirs in pipeline.folders.items():
        if (folder / theirs).exists():  # of an export before
            shutil.rmtree(folder / theirs)
        (folder / ours).rename(folder / theirs)
    index = {"_class_name": pipeline.name, "_diffusers_version": version("diffusers"), **pipeline.classes}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def shift_into_weights(vae: Path) -> None:
    """An AutoencoderKL's folder without a shift of its latents, which old pipelines ignore: the 1 x 1 convolutions
    around z add and take it away. Latents = scale * z are then what scale * (z + shift) was.
    """
    config = json.loads((vae / "config.json").read_text())
    shift = -(config.get("shift_factor") or 0.0)  # diffusers subtracts it
    if not shift:
        return
    write_weights(vae, shifted(safetensors(vae / NAME), shift))
    (vae / "config.json").write_text(json.dumps(config | {"shift_factor": 0.0}, indent=2) + "\n")


def shifted(state: Mapping[str, Lazy], shift: float) -> dict[str, Tensor | Lazy]:
    """The weights of an AutoencoderKL whose z is larger by `shift`, and decodes to the same."""
    encode, decode = (state[f"{name}.bias"].read().clone() for name in ("quant_conv", "post_quant_conv"))
    encode[: len(encode) // 2] += shift  # mean, then log variance
    decode -= shift * state["post_quant_conv.weight"].read().sum((1, 2, 3))
    return dict(state) | {"quant_conv.bias": encode, "post_quant_conv.bias": decode}

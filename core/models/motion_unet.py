"""diffusers' stock `UNetMotionModel` (AnimateDiff, arXiv 2307.04725) as a denoiser of clips, with LoRA by peft.

Names of tensors and config are the stock ones. What stock code leaves to its caller is done here: the text is repeated
for every frame, fresh motion modules change nothing, temporal attention over many pixels is split, projections that
diffusers calls by a keyword can have a LoRA.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from diffusers import MotionAdapter, UNetMotionModel
from diffusers.models.attention_processor import Attention
from einops import rearrange
from torch import Tensor, nn

from core.attention import attend
from core.errors import UserError
from core.hashing import hash_of
from core.models.partly import learnt, only
from core.models.stock import StockConfig
from core.weights.folder import write_folder
from core.weights.lazy import lazily
from core.weights.lora import lora_of, write_lora
from core.weights.names import ADAPTER, without_peft

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from core.slots import FreeNoise
    from core.slots import LoRA as LoRASlot
    from core.slots import MotionUNet as MotionUNetSlot

MOTION = re.compile(r".*motion_modules.*")
"""Names that belong to a motion module."""
POSITIONS = ".pos_embed.pe"
"""End of the name of a table of frame positions, which follows from its length."""
ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")
FEED_FORWARD = (".net.0.proj", ".net.2")
PROJECTIONS = (".proj_in", ".proj_out")
TARGETS = {
    "attention": ATTENTION,
    "transformer": ATTENTION + FEED_FORWARD,
    "all": ATTENTION + FEED_FORWARD + PROJECTIONS,
}
"""Ends of the names of the layers of each preset of `LoRA.targets`."""


class MotionUNet(StockConfig, UNetMotionModel):
    """Predicts the target of (B, C, T, H, W) latents at timesteps (B,), told a text (B, N, cross_attention_dim)."""

    stock: ClassVar[str] = "UNetMotionModel"

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        self.lora: LoRASlot | None = None
        self.samples = Samples()
        self.window: int | None = None
        """Frames that its motion modules see at a time; None: all."""
        for name, part in self.named_modules():
            if isinstance(part, Attention) and MOTION.fullmatch(name):
                part.attention_backend, part.head_dim = "sdpa", part.inner_dim // part.heads
                part.set_processor(TemporalAttention())

    @property
    def spatial_factor(self) -> int:
        """What height and width must be multiples of."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    @property
    def max_frames(self) -> int:
        """The longest clip that has positions."""
        return int(self.config.motion_max_seq_length)

    def blocks(self) -> list[nn.Module]:
        """Units for activation checkpointing, compilation and sharding: every residual block, every transformer over
        pixels, and every motion module, which diffusers' own checkpointing leaves out. Whole levels would be too large:
        what is made again for a backward pass is made for one unit at a time.
        """
        levels = [*self.down_blocks, self.mid_block, *self.up_blocks]
        kinds = ("resnets", "attentions", "motion_modules")
        return [part for level in levels for kind in kinds for part in getattr(level, kind, ())]

    def forward(self, x: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        frames = x.shape[2]
        if (self.window or frames) > self.max_frames:
            raise UserError(
                f"a clip of {frames} frames: the motion modules have positions for {self.max_frames}; in windows of so "
                "many it can be sampled: --sampler.free-noise=FreeNoise"
            )
        text = encoder_hidden_states.repeat_interleave(frames, dim=0)  # (B T, N, D), clip by clip
        return super().forward(x, timesteps.reshape(-1).expand(len(x)), text).sample.to(x.dtype)

    def windowed(self, slot: FreeNoise) -> AbstractContextManager[None]:
        """While it lasts the motion modules see windows of frames."""
        from core.models.free_noise import windowed

        return windowed(self, slot)

    def merge_lora(self) -> None:
        """Fold the LoRA into the layers that it is on."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        for part in self.modules():
            if isinstance(part, BaseTunerLayer):
                part.merge()  # type: ignore[no-untyped-call]

    # -------------------------------------------------------------------------------------------------- in and out

    def starts(self, component: str) -> dict[str, Tensor]:
        """Parameters that weights of `component` (`unet`: of the UNet of pictures; `motion_adapter`) are for, under the
        names that these have in it.
        """
        motion = component == "motion_adapter"
        plain = {without_peft(name): p for name, p in self.named_parameters() if ".lora_" not in name}
        return {name: p for name, p in plain.items() if bool(MOTION.fullmatch(name)) == motion}

    @property
    def written_as(self) -> str:
        """What its export is: `lora`, a `motion_adapter` where nothing else has learnt, or the whole `unet`."""
        if self.lora is not None:
            return "lora"
        return "motion_adapter" if all(MOTION.fullmatch(name) for name in learnt(self)) else "unet"

    def export_names(self) -> list[str]:
        """Names of the tensors that an export is made of."""
        wanted = {"lora": learnt(self), "motion_adapter": self.adapter().state_dict(), "unet": self.state_dict()}
        return list(wanted[self.written_as])

    def write(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Write what it has learnt into an export: motion_adapter/ as diffusers' MotionAdapter, lora/ as diffusers'
        pipelines read it, or unet/.
        """
        own = folder / self.written_as
        if lora := lora_of(self, lazily(state)):
            write_lora(lora, own)
        else:
            write_folder(self if self.written_as == "unet" else self.adapter(), own, state)

    def adapter(self) -> MotionAdapter:
        """diffusers' container of motion modules of these sizes, on the meta device."""
        c = self.config
        with torch.device("meta"):
            return MotionAdapter(
                block_out_channels=c.block_out_channels,
                motion_layers_per_block=c.layers_per_block,
                motion_transformer_layers_per_block=c.temporal_transformer_layers_per_block,
                motion_transformer_layers_per_mid_block=c.temporal_transformer_layers_per_mid_block,
                motion_num_attention_heads=c.motion_num_attention_heads,
                motion_norm_num_groups=c.norm_num_groups,
                motion_max_seq_length=c.motion_max_seq_length,
                use_motion_mid_block=c.use_motion_mid_block,
            )


class TemporalAttention:
    """Attention over the frames of each pixel, for diffusers' Attention (P, T, C). Pixels are many: P = B h w, and CUDA
    ends at 65,535 pixels times heads, so `attend` splits them.
    """

    def __call__(self, attention: Attention, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        layers = (attention.to_q, attention.to_k, attention.to_v)
        q, k, v = (rearrange(to(hidden_states), "p t (heads d) -> p heads t d", heads=attention.heads) for to in layers)
        seen = attend(q, k, v, attention.attention_backend)
        return attention.to_out[0](rearrange(seen, "p heads t d -> p t (heads d)"))  # type: ignore[no-any-return]


# ---------------------------------------------------------------------------------------------------------------- LoRA


class Samples:
    """Whose activations a network holds: one key a sample (`Draw.keys`), for what is drawn sample by sample in it."""

    def __init__(self) -> None:
        self.keys: list[int] = []


class SampleDropout(nn.Module):
    """Dropout whose mask is a function of the sample's key and the layer's name, so that micro-batches and ranks do not
    matter. A sample's rows lie together in the first dimension.
    """

    def __init__(self, p: float, name: str, samples: Samples) -> None:
        super().__init__()
        self.p, self.name, self.samples = p, name, samples

    def forward(self, x: Tensor) -> Tensor:
        return x * self._mask(x) / (1.0 - self.p) if self.training else x

    def _mask(self, x: Tensor) -> Tensor:
        mask = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if not x.is_meta:
            keys = self.samples.keys
            for key, rows in zip(keys, mask.chunk(len(keys)), strict=True):
                generator = torch.Generator(x.device).manual_seed(hash_of(key, self.name) & 0xFFFFFFFF)
                rows.bernoulli_(1.0 - self.p, generator=generator)
        return mask


def add_lora(unet: MotionUNet, slot: MotionUNetSlot) -> MotionUNet:
    """Freeze `unet` and give the layers that `slot` names a LoRA. Raises UserError where it names none."""
    from peft import LoraConfig, inject_adapter_in_model

    assert slot.lora is not None
    only(unet, slot.trainable_modules)  # matches something
    layers = targets(unet, slot.trainable_modules, slot.lora.targets)
    if not layers:
        raise UserError(
            f"trainable_modules {slot.trainable_modules!r} with LoRA targets {slot.lora.targets!r}: no linear layer"
        )
    config = LoraConfig(r=slot.lora.rank, lora_alpha=slot.lora.alpha, target_modules=layers)  # type: ignore[arg-type]
    inject_adapter_in_model(config, unet, ADAPTER)
    unet.lora = slot.lora
    for name in layers:
        layer = unet.get_submodule(name)
        if slot.lora.dropout:
            layer.lora_dropout[ADAPTER] = SampleDropout(slot.lora.dropout, name, unet.samples)  # type: ignore[index, union-attr, operator]
        if name.endswith(PROJECTIONS):
            layer.register_forward_pre_hook(_by_position, with_kwargs=True)
    return only(unet, r".*\.lora_[AB]\..*")


def targets(unet: nn.Module, pattern: str, preset: str) -> list[str]:
    """Names of the linear layers of a preset with a parameter whose name `pattern` matches."""
    return [
        name
        for name, layer in unet.named_modules()
        if isinstance(layer, nn.Linear)
        and name.endswith(TARGETS[preset])
        and any(re.fullmatch(pattern, f"{name}.{own}") for own, _ in layer.named_parameters())
    ]


def _by_position(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """diffusers calls proj_in and proj_out with `input=`; the argument of peft's layer is called `x`."""
    given = dict(kwargs)
    return (*args, *([given.pop("input")] if "input" in given else [])), given

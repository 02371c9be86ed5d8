"""Denoiser slots of AnimateDiff (arXiv 2307.04725): Stable Diffusion's UNet, the same with motion modules, and LoRA."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

from core.slots.denoiser import LDMUNet
from core.slots.slot import Slot

if TYPE_CHECKING:
    from torch import nn

EVERYTHING = ".*"
"""The `trainable_modules` that leaves nothing frozen."""


class StableDiffusionUNet(LDMUNet):
    """diffusers' `UNet2DConditionModel` as Stable Diffusion 1.x has it, 859,520,964 parameters. Pictures are clips of
    one frame.
    """

    context_dim: int = 768
    """Width of the text: the hidden size of the text encoder."""
    weights: str | None = None
    """What it starts from: a folder with unet/, or that folder; a checkpoint file, a hub id, run:<id>, shipped:<name>.
    Needed where a part of it is frozen. None: fresh."""
    source: str = "any Stable Diffusion 1.x, e.g. hub stable-diffusion-v1-5/stable-diffusion-v1-5"
    """Where weights for it were published; shown when they are missing."""
    fetch: str = "hf download stable-diffusion-v1-5/stable-diffusion-v1-5 --include 'unet/*' --local-dir weights/sd15"
    """The command that gets them."""
    trainable_modules: str = EVERYTHING
    """Regular expression: parameters whose whole name it matches learn, the others stay as they are."""

    def check(self) -> None:
        super().check()
        try:
            re.compile(self.trainable_modules)
        except re.error as error:
            self.refuse("trainable_modules", f"is no regular expression: {error}")

    @property
    def learns_whole(self) -> bool:
        """Whether nothing of it is frozen."""
        return self.trainable_modules == EVERYTHING

    def build(self) -> nn.Module:
        from core.models.partly import only

        return only(super().build(), self.trainable_modules)


class MotionModules(Slot):
    """Motion modules: transformers over the frames of a pixel, one behind each residual block and its attention."""

    weights: str | None = None
    """What they start from: a MotionAdapter's folder, one with motion_adapter/, a hub id, run:<id>, shipped:<name>.
    None: fresh, with the last layer of each at zero, so that they change nothing yet."""
    source: str = "hub guoyww/animatediff-motion-adapter-v1-5-2"
    """Where weights for them were published; shown when they are missing."""
    fetch: str = (
        "hf download guoyww/animatediff-motion-adapter-v1-5-2 config.json diffusion_pytorch_model.safetensors "
        "--local-dir weights/motion-adapter-v1-5-2"
    )
    """The command that gets them."""
    num_heads: int = 8
    """Attention heads."""
    max_length: int = 32
    """Frames that have a position (sinusoidal): a clip must not have more. 24 in the first release."""
    mid_block: bool = True
    """One in the middle block too. Not in the first and the third release."""
    num_layers: int = 1
    """Transformer blocks of a motion module."""

    def check(self) -> None:
        for name in ("num_heads", "max_length", "num_layers"):
            if getattr(self, name) < 1:
                self.refuse(name, "must be at least 1")


class LoRA(Slot):
    """Low-rank updates of linear layers (arXiv 2106.09685): W x + alpha / rank · B A x. B starts at zero."""

    rank: int = 8
    """Rows of A."""
    alpha: float = 32.0
    """Times 1 / rank: the scale of the update."""
    dropout: float = 0.05
    """Dropout before A, in training. Its masks belong to the sample, whatever the ranks."""
    targets: Literal["all", "transformer", "attention"] = "transformer"
    """attention: to_q, to_k, to_v and to_out; transformer: the feed-forward layers too; all: also proj_in and proj_out,
    which stock pipelines cannot run (diffusers calls them by keyword, peft names it otherwise)."""

    def check(self) -> None:
        if self.rank < 1:
            self.refuse("rank", "must be at least 1")
        if self.alpha <= 0:
            self.refuse("alpha", "must be above 0")
        if not 0.0 <= self.dropout < 1.0:
            self.refuse("dropout", "must be in [0, 1)")


class MotionUNet(StableDiffusionUNet):
    """diffusers' `UNetMotionModel`: Stable Diffusion's UNet with motion modules, 1,312,730,244 parameters. By default
    the motion modules learn (453,209,280) and the UNet of pictures stays as it is.
    """

    trainable_modules: str = ".*motion_modules.*"
    """Regular expression: parameters whose whole name it matches learn, the others stay as they are. With LoRA: the
    layers with such a parameter get one, and nothing else learns."""
    motion: MotionModules = MotionModules()
    """What is added to the UNet of pictures."""
    lora: LoRA | None = None
    """Learn low-rank updates instead of the weights."""

    def check(self) -> None:
        super().check()
        if any(c % self.motion.num_heads for c in self.block_out_channels):
            self.refuse("motion", f"num_heads = {self.motion.num_heads} must divide the channels of every level")

    @property
    def learns_whole(self) -> bool:
        return self.lora is None and super().learns_whole

    @property
    def max_frames(self) -> int:
        """The longest clip, in latent frames."""
        return self.motion.max_length

    def build(self) -> nn.Module:
        from core.models.image_unet import zero_outputs
        from core.models.motion_unet import MotionUNet as Network
        from core.models.motion_unet import add_lora
        from core.models.partly import only

        inner = len(self.block_out_channels) - 1
        unet = zero_outputs(
            Network(
                sample_size=self.sample_size,
                in_channels=self.in_channels,
                out_channels=self.out_channels,
                block_out_channels=self.block_out_channels,
                layers_per_block=self.layers_per_block,
                down_block_types=("CrossAttnDownBlockMotion",) * inner + ("DownBlockMotion",),
                up_block_types=("UpBlockMotion",) + ("CrossAttnUpBlockMotion",) * inner,
                cross_attention_dim=self.context_dim,
                num_attention_heads=self.num_heads,
                norm_num_groups=self.norm_num_groups,
                motion_num_attention_heads=self.motion.num_heads,
                motion_max_seq_length=self.motion.max_length,
                use_motion_mid_block=self.motion.mid_block,
                temporal_transformer_layers_per_block=self.motion.num_layers,
                temporal_transformer_layers_per_mid_block=self.motion.num_layers,
            )
        )
        return only(unet, self.trainable_modules) if self.lora is None else add_lora(unet, self)

"""Condition slots: what a denoiser is told besides the noisy sample (text, embeddings, a low-resolution clip, a first
frame).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from core.slots.slot import Slot

if TYPE_CHECKING:
    from torch import nn


class Condition(Slot):
    """Something of the batch that becomes an input of the denoiser."""

    component: ClassVar[str] = ""
    """Name of its network, and the network's folder in an export; empty where it has none."""
    trained: ClassVar[bool] = False
    """Whether its network learns together with the denoiser (False: it is frozen, and its slot names `weights`)."""

    def build(self) -> nn.Module:
        """The network with fresh weights, on torch's current default device."""
        raise NotImplementedError


class CLIPText(Condition):
    """Captions through CLIP's text encoder (arXiv 2103.00020): the last hidden state after the final norm. Frozen.

    The defaults are those of ViT-L/14, 123,060,480 parameters.
    """

    component: ClassVar[str] = "text_encoder"

    weights: str | None = None
    """A folder with text_encoder/ and tokenizer/, or one with the files of both, a hub id or run:<id>."""
    source: str = "hub openai/clip-vit-large-patch14"
    """Where weights for it were published; shown when they are missing."""
    fetch: str = (
        "hf download openai/clip-vit-large-patch14 config.json model.safetensors tokenizer.json tokenizer_config.json "
        "vocab.json merges.txt special_tokens_map.json --local-dir weights/clip-vit-large-patch14"
    )
    """The command that gets them."""
    max_length: int = 77
    """Tokens of a caption: longer ones are cut, shorter ones padded."""
    dropout: float = 0.0
    """Share of the training samples whose caption is replaced by the empty one. Guidance is better with 0.1."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What it computes in."""
    hidden_size: int = 768
    """Width of its output: the denoiser's context_dim."""
    intermediate_size: int = 3072
    """Width of the feed-forward layers."""
    num_hidden_layers: int = 12
    """Transformer blocks."""
    num_attention_heads: int = 12
    """Attention heads; must divide hidden_size."""
    max_position_embeddings: int = 77
    """Positions that it knows; max_length must not be more."""
    vocab_size: int = 49408
    """Tokens that it knows; the tokenizer must not have more."""
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    """Activation of the feed-forward layers."""

    def check(self) -> None:
        if not 0.0 <= self.dropout < 1.0:
            self.refuse("dropout", "must be in [0, 1)")
        if not 2 < self.max_length <= self.max_position_embeddings:
            self.refuse(
                "max_length", f"must be more than 2, at most max_position_embeddings = {self.max_position_embeddings}"
            )
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            self.refuse("num_attention_heads", f"must divide hidden_size = {self.hidden_size}")
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"):
            if getattr(self, name) < 1:
                self.refuse(name, "must be at least 1")

    def build(self) -> nn.Module:
        from core.models.clip_text import CLIPTextEncoder

        return CLIPTextEncoder(self)


class LDMBert(Condition):
    """Captions through the transformer of LDM's text-to-image model (arXiv 2112.10752), trained with the denoiser.

    The defaults are those of the published model: 32 layers, 542,895,360 parameters, 1280 wide. It has no dropout.
    """

    component: ClassVar[str] = "text_encoder"
    trained: ClassVar[bool] = True

    tokenizer: str | None = None
    """Folder of a BERT tokenizer (vocab.txt or tokenizer.json), or with one in tokenizer/; run:<id>; shipped:<name>.
    Its size sets the vocabulary. None: as large as bert-base-uncased's, for plans; a run needs one."""
    source: str = (
        "hub google-bert/bert-base-uncased; Chinese: google-bert/bert-base-chinese, nghuyong/ernie-1.0-base-zh"
    )
    """Where a tokenizer was published; shown when it is missing."""
    fetch: str = (
        "hf download google-bert/bert-base-uncased vocab.txt tokenizer.json tokenizer_config.json "
        "--local-dir weights/bert-base-uncased"
    )
    """The command that gets it."""
    max_length: int = 77
    """Tokens of a caption, which are the positions that it knows: longer ones are cut, shorter ones padded."""
    dropout: float = 0.0
    """Share of the training samples whose caption is replaced by the empty one."""
    hidden_size: int = 1280
    """Width of its output: the denoiser's context_dim."""
    intermediate_size: int = 5120
    """Width of the feed-forward layers."""
    num_hidden_layers: int = 32
    """Transformer blocks."""
    num_attention_heads: int = 8
    """Attention heads."""
    head_dim: int = 64
    """Width of a head. Their sum need not be hidden_size."""
    embedding_std: float = 0.02
    """Deviation of fresh embeddings. The reference's is small beside what the layers add, so a fresh network tells
    words apart late."""

    def check(self) -> None:
        if not 0.0 <= self.dropout < 1.0:
            self.refuse("dropout", "must be in [0, 1)")
        if self.max_length < 3:
            self.refuse("max_length", "must be more than 2: the first and the last token are marks")
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"):
            if getattr(self, name) < 1:
                self.refuse(name, "must be at least 1")
        if self.embedding_std <= 0:
            self.refuse("embedding_std", "must be above 0")

    def build(self) -> nn.Module:
        from core.models.ldm_bert import LDMBertEncoder

        return LDMBertEncoder.of(self)

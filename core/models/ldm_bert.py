"""LDM's text encoder (CompVis/latent-diffusion, BERTEmbedder): captions to what a denoiser attends to.

A transformer over word pieces with a norm before each part and no mask, so that padding is attended to in training and
in sampling alike. It learns together with the denoiser. Names of tensors and config are those of diffusers'
`LDMBertModel`, which opens the folder. That one has dropout in its published config (the original has none), and its
attention is eager.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from transformers import BertTokenizer

from core.attention import attend
from core.errors import UserError
from core.slots import LDMBert
from core.weights.lazy import Lazy
from core.weights.load import locate

UNCASED = 30522
"""Entries of bert-base-uncased's vocabulary."""
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt")
STOCK = {
    "_class_name": "LDMBertModel",
    "architectures": ["LDMBertModel"],
    "model_type": "ldmbert",
    "activation_function": "gelu",
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "init_std": 0.02,
    "pad_token_id": 0,
}
"""What `LDMBertModel` is told besides the sizes. Its own default of dropout is 0.1."""


class Attention(nn.Module):
    """Self-attention over (B, N, width); the heads together need not be as wide."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim, self.attention_backend = heads, head_dim, "sdpa"
        self.k_proj, self.v_proj, self.q_proj = (nn.Linear(width, heads * head_dim, bias=False) for _ in range(3))
        self.out_proj = nn.Linear(heads * head_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (p(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for p in projections)  # (B, heads, N, head_dim)
        return self.out_proj(attend(q, k, v, self.attention_backend).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """A norm before attention and before the feed-forward part, each added to its input."""

    def __init__(self, width: int, inner: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads, head_dim)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm(x))
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class Encoder(nn.Module):
    """Token ids (B, N) to (B, N, width): learned positions, layers, a last norm."""

    def __init__(self, vocabulary: int, positions: int, width: int, layers: int, **sizes: int) -> None:
        super().__init__()
        self.embed_tokens, self.embed_positions = nn.Embedding(vocabulary, width), nn.Embedding(positions, width)
        self.layers = nn.ModuleList(Layer(width, **sizes) for _ in range(layers))
        self.layer_norm = nn.LayerNorm(width)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids) + self.embed_positions.weight[: ids.shape[1]]  # (B, N, width)
        for layer in self.layers:
            x = layer(x)
        return self.layer_norm(x)


class LDMBertEncoder(ModelMixin, ConfigMixin):
    """Captions, or their token ids (B, N), to states (B, N, d_model): the last hidden state after the final norm.

    `logits` adds the head over the vocabulary that published weights hold. Nothing uses it, so it is not trained, and
    the written folder gets zeros in its place where there is none.
    """

    weights_name: ClassVar[str] = "model.safetensors"
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"to_logits\."]

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        vocab_size: int = UNCASED,
        max_position_embeddings: int = 77,
        encoder_layers: int = 32,
        encoder_ffn_dim: int = 5120,
        encoder_attention_heads: int = 8,
        head_dim: int = 64,
        d_model: int = 1280,
        logits: bool = False,
    ) -> None:
        super().__init__()
        sizes = {"inner": encoder_ffn_dim, "heads": encoder_attention_heads, "head_dim": head_dim}
        self.model = Encoder(vocab_size, max_position_embeddings, d_model, encoder_layers, **sizes)
        self.to_logits = nn.Linear(d_model, vocab_size) if logits else None
        self.tokenizer: BertTokenizer | None = None

    @classmethod
    def of(cls, slot: LDMBert) -> LDMBertEncoder:
        """The network of a slot; the vocabulary is the tokenizer's."""
        tokenizer = read_tokenizer(slot.tokenizer) if slot.tokenizer else None
        made = cls(
            vocab_size=len(tokenizer) if tokenizer else UNCASED,
            max_position_embeddings=slot.max_length,
            encoder_layers=slot.num_hidden_layers,
            encoder_ffn_dim=slot.intermediate_size,
            encoder_attention_heads=slot.num_attention_heads,
            head_dim=slot.head_dim,
            d_model=slot.hidden_size,
        )
        for table in (made.model.embed_tokens, made.model.embed_positions):
            nn.init.normal_(table.weight, std=slot.embedding_std)
        made.tokenizer = tokenizer
        return made

    def blocks(self) -> list[nn.Module]:
        """Units for activation checkpointing, compilation and sharding, in the order of their calls."""
        return list(self.model.layers)

    def tokens(self, captions: Sequence[str]) -> Tensor:
        """Token ids (B, max_position_embeddings) int64, padded and cut; without values on the meta device."""
        length, device = self.config.max_position_embeddings, self.device
        if device.type == "meta":
            return torch.empty(len(captions), length, dtype=torch.int64, device="meta")
        if self.tokenizer is None:
            raise UserError("the text encoder has no tokenizer: set the field tokenizer of LDMBert")
        ids = self.tokenizer(
            list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )["input_ids"]
        return ids.to(device, non_blocking=True)  # type: ignore[no-any-return]

    def lost_tokens(self, caption: str) -> int:
        """Tokens of a caption that `tokens` cuts off."""
        assert self.tokenizer is not None
        return max(len(self.tokenizer(caption, verbose=False)["input_ids"]) - self.config.max_position_embeddings, 0)

    def forward(self, captions: Sequence[str] | Tensor) -> Tensor:
        return self.model(captions if isinstance(captions, Tensor) else self.tokens(captions))

    def to_json_string(self) -> str:
        """The config with what the stock class is told."""
        return json.dumps(json.loads(super().to_json_string()) | STOCK, indent=2) + "\n"

    def stored(self, state: Mapping[str, Tensor | Lazy]) -> dict[str, Tensor | Lazy]:
        """The tensors of a folder: `state`, and zeros for the head over the vocabulary that the stock class has."""
        vocabulary, width = self.config.vocab_size, self.config.d_model
        head = {"to_logits.weight": torch.zeros(vocabulary, width), "to_logits.bias": torch.zeros(vocabulary)}
        return head | dict(state)

    def write_beside(self, folder: Path) -> None:
        """`tokenizer/`, without which the weights are of no use."""
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder / "tokenizer")


def read_tokenizer(spec: str) -> Any:
    """The BERT tokenizer in the folder that `spec` names, or in `tokenizer` in it. Nothing is fetched.

    Raises UserError when there is none, or none that BERT's tokenizer reads.
    """
    if not Path(spec).expanduser().exists() and not spec.startswith(("shipped:", "run:")):
        raise UserError(f"tokenizer {spec!r}: there is no such folder; {_advice()}")
    folder = locate(spec, "tokenizer")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"tokenizer {folder}: neither {' nor '.join(TOKENIZER_FILES)} is in it; {_advice()}")
    try:
        tokenizer = BertTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"tokenizer {folder}: cannot be read as BERT's ({str(error).splitlines()[0]})") from None
    absent = [mark for mark in ("cls_token_id", "sep_token_id", "pad_token_id") if getattr(tokenizer, mark) is None]
    if absent or len(tokenizer) < 4:
        raise UserError(f"tokenizer {folder}: its vocabulary has {len(tokenizer)} entries, and no {', '.join(absent)}")
    return tokenizer


def _advice() -> str:
    return f"for example: {LDMBert().fetch}"

"""A tiny CLIP text encoder with fresh weights and a tokenizer of single bytes, in the folders of a pipeline."""

from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from core.models.clip_text import CLIPTextEncoder
from core.slots import CLIPText

SIZES = {
    "max_length": 12,
    "max_position_embeddings": 12,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 514,
}


def tiny_text(**options) -> CLIPText:
    return CLIPText(**(SIZES | options))


def byte_tokenizer() -> CLIPTokenizer:
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])


def write_text(folder: Path, seed: int = 0, **options) -> Path:
    """`folder` with text_encoder/ and tokenizer/."""
    torch.manual_seed(seed)
    encoder = CLIPTextEncoder(tiny_text(**options))
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    encoder.tokenizer = byte_tokenizer()
    encoder.write(folder, encoder.state_dict())
    return folder

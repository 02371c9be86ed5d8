"""Makes the tiny CLIP text tower that ships with the project: tokenizer and encoder in transformers' own format.
Trained on captions in seconds, so that the twins of text-to-video recipes need no download.

The tokenizer is byte-level as CLIP's: any text has tokens, and each word of the captions is one. The encoder learns to
say at the end of a caption which colour, direction and speed it names; what a denoiser then attends to is its last
hidden state, as with the large one.

python -m core.weights.text_tower CAPTIONS_CSV TARGET_FOLDER
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from core.attributes import WORDS, words_of

START, END, LAST = "<|startoftext|>", "<|endoftext|>", "</w>"
LENGTH = 77
WIDTH, LAYERS, HEADS = 64, 2, 4
STEPS, BATCH, LR = 300, 64, 2e-3
SEED = 0

Word = tuple[str, ...]
Pair = tuple[str, str]


def byte_symbols() -> list[str]:
    """A visible character for each of the 256 bytes, as GPT-2 and CLIP write them: printable ones are themselves."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(b) for b in kept] + [chr(256 + i) for i in range(256 - len(kept))]


def learn_merges(captions: Iterable[str]) -> list[Pair]:
    """Byte-pair encoding (arXiv 1508.07909, algorithm 1) of ASCII captions, until every word is one symbol. Ties go to
    the pair that sorts first.
    """
    counts = Counter(word for text in captions for word in re.findall(r"[a-z]+|[^\sa-z]+", text.lower()))
    words = {(*word[:-1], word[-1] + LAST): count for word, count in counts.items()}
    merges: list[Pair] = []
    while pairs := _pairs(words):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = {_merged(word, best): count for word, count in words.items()}
    return merges


def _pairs(words: dict[Word, int]) -> Counter[Pair]:
    found: Counter[Pair] = Counter()
    for word, count in words.items():
        for pair in pairwise(word):
            found[pair] += count
    return found


def _merged(word: Word, pair: Pair) -> Word:
    out: list[str] = []
    for symbol in word:
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return tuple(out)


def write_tokenizer(captions: Iterable[str], folder: Path) -> CLIPTokenizer:
    """`vocab.json` in CLIP's order (bytes, bytes that end a word, merges, two marks), `merges.txt` and the config."""
    folder.mkdir(parents=True, exist_ok=True)
    symbols, merges = byte_symbols(), learn_merges(captions)
    words = [*symbols, *(s + LAST for s in symbols), *map("".join, merges), START, END]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}, ensure_ascii=False) + "\n")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    marks = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, **marks}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return CLIPTokenizer.from_pretrained(folder)


def fresh(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The encoder at tiny size, with the weights of SEED."""
    torch.manual_seed(SEED)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train(tower: CLIPTextModel, tokens: Tensor, labels: list[Tensor]) -> float:
    """Cross-entropy of each attribute's word, read from the state at the end of the text. Returns the last loss."""
    heads = nn.ModuleList(nn.Linear(WIDTH, len(words)) for words in WORDS.values())
    optimizer = torch.optim.AdamW([*tower.parameters(), *heads.parameters()], lr=LR, weight_decay=0.01)
    loss = torch.zeros(())
    for step in range(STEPS):
        rows = torch.randint(len(tokens), (BATCH,), generator=torch.Generator().manual_seed(step))
        state = tower(tokens[rows]).pooler_output  # (BATCH, WIDTH)
        loss = torch.stack(
            [F.cross_entropy(head(state), label[rows]) for head, label in zip(heads, labels, strict=True)]
        ).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def make(table: Path, target: Path) -> float:
    """Write `target/tokenizer` and `target/text_encoder` (fp16) from the captions of a csv. Returns the last loss."""
    with table.open(newline="", encoding="utf-8") as file:
        captions = sorted({row["name"] for row in csv.DictReader(file)})
    tokenizer = write_tokenizer(captions, target / "tokenizer")
    tokens = tokenizer(captions, padding=True, return_tensors="pt").input_ids
    tower = fresh(tokenizer)
    loss = train(tower, tokens, [words_of(captions, attribute) for attribute in WORDS])
    tower.half().save_pretrained(target / "text_encoder")
    return loss


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: python -m core.weights.text_tower CAPTIONS_CSV TARGET_FOLDER")
    print(f"loss {make(Path(sys.argv[1]), Path(sys.argv[2])):.4f}")

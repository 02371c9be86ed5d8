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
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from core.attributes import UNREAD, WORDS, words_of

START, END, LAST = "<|startoftext|>", "<|endoftext|>", "</w>"
LENGTH = 77
PADDED = 24  # tokens of a caption in training, marks of the end included
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


def codes(labels: list[Tensor]) -> Tensor:
    """(N, WIDTH) of unit deviation, what N captions mean: the sum of a random vector for each word that they name, so
    that no attribute speaks louder than another. Learned by a classifier, the colour took 71 % of the deviation and
    the direction 9 %, which a denoiser then took long to hear.
    """
    generator = torch.Generator().manual_seed(SEED)
    vectors = [torch.randn(len(words), WIDTH, generator=generator) for words in WORDS.values()]
    meant = torch.stack([v[label] * (label != UNREAD)[:, None] for v, label in zip(vectors, labels, strict=True)]).sum(
        0
    )
    return meant / len(vectors) ** 0.5


def train(tower: CLIPTextModel, tokens: Tensor, meant: Tensor) -> float:
    """From the end of each text (N, L) on, the states become `meant` (N, WIDTH). Returns the last squared error."""
    optimizer = torch.optim.AdamW(tower.parameters(), lr=LR, weight_decay=0.01)
    loss = torch.zeros(())
    for step in range(STEPS):
        rows = torch.randint(len(tokens), (BATCH,), generator=torch.Generator().manual_seed(step))
        ended = (tokens[rows] == tower.config.eos_token_id)[..., None]  # padding is the same token
        error = (tower(tokens[rows]).last_hidden_state - meant[rows, None]).square() * ended
        loss = error.sum() / (ended.sum() * WIDTH)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def make(table: Path, target: Path) -> float:
    """Write `target/tokenizer` and `target/text_encoder` (fp16) from the captions of a csv. Returns the last loss."""
    with table.open(newline="", encoding="utf-8") as file:
        captions = sorted({row["name"] for row in csv.DictReader(file)})
    tokenizer = write_tokenizer(captions, target / "tokenizer")
    tokens = tokenizer([*captions, ""], padding="max_length", max_length=PADDED, return_tensors="pt").input_ids
    tower = fresh(tokenizer)
    loss = train(tower, tokens, codes([words_of([*captions, ""], attribute) for attribute in WORDS]))
    tower.half().save_pretrained(target / "text_encoder")
    return loss


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: python -m core.weights.text_tower CAPTIONS_CSV TARGET_FOLDER")
    print(f"loss {make(Path(sys.argv[1]), Path(sys.argv[2])):.4f}")

"""The tiny CLIP tower: any text has tokens, a caption's words are one token each, and its last states tell captions apart."""

import csv
from math import log

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPTextModel, CLIPTokenizer

from core.attributes import WORDS, words_of
from core.weights import text_tower
from core.weights.load import SHIPPED
from core.weights.text_tower import byte_symbols, learn_merges, make, write_tokenizer
from data.synthetic_captions import PHRASES, caption, told

TOWER = SHIPPED / "clip-text-tiny"
CAPTIONS = [caption(i, told(i)) for i in range(5 * 48)]


@pytest.fixture(scope="module")
def tokenizer():
    return CLIPTokenizer.from_pretrained(TOWER / "tokenizer")


@pytest.fixture(scope="module")
def tower():
    return CLIPTextModel.from_pretrained(TOWER / "text_encoder", dtype=torch.float32).eval()


def states(tower, tokenizer, texts):
    tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        return tower(tokens).last_hidden_state


def test_what_is_shipped_is_small():
    assert sum(path.stat().st_size for path in TOWER.rglob("*") if path.is_file()) < 300_000


def test_every_byte_has_its_own_visible_character():
    symbols = byte_symbols()
    assert len(symbols) == len(set(symbols)) == 256
    assert not any(s.isspace() for s in symbols)


def test_the_commonest_pair_is_merged_first_and_every_word_becomes_one_symbol():
    merges = learn_merges(["aba abb", "ab"])
    assert merges[0] == ("a", "b")  # in aba and abb; "ab" alone ends in b</w>
    assert {"".join(pair) for pair in merges} == {"ab", "aba</w>", "abb</w>", "ab</w>"}


@given(st.text())
def test_any_text_has_tokens_and_nothing_is_unknown(tokenizer, text):
    ids = tokenizer(text, truncation=True).input_ids
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in ids[1:-1]


def test_any_words_come_back_from_their_tokens(tokenizer):
    for text in ("a red cloud drifts slowly to the left", "grüne wolke zieht", "空に浮かぶ雲"):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_each_word_of_the_captions_is_one_token(tokenizer):
    for text in CAPTIONS:
        assert len(tokenizer(text).input_ids) == 2 + len(text.replace(",", " ,").split())


def test_texts_are_padded_to_77_tokens_with_the_mark_of_the_end(tokenizer, tower):
    assert tokenizer.model_max_length == 77
    ids = tokenizer("a red cloud", padding="max_length").input_ids
    assert len(ids) == 77 and set(ids[5:]) == {tokenizer.eos_token_id}
    assert states(tower, tokenizer, [""]).shape == (1, 77, 64)


def test_the_end_of_a_caption_tells_what_it_says_however_it_is_put(tower, tokenizer):
    ends = torch.stack(
        [
            state[len(tokenizer(text).input_ids) - 1]
            for text, state in zip(CAPTIONS, states(tower, tokenizer, CAPTIONS), strict=True)
        ]
    )
    ends = torch.nn.functional.normalize(ends - ends.mean(0), dim=1)
    likeness = (ends @ ends.T).fill_diagonal_(-1)
    nearest = likeness.argmax(1)
    for attribute in WORDS:
        words = words_of(CAPTIONS, attribute)
        assert (words[nearest] == words).float().mean() > 0.95


def test_making_it_learns_the_words_and_gives_the_same_files_again(tmp_path, monkeypatch):
    monkeypatch.setattr(text_tower, "STEPS", 40)
    table = tmp_path / "train.csv"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([("name", "contentUrl"), *((text, "x.mp4") for text in CAPTIONS[:8])])
    losses = [make(table, tmp_path / name) for name in "ab"]
    assert losses[0] == losses[1] < 0.7 * (log(6) + log(4) + log(2))  # of chance
    a, b = ({p.name: p.read_bytes() for p in (tmp_path / n).rglob("*.*")} for n in "ab")
    assert a == b and {"vocab.json", "merges.txt", "model.safetensors", "config.json"} <= a.keys()


def test_the_shipped_tokenizer_is_the_one_of_the_captions(tmp_path, tokenizer):
    again = write_tokenizer(CAPTIONS, tmp_path)
    texts = [phrase.format(colour="red", speed="slowly", way="up") for phrase in PHRASES]
    assert [len(ids) for ids in again(texts).input_ids] == [len(ids) for ids in tokenizer(texts).input_ids]

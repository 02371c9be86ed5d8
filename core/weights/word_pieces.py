"""Makes the tiny word-piece tokenizer that ships with the project, in BERT's own files, so that the twins of recipes
that train their text encoder need no download.

Any text in ASCII has tokens: the words of the synthetic captions are one each, other words are spelt.

python -m core.weights.word_pieces TARGET_FOLDER
"""

from __future__ import annotations

import string
import sys
from pathlib import Path

from transformers import BertTokenizer

MARKS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""In BERT's order: padding is 0."""
LENGTH = 77
WORDS = """
a an and at in is of on the there to with
red yellow green blue purple white black grey orange pink brown
cloud clouds sky drifts drifting moving moves goes slowly quickly left right up down
disc circle square triangle bar ring star cross picture shape upper lower middle centre top bottom corner
""".split()  # noqa: SIM905  it reads as it is said
"""Of synthetic captions, those there are and a few more."""


def vocabulary() -> list[str]:
    """Marks, characters, characters that go on with a word, words."""
    letters = string.ascii_lowercase + string.digits
    return [*MARKS, *letters, *string.punctuation, *(f"##{letter}" for letter in letters), *WORDS[1:]]


def write_tokenizer(folder: Path, entries: list[str]) -> BertTokenizer:
    """`vocab.txt` of these entries, and what transformers writes beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("".join(f"{entry}\n" for entry in entries), encoding="utf-8")
    tokenizer = BertTokenizer.from_pretrained(folder, model_max_length=LENGTH)
    tokenizer.save_pretrained(folder)
    return tokenizer


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m core.weights.word_pieces TARGET_FOLDER")
    print(f"{len(write_tokenizer(Path(sys.argv[1]), vocabulary()))} entries")

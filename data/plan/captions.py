"""The caption of a sample: one of the record's, a sentence for its score, cleaned (Open-Sora sheet §4.7)."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from typing import TYPE_CHECKING
from urllib.parse import unquote_plus

import numpy as np

if TYPE_CHECKING:
    from data.bucketed_slots import Captioning

HIGH = "beautiful stunning striking masterly elegant captivating polished refined artful harmonious"
LOW = "plain dull clumsy careless drab flat unpleasing crude cluttered uninspired"
WORDS = {"high": HIGH.split(), "low": LOW.split()}
"""Ten sentences a class and kind, as in the original; the words are this project's."""

MEDIA = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
DASHES = "-֊־᐀᠆‐-―⸗⸚⸺⸻⹀〜〰゠︱︲﹘﹣－"
OTHER_SCRIPTS = (
    "㇀-㇯ㇰ-ㇿ㈀-㋿㌀-㏿㐀-䶿䷀-䷿"  # strokes, kana extensions, enclosed and square signs, extension A, hexagrams
)
ODD = r"#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*"

BEFORE = (
    (r"<person>", "person"),
    (r"\b(?:https?:/{0,3}|www\d{0,3}\.)\S*", ""),
    (r"\b[a-z0-9.-]+\.(?:com|co|ru|net|org|edu|gov|it)\b[\w/-]*/?", ""),
)
AFTER_MARKUP = ((r"@\w+\b", ""), (f"[{OTHER_SCRIPTS}]+", ""))
CHINESE = (r"[一-鿿]+", "")
SIGNS = (
    (f"[{DASHES}]+", "-"),
    (r"[`´«»“”¨]", '"'),
    (r"[‘’]", "'"),
    (r"&quot;?|&amp", ""),
    (r"\d{1,3}(?:\.\d{1,3}){3}", " "),  # addresses of machines
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b|#\d{5,}\b|\b\d{6,}\b", ""),
    (rf"\S+\.(?:{MEDIA})", ""),  # names of files
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (f"[{ODD}]+", " "),
    (r"\s+\.\s+", " "),
)
CODES = (
    (r"\b[a-z]{1,3}\d{3,15}\b", ""),  # jc6640
    (r"\b[a-z]+\d+[a-z]+\b", ""),
    (r"\b\d+[a-z]+\d+\b", ""),
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{MEDIA})(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-z]+\d+[a-z]+\d+[a-z\d]*\b", " "),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # 640x480
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
)
ENDS = ((r"^[\"'](.*)[\"']$", r"\1"), (r"^['_,\-:;]", ""), (r"['_,\-:;+]$", ""), (r"^\.\S+$", ""))
JOINS = re.compile(r"[-_]")
LONGEST = 10_000
"""Letters of a caption that are looked at: no encoder takes as many, and patterns take long on endless words."""


def caption(
    texts: Sequence[str], is_image: bool, score: float | None, slot: Captioning, rng: np.random.Generator, compat: bool
) -> str:
    """One of the captions, what is said of its score, cleaned; or nothing, with the probability of the dropout."""
    text = texts[int(rng.integers(0, len(texts)))]
    if slot.scores and score is not None and (level := level_of(score, slot)):
        words = WORDS[level]
        kind = "image" if is_image else "video"
        sentence = f"A {words[int(rng.integers(0, len(words)))]} {kind} of {level} aesthetic quality."
        text = f"{sentence} {text}" if rng.random() < 0.5 else f"{text} {sentence}"
    if slot.clean:
        text = cleaned(str([text]) if compat else text, slot.chinese)  # the original cleans a list as it is printed
    return "" if slot.dropout and rng.random() < slot.dropout else text


def level_of(score: float, slot: Captioning) -> str:
    """high, low, or nothing in between."""
    return "low" if score <= slot.low else "high" if score >= slot.high else ""


def cleaned(text: str, chinese: bool) -> str:
    """The cleaner of DeepFloyd's captions, without the mending of broken encodings."""
    text = _replaced(unquote_plus(text[:LONGEST]).strip().lower(), BEFORE)
    text = _replaced(_without_markup(text), AFTER_MARKUP)
    text = _replaced(text, SIGNS if chinese else (CHINESE, *SIGNS))
    if len(JOINS.findall(text)) > 3:
        text = JOINS.sub(" ", text)
    text = html.unescape(html.unescape(text)).strip()
    return _replaced(_replaced(text, CODES).strip(), ENDS).strip()


def _replaced(text: str, table: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in table:
        text = re.sub(pattern, replacement, text)
    return text


class _Text(HTMLParser):
    """What is between the tags."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []

    def handle_data(self, data: str) -> None:
        self.parts.append(data)


def _without_markup(text: str) -> str:
    parser = _Text()
    try:
        parser.feed(text)
        parser.close()
    except AssertionError:  # what Python's parser makes of some broken declarations
        return re.sub(r"<[^>]*>", " ", text)
    return "".join(parser.parts)

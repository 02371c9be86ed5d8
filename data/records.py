"""One record of a part: from its bytes to a caption and the bytes of a picture, or to a reason why not."""

from __future__ import annotations

import binascii
import json
from typing import Any, NamedTuple

from data.formats import Format
from data.samples import BadSample


class Record(NamedTuple):
    """A caption and a picture as it is stored, with the part and line that they are from."""

    name: str
    caption: str
    picture: bytes


def of_line(name: str, line: bytes, form: Format) -> Record:
    """The record of a line whose columns are separated by tabs: a caption that is empty keeps its column. Raises
    BadSample.
    """
    columns = line.rstrip(b"\r\n").split(b"\t", max(form.caption, form.image) + 1)
    if len(columns) <= max(form.caption, form.image):
        raise BadSample(name, f"has {len(columns)} columns, where the picture is in column {form.image} from 0")
    caption = text_of(name, columns[form.caption])
    try:
        picture = binascii.a2b_base64(columns[form.image], strict_mode=True)
    except ValueError as error:
        raise BadSample(name, f"its column {form.image} is not base64: {error}") from None
    if not picture:
        raise BadSample(name, f"its column {form.image} is empty, where the picture should be")
    return Record(name, _chosen(name, caption, form.keys) if form.keys else caption, picture)


def of_tar(name: str, picture: bytes, text: bytes, is_json: bool) -> Record:
    """The record of two files of a shard."""
    caption = text_of(name, text)
    return Record(name, _chosen(name, caption, ("caption",)) if is_json else caption, picture)


def text_of(name: str, raw: bytes) -> str:
    """UTF-8, else GB18030. Raises BadSample."""
    for encoding in ("utf-8-sig", "gb18030"):
        try:
            return raw.decode(encoding)
        except UnicodeDecodeError:
            continue
    raise BadSample(name, "its caption is neither UTF-8 nor GB18030")


def _chosen(name: str, text: str, keys: tuple[str, ...]) -> str:
    """The first of the keys that has a text; empty where none has."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise BadSample(name, "its caption is not JSON") from None
    if not isinstance(found, dict):
        raise BadSample(name, "its caption is not a JSON object")
    texts = (_whole(found.get(key)) for key in keys)
    return next((text for text in texts if text), "")


def _whole(value: Any) -> str:
    """A text that UTF-8 can hold (JSON can spell half a surrogate pair); empty for anything else."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else ""

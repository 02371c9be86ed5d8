"""How a part of captioned pictures is laid out, as its list states it. Standard library alone: the slots check with it.

The original chose the columns by a substring of the file's path, so that a wrong folder name was an endless loop of
errors (LDM sheet §5.2, §12 row 2).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from core.errors import did_you_mean


class Format(NamedTuple):
    """Columns of a line, from 0. `keys`: the caption's column is JSON, and the first of these that it has is meant.

    A negative `image` says that the part is a tar shard (webdataset): files of one name are a record.
    """

    caption: int
    image: int
    keys: tuple[str, ...] = ()

    @property
    def tar(self) -> bool:
        return self.image < 0


FORMATS = {
    "laion400m": Format(caption=0, image=2),
    "laion_aes": Format(caption=2, image=5, keys=("caption_en", "blip_caption_en")),
    "webdataset": Format(caption=-1, image=-1),
}
MOST_COLUMNS = 1000
EXPECTED = f"expected {', '.join(FORMATS)}, or columns from 0: caption=0,image=2 (caption=2.key|other where it is JSON)"
COLUMNS = re.compile(r"caption=(\d{1,4})(?:\.([^,\s]+))?,image=(\d{1,4})", re.ASCII)


def parse_format(text: str) -> Format:
    """A format by name, or by its columns. Raises ValueError."""
    if text in FORMATS:
        return FORMATS[text]
    match = COLUMNS.fullmatch(text)
    if match is None:
        raise ValueError(f"no such format{did_you_mean(text, FORMATS)}; {EXPECTED}")
    caption, image = int(match[1]), int(match[3])
    if caption == image or max(caption, image) >= MOST_COLUMNS:
        raise ValueError(f"caption and image must be two columns below {MOST_COLUMNS}; {EXPECTED}")
    return Format(caption, image, tuple(match[2].split("|")) if match[2] else ())


def split_glob(path: Path) -> tuple[Path, str]:
    """The folder above a path's first wildcard and the pattern below it; the path itself and "" where it has none."""
    place = next((n for n, part in enumerate(path.parts) if any(sign in part for sign in "*?[")), None)
    if place is None or path.exists():
        return path, ""
    return Path(*path.parts[:place]), "/".join(path.parts[place:])

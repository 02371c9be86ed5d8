"""Real parts on disk, as small as parts can be: a line is a caption, an empty column and a picture in base64."""

import base64
import gzip
import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 16  # of the crops


def picture(seed: int = 0, size: tuple[int, int] = (24, 20), form: str = "JPEG", mode: str = "RGB") -> bytes:
    """A file of noise, `size` is width and height."""
    width, height = size
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(file, form)
    return file.getvalue()


def line(caption: str | bytes, content: bytes | None = None, columns: str = "c_i") -> bytes:
    """One record: `columns` says where the caption (c) and the image (i) stand."""
    raw = caption.encode() if isinstance(caption, str) else caption
    image = base64.b64encode(picture() if content is None else content)
    return b"\t".join({"c": raw, "i": image}.get(column, b"") for column in columns) + b"\n"


def write_part(path: Path, lines: Iterable[bytes]) -> Path:
    """Gzip where the name ends in .gz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = b"".join(lines)
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    return path


def write_parts(root: Path, counts: Iterable[int], ending: str = ".gz") -> Path:
    """part-00000.gz, …, of so many records each, captioned `<part>.<line from 1>`."""
    for number, count in enumerate(counts):
        lines = [line(f"{number}.{n}", picture(100 * number + n)) for n in range(1, count + 1)]
        write_part(root / f"part-{number:05}{ending}", lines)
    return root

"""Pictures from outside: bytes that may be anything, into RGB of a bounded size, resized and cropped."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError

from data.samples import BadSample

FORMATS = ("JPEG", "PNG", "PPM", "BMP")
"""Those that Pillow may take a file for, whatever it is called: for some others it starts programs."""
WEB_FORMATS = (*FORMATS, "WEBP", "GIF")
FRAME_PIXELS = 7680 * 4320
"""Pixels of a picture at most: 8K, 100 MB decoded."""

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # what is too large is refused below


def decoded(
    source: Path | IO[bytes], name: str, *, most: int = FRAME_PIXELS, least: int = 0, formats: tuple[str, ...] = FORMATS
) -> Image.Image:
    """The picture, in RGB. Raises BadSample `name`: a truncated one is a bad sample, not a grey half; so is one of more
    than `most` pixels, which its first bytes say: a file of a few kilobytes may hold gigabytes; so is one with a side
    below `least`.
    """
    try:
        with Image.open(source, formats=formats) as image:
            width, height = image.size
            if min(width, height) >= least and width * height <= most:
                return _loaded(image)
    except UnidentifiedImageError:
        raise BadSample(name, "not an image") from None
    except Exception as error:  # noqa: BLE001  Pillow's readers fail in as many ways as bytes can be wrong
        raise BadSample(name, getattr(error, "strerror", None) or str(error) or type(error).__name__) from None
    if min(width, height) < least:
        raise BadSample(name, f"is {width}x{height}: smaller than {least}x{least}")
    raise BadSample(name, f"is {width}x{height}: more than {most:,} pixels are not read")


def _loaded(image: Image.Image) -> Image.Image:
    if image.mode != "RGB":
        return image.convert("RGB")
    image.load()
    return image


def random_crop(image: Image.Image, short: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """(size, size, 3) uint8: the shorter side resized to `short` by Lanczos, then a crop anywhere (LDM sheet §5.3).

    Only the crop is computed, which halves the work. It is what a resize of the whole picture gives there, but for
    2 % of the values, which are off by one or two of 255 levels: Pillow rounds the box.
    """
    width, height = image.size
    wide, high = (short, short * height // width) if width <= height else (short * width // height, short)
    top, left = int(rng.integers(0, high - size + 1)), int(rng.integers(0, wide - size + 1))
    across, down = width / wide, height / high
    box = (left * across, top * down, min((left + size) * across, width), min((top + size) * down, height))
    return np.asarray(image.resize((size, size), Image.Resampling.LANCZOS, box=box))

"""Samples a second of the data path (read, transform, collate), against decoding the same frames alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.measure import Row, alternate
from core.loader import batches
from core.validate import fixed_keys
from data.slots import FrameFolders
from data.synthetic import sky_root

CLIPS = 64


def rows() -> list[Row]:
    """One process, no workers; 16 frames of 64 x 64."""
    dataset = FrameFolders(resolution=64).build()
    keys = fixed_keys(dataset, CLIPS)
    folders = sorted(p for p in Path(sky_root()).glob("train/*/*"))[:CLIPS]
    files = [sorted(folder.iterdir())[:16] for folder in folders]

    def ours() -> None:
        for _ in batches(dataset, [keys[i : i + 8] for i in range(0, CLIPS, 8)], workers=0, pin=False):
            continue

    def decode() -> None:
        for clip in files:
            for file in clip:
                np.asarray(Image.open(file).convert("RGB"))

    this, limit = alternate(ours, decode, 7)
    return [Row("data path, seconds a clip / decoding alone", this / CLIPS * 1e3, limit / CLIPS * 1e3, "ms", "<= 1.5")]

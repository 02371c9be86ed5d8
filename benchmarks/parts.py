"""Captioned pictures out of parts, against a bare loop over the same records: base64, decoding, a resize, and of gzip
the decompression.
"""

from __future__ import annotations

import base64
import gzip
import io
import multiprocessing
import os
import pickle
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.measure import Row, alternate
from core.loader import batches
from core.validate import fixed_keys
from data.base64_parts import PartRecords
from data.laion import Captioned, write_part
from data.slots import Base64Parts

RECORDS, PARTS, SIZE = 512, 2, 256
SHAPES = ((512, 384), (384, 512), (640, 427), (400, 400))  # width and height of the pictures
WORKERS = 2
ROUNDS = 3


def rows() -> list[Row]:
    """One process, then two workers against two bare processes; plain parts, then gzip."""
    torch.set_num_threads(1)  # as in a loader's worker, and as Pillow
    with tempfile.TemporaryDirectory() as folder:
        os.environ["REGISTRY_CACHE"] = f"{folder}/cache"
        found = []
        for ending in ("", ".gz"):
            root = _parts(Path(folder) / f"parts{ending}", ending)
            found += [_alone(root, ending), _with_workers(root, ending)]
        return found


def _alone(root: Path, ending: str) -> Row:
    files = sorted(root.iterdir())
    dataset = _dataset(root)
    keys = fixed_keys(dataset, RECORDS)
    parts = [keys[i : i + 8] for i in range(0, RECORDS, 8)]

    def ours() -> None:
        for _ in batches(_fresh(dataset), parts, workers=0, pin=False):
            continue

    this, limit = alternate(ours, lambda: _bare(files), ROUNDS)
    what = f"{'gzip' if ending else 'plain'} parts, a record / bare loop"
    return Row(what, this / RECORDS * 1e3, limit / RECORDS * 1e3, "ms", "<= 1.05")


def _with_workers(root: Path, ending: str) -> Row:
    """Ours is timed from where the prefetched batches are used up: the consumer is faster than the workers."""
    files, dataset = sorted(root.iterdir()), _dataset(root)
    keys = fixed_keys(dataset, RECORDS)
    parts = [keys[i : i + 8] for i in range(0, RECORDS, 8)]
    ahead = 8 * WORKERS
    share = RECORDS / (RECORDS - 8 * ahead)
    times: list[float] = []

    def ours() -> None:
        began = 0.0
        for number, _ in enumerate(batches(_fresh(dataset), parts, workers=WORKERS, pin=False), 1):
            began = time.perf_counter() if number == ahead else began
        times.append((time.perf_counter() - began) * share)

    context = multiprocessing.get_context("forkserver")
    with context.Pool(WORKERS) as pool:
        pool.map(_warm, range(WORKERS), chunksize=1)
        bare: Callable[[], object] = lambda: pool.map(_bare_file, files, chunksize=1)  # noqa: E731
        _, limit = alternate(ours, lambda: bare() and None, ROUNDS)
    this = float(np.median(times))
    what = f"{'gzip' if ending else 'plain'} parts, {WORKERS} workers / {WORKERS} bare loops"
    return Row(what, this / RECORDS * 1e3, limit / RECORDS * 1e3, "ms", "<= 1.05")


def _parts(root: Path, ending: str) -> Path:
    root.mkdir()
    for part in range(PARTS):
        records = (_record(number) for number in range(part, RECORDS, PARTS))
        write_part(root / f"part-{part:05}{ending}", records)
    return root


def _record(seed: int) -> Captioned:
    """Smooth colours with grain, some 50 KB as JPEG, as photographs have."""
    rng = np.random.default_rng(seed)
    size = SHAPES[seed % len(SHAPES)]
    coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    grain = rng.normal(0, 6, (size[1], size[0], 1))
    pixels = np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return Captioned(f"picture {seed}", file.getvalue())


def _dataset(root: Path) -> PartRecords:
    return Base64Parts(root=root, resolution=SIZE, split="all").build()


def _fresh(dataset: PartRecords) -> PartRecords:
    """With no file open and nothing decompressed yet."""
    shutil.rmtree(Path(os.environ["REGISTRY_CACHE"]) / "spool", ignore_errors=True)
    return pickle.loads(pickle.dumps(dataset))  # noqa: S301  our own bytes


def _bare(files: list[Path]) -> None:
    for file in files:
        _bare_file(file)


def _bare_file(path: Path) -> int:
    """What there is no way around; the shorter side to 284."""
    count = 0
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for line in file:
            content = base64.b64decode(line.split(b"\t")[2])
            image = Image.open(io.BytesIO(content)).convert("RGB")
            scale = int(SIZE / 0.9) / min(image.size)
            np.asarray(
                image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
            )
            count += 1
    return count


def _warm(number: int) -> int:
    time.sleep(0.2)  # so that every process of the pool takes one
    return number

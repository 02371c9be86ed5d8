"""Captioned pictures out of parts, against a bare loop over the same records on the same cores: base64, decoding, a
resize, and of gzip the decompression. And against one that, as the dataset does, resizes no more than the crop.
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
from collections.abc import Iterator
from itertools import chain
from multiprocessing.pool import Pool
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.measure import Row
from core.loader import batches
from core.positions import Key
from data.base64_parts import PartRecords
from data.laion import Captioned, write_part
from data.slots import Base64Parts

RECORDS, PARTS, BATCH = 192, 2, 8
SIZE, SHORT = 256, 284  # of the crop, and of the shorter side before it
SHAPES = ((512, 384), (384, 512), (640, 427), (400, 400))  # width and height of the pictures
WORKERS = 2
WARM = 32  # small records on which workers start, before the clock does
ROUNDS = 3
LIMITS = {"all": "<= 1.05", "crop": ""}  # what a bare loop resizes, and the goal

Seconds = tuple[float, dict[str, float]]  # ours, and each limit's


def rows() -> Iterator[Row]:
    """One process, then two workers against two bare processes; plain parts, then gzip."""
    torch.set_num_threads(1)  # as in a loader's worker, and as Pillow
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with tempfile.TemporaryDirectory() as folder, context.Pool(WORKERS) as pool:
        os.environ["REGISTRY_CACHE"] = f"{folder}/cache"
        for kind, root in _roots(Path(folder)).items():
            dataset, files = Base64Parts(root=root, resolution=SIZE, split="all").build(), sorted(root.glob("part-*"))
            yield from _of_rounds(f"{kind} parts, no worker", [_alone(dataset, files) for _ in range(ROUNDS)])
            together = [_with_workers(dataset, files, pool) for _ in range(ROUNDS)]
            yield from _of_rounds(f"{kind} parts, {WORKERS} workers", together)


def _of_rounds(what: str, rounds: list[Seconds]) -> Iterator[Row]:
    """The round of the median ratio: what is measured in one round shares the machine's mood."""
    for limit, goal in LIMITS.items():
        pairs = sorted(((ours, limits[limit]) for ours, limits in rounds), key=lambda pair: pair[0] / pair[1])
        this, least = (seconds / RECORDS * 1e3 for seconds in pairs[len(pairs) // 2])
        yield Row(f"{what} / bare, resizes {limit}", this, least, "ms", goal)


def _alone(dataset: PartRecords, files: list[Path]) -> Seconds:
    """All records in one process: batch by batch in turn, so that nothing else falls on one alone."""
    streams: list[Iterator[object]] = [batches(_fresh(dataset), _keys(dataset), workers=0, pin=False)]
    streams += [_bare_batches(files, limit) for limit in LIMITS]
    spent = [0.0] * len(streams)
    for _ in range(RECORDS // BATCH):
        for number, stream in enumerate(streams):
            began = time.perf_counter()
            next(stream)
            spent[number] += time.perf_counter() - began
    return spent[0], dict(zip(LIMITS, spent[1:], strict=True))


def _with_workers(dataset: PartRecords, files: list[Path], pool: Pool) -> Seconds:
    """Ours is timed from when the first batch is asked for by workers that are running."""
    began = [0.0]
    for _ in batches(_fresh(dataset), _warm_keys(dataset, began), workers=WORKERS, pin=False):
        continue
    ours, limits = time.perf_counter() - began[0], {}
    for limit in LIMITS:
        start = time.perf_counter()
        pool.starmap(_bare_file, [(file, limit) for file in files], chunksize=1)
        limits[limit] = time.perf_counter() - start
    return ours, limits


def _keys(dataset: PartRecords) -> Iterator[list[Key]]:
    """All records of the parts in the order of an epoch."""
    order = [index for index in dataset.order(0, 0)[:].tolist() if index < RECORDS]
    return ([Key(0, 0, index, 0) for index in order[n : n + BATCH]] for n in range(0, RECORDS, BATCH))


def _warm_keys(dataset: PartRecords, began: list[float]) -> Iterator[list[Key]]:
    """Small records, one at a time; then all others, from whose first on the clock runs."""
    yield from ([Key(0, 0, RECORDS + n, 0)] for n in range(WARM))
    began[0] = time.perf_counter()
    yield from _keys(dataset)


def _fresh(dataset: PartRecords) -> PartRecords:
    """With no file open and nothing decompressed yet."""
    shutil.rmtree(Path(os.environ["REGISTRY_CACHE"]) / "spool", ignore_errors=True)
    return pickle.loads(pickle.dumps(dataset))  # noqa: S301  our own bytes


# ---- parts ----------------------------------------------------------------------------------------------------------


def _roots(folder: Path) -> dict[str, Path]:
    """The same records in plain parts and in gzip, with a part of small ones behind them."""
    records = [_record(number) for number in range(RECORDS)]
    file = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE)).save(file, "JPEG")
    roots = {"plain": folder / "plain", "gzip": folder / "gzip"}
    for kind, root in roots.items():
        root.mkdir()
        for part in range(PARTS):
            name = f"part-{part:05}" + (".gz" if kind == "gzip" else "")
            write_part(root / name, records[part::PARTS])
        write_part(root / "small.tsv", [Captioned("small", file.getvalue())] * WARM)
    return roots


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


# ---- the bare loop --------------------------------------------------------------------------------------------------


def _bare_batches(files: list[Path], limit: str) -> Iterator[object]:
    loop = chain.from_iterable(_bare(file, limit) for file in files)
    return zip(*[loop] * BATCH, strict=True)


def _bare_file(path: Path, limit: str) -> int:
    return sum(1 for _ in _bare(path, limit))


def _bare(path: Path, limit: str) -> Iterator[np.ndarray]:
    """What there is no way around."""
    resized = {"all": _resized, "crop": _cropped}[limit]
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for line in file:
            content = base64.b64decode(line.split(b"\t")[2])
            yield np.asarray(resized(Image.open(io.BytesIO(content)).convert("RGB")))


def _resized(image: Image.Image) -> Image.Image:
    scale = SHORT / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS)


def _cropped(image: Image.Image) -> Image.Image:
    """The middle: where a crop lies does not change what it costs."""
    left, top = ((side - SIZE * min(image.size) / SHORT) / 2 for side in image.size)
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS, (left, top, image.width - left, image.height - top))

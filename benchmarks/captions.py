"""Captioned videos: a clip against decord alone, and ten million annotations against Python lists of them."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import Row, alternate
from core.hashing import hash_of
from data import video
from data.slots import CaptionedVideos

CLIPS, FRAMES, SIDE = 24, 16, 256
ANNOTATIONS, LISTED = 10_000_000, 1_000_000
WORDS = ("aerial", "shot", "of", "white", "clouds", "over", "a", "green", "valley", "at", "sunset", "slow", "motion")
WORKERS, READ = 2, 2_000  # processes that read rows, and how many each of them reads


def rows() -> list[Row]:
    """One process, no workers, for the clips; the annotations each in a process of their own."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["REGISTRY_CACHE"] = f"{folder}/cache"
        return [_clips(Path(folder)), *_annotations(Path(folder))]


# ---- clips ----------------------------------------------------------------------------------------------------------


def _clips(folder: Path) -> Row:
    """16 frames at 256 x 256 out of 596 x 336, the size of WebVid's videos."""
    import decord

    for number in range(CLIPS):
        _write_video(folder / "videos" / f"{number:03}.mp4", seed=number)
    dataset = CaptionedVideos(root=folder / "videos", num_frames=FRAMES, resolution=SIDE, held_out_share=0.0).build()
    width = round(596 * SIDE / 336)

    def ours() -> None:
        for index in range(CLIPS):
            dataset[0, 0, index, 0]

    chosen = {name: _chosen(folder / "videos" / name, name) for name in dataset.ids}

    def alone() -> None:
        for name, frames in chosen.items():
            path = str(folder / "videos" / name)
            decord.VideoReader(path, width=width, height=SIDE, num_threads=1).get_batch(frames).asnumpy()

    this, limit = alternate(ours, alone, 5)
    return Row("captioned video, a clip / decord alone", this / CLIPS * 1e3, limit / CLIPS * 1e3, "ms", "<= 1.5")


def _chosen(path: Path, name: str) -> np.ndarray:
    """The frames that the dataset reads of a video, so that both decode the same ones."""
    return video.choose(video.scan(path).times(), FRAMES, 1, None, np.random.default_rng(hash_of(0, 0, name)))


def _write_video(path: Path, seed: int, frames: int = 150) -> None:
    """Drifting noise, 596 x 336, with the key frames that x264 chooses."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    field = np.random.default_rng(seed).integers(0, 256, (336 + frames, 596 + frames, 3), dtype=np.uint8)
    field = field[::8, ::8].repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 596, 336, "yuv420p"
        for t in range(frames):
            picture = np.ascontiguousarray(field[t : t + 336, t : t + 596])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())


# ---- annotations ----------------------------------------------------------------------------------------------------


def _annotations(folder: Path) -> list[Row]:
    """Seconds and megabytes of the table, and of the lists (of a million rows, times ten)."""
    root = folder / "root"
    root.mkdir()
    write_table(folder / "all.csv", ANNOTATIONS)
    write_table(folder / "part.csv", LISTED)
    listed = _measured(_lists, folder / "part.csv", root)
    indexed = _measured(_index, folder / "all.csv", root)
    started = _measured(_start, folder / "all.csv", root)
    scale = ANNOTATIONS // LISTED
    seconds, megabytes = listed["seconds"] * scale, listed["private"] * scale
    return [
        Row("10 M captions, first index / lists", indexed["seconds"], seconds, "s", ""),
        Row("10 M captions, peak of the index / lists", indexed["peak"], megabytes, "MB", ""),
        Row("10 M captions, start once indexed / lists", started["seconds"], seconds, "s", "<= 0.2"),
        Row("10 M captions, peak of the start / lists", started["peak"], megabytes, "MB", "<= 0.1"),
        Row(
            f"… kept by 1 + {WORKERS} processes / lists", started["private"], megabytes * (1 + WORKERS), "MB", "<= 0.1"
        ),
    ]


def write_table(path: Path, count: int) -> None:
    """WebVid-like rows: a caption of about 60 characters, a path of 25."""
    rng = np.random.default_rng(0)
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("name", "contentUrl"))
        for first in range(0, count, 10_000):
            picks = rng.integers(0, len(WORDS), (10_000, 11))
            table.writerows(
                (" ".join(WORDS[i] for i in row), f"{n % 1000:06}_{n % 997:06}/{n}.mp4")
                for n, row in enumerate(picks.tolist(), first)
            )


def _measured(what: Callable[[Path, Path], dict[str, float]], table: Path, root: Path) -> dict[str, float]:
    """`what` in a process of its own."""
    words = [sys.executable, "-m", "benchmarks.captions", what.__name__, str(table), str(root)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _lists(table: Path, root: Path) -> dict[str, float]:
    """What a loader without Arrow keeps."""
    before, began = memory(), time.perf_counter()
    with table.open(newline="") as file:
        kept = [(row["contentUrl"], row["name"]) for row in csv.DictReader(file)]
    return {"seconds": time.perf_counter() - began, "private": memory()["private"] - before["private"], "n": len(kept)}


def _index(table: Path, root: Path) -> dict[str, float]:
    """The first time, csv and all."""
    from data.annotations import Source, index_of

    before, began = memory(), time.perf_counter()
    index = index_of(Source(table, "csv", "contentUrl", "name", root))
    seconds = time.perf_counter() - began
    first = root / index.row(0)[0]
    first.parent.mkdir(exist_ok=True)
    first.touch()  # one video that is there, so that the root is not a wrong one
    return {"seconds": seconds, "peak": memory()["peak"] - before["peak"]}


def _start(table: Path, root: Path) -> dict[str, float]:
    """Build, the orders of two epochs, and the rows that each of two workers reads."""
    import data.captioned  # noqa: F401 (torch and its like are not the table's cost)

    context = multiprocessing.get_context("forkserver")
    before, began = memory(), time.perf_counter()
    dataset = CaptionedVideos(root=root, annotations=table, held_out_share=0.0).build()
    orders = [dataset.order(0, 0)]
    seconds = time.perf_counter() - began
    orders.append(dataset.order(0, 1))
    after = memory()
    with context.Pool(WORKERS) as pool:
        parts = [(dataset, orders[0][n * READ : (n + 1) * READ]) for n in range(WORKERS)]
        workers = pool.map(_worker, parts, chunksize=1)
    return {
        "seconds": seconds,
        "peak": after["peak"] - before["peak"],
        "private": after["private"] - before["private"] + sum(w["private"] for w in workers),
        "mapped": after["mapped"] - before["mapped"],
    }


def _worker(part: tuple[Any, np.ndarray]) -> dict[str, float]:
    """What reading rows costs a worker."""
    dataset, places = part
    before = memory()
    for place in places.tolist():
        dataset.found.table.row(place)
    return {name: value - before[name] for name, value in memory().items()}


def memory() -> dict[str, float]:
    """Megabytes of this process: private to it, mapped from files (shared by all processes), and the peak of both."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    kept = {words[0]: float(words[1]) / 1024 for words in lines if words[0] in ("RssAnon:", "RssFile:", "VmHWM:")}
    return {"private": kept["RssAnon:"], "mapped": kept["RssFile:"], "peak": kept["VmHWM:"]}


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))))

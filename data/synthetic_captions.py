"""Captioned clips that anyone can make: one coloured cloud that drifts, in the layout of WebVid, for text-to-video
without downloads.

What a caption says can be measured in its clip: one of six colours, one of four directions, one of two speeds, as
`core.slots.metric` defines the words. A cloud is a soft disc with a ragged edge and shaded texture, moved exactly by
the shift theorem; it never leaves the picture.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

from core.hashing import hash_of
from core.slots.metric import COLOURS, DIRECTIONS, SPEEDS
from data.cache import cached
from data.synthetic import noise_spectrum, shift, smoothstep

VERSION = 2  # of the clips: raise it when they change, and the cache makes a new folder
DEFAULT = {"train_clips": 576, "test_clips": 96, "frames": 16, "size": 64, "seed": 0}
FPS = 8
CRF = "6"  # H.264 quality: 45 dB on these clips
X264 = {"crf": CRF, "threads": "1", "x264-params": "rc-lookahead=0"}
JITTER = np.deg2rad(8)  # a direction is kept to this
RADIUS = (0.15, 0.21)  # of a cloud, in sides of the picture
RAGGED = 0.22  # how far noise moves the edge, in radii a deviation
REACH = 1.35  # radii from the centre at which a cloud has ended
PHRASES = (
    "a {colour} cloud drifts {speed} {way}",
    "a {colour} cloud moving {speed} {way}",
    "{speed} a {colour} cloud goes {way}",
    "{colour} cloud, drifting {way} {speed}",
    "the {colour} cloud in the sky is moving {way}, {speed}",
)
WAYS = {"left": "to the left", "right": "to the right", "up": "up", "down": "down"}


class Told(NamedTuple):
    """What the caption of a clip says."""

    colour: str
    direction: str
    speed: str


COMBINATIONS = [Told(*words) for words in product(COLOURS, DIRECTIONS, SPEEDS)]


def told(index: int) -> Told:
    """The words of clip `index`: all 48 combinations in turn."""
    return COMBINATIONS[index % len(COMBINATIONS)]


def caption(seed: int, words: Told) -> str:
    """One of several ways to say the words."""
    phrase = PHRASES[seed % len(PHRASES)]
    return phrase.format(colour=words.colour, speed=words.speed, way=WAYS[words.direction])


def render(seed: int, words: Told, frames: int, size: int) -> np.ndarray:
    """One clip, uint8 (T, size, size, 3): a pure function of its arguments."""
    rng = np.random.default_rng(seed)
    velocity = _velocity(rng, words) * size  # rows and columns a frame
    radius = rng.uniform(*RADIUS) * size
    start = _start(rng, velocity * (frames - 1), REACH * radius, size)
    thickness, shade = _cloud(rng, radius, size)
    colour = np.array(COLOURS[words.colour], np.float64) * rng.uniform(0.92, 1.04)
    places = [start + t * velocity for t in range(frames)]
    alpha = np.stack([_moved(thickness, place, size) for place in places])[..., None]  # (T, H, W, 1)
    lit = np.stack([_moved(thickness * shade, place, size) for place in places])[..., None]
    return np.rint(np.clip(backdrop(rng, size) * (1 - alpha) + colour * lit, 0, 255)).astype(np.uint8)


def _velocity(rng: np.random.Generator, words: Told) -> np.ndarray:
    """(2,) rows and columns a frame, in sides of the picture."""
    row, column = DIRECTIONS[words.direction]
    angle = np.arctan2(row, column) + rng.uniform(-JITTER, JITTER)
    return rng.uniform(*SPEEDS[words.speed]) * np.array([np.sin(angle), np.cos(angle)])


def _start(rng: np.random.Generator, way: np.ndarray, reach: float, size: int) -> np.ndarray:
    """(2,) row and column of the centre in the first frame, so that the cloud is whole in every frame."""
    low, high = reach - np.minimum(way, 0), size - reach - np.maximum(way, 0)
    middle = (low + high) / 2
    return rng.uniform(np.minimum(low, middle), np.maximum(high, middle))


def _cloud(rng: np.random.Generator, radius: float, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Thickness and shade in [0, 1], (size, size), with the cloud's centre at row and column 0 of a torus."""
    ragged, texture = (np.fft.irfft2(noise_spectrum(rng, 64), s=(64, 64)) for _ in range(2))
    at = (np.arange(size) * 64) // size  # noise is drawn at 64 x 64 whatever the size
    from_centre = np.minimum(np.arange(size), size - np.arange(size))
    distance = np.hypot(from_centre[:, None], from_centre[None, :]) / radius
    thickness = smoothstep((1.0 - distance + RAGGED * np.clip(ragged[at][:, at], -2, 2)) / 0.55 + 0.5)
    return thickness * smoothstep((REACH - distance) / 0.3), 1 - 0.3 * smoothstep(0.5 + texture[at][:, at])


def _moved(field: np.ndarray, place: np.ndarray, size: int) -> np.ndarray:
    """A periodic field moved by `place` (2,), exactly."""
    return np.clip(shift(np.fft.rfft2(field), (place[0], place[1]), 1)[:size, :size], 0, 1)


def backdrop(rng: np.random.Generator, size: int) -> np.ndarray:
    """(size, 1, 3): a dark, colourless gradient."""
    top, bottom = rng.uniform(26, 62, size=2)
    grey = np.linspace(top, bottom, size)[:, None, None]
    return grey * np.array([0.94, 0.98, 1.08])


def write_clouds(
    root: Path,
    *,
    train_clips: int = DEFAULT["train_clips"],
    test_clips: int = DEFAULT["test_clips"],
    frames: int = DEFAULT["frames"],
    size: int = DEFAULT["size"],
    seed: int = DEFAULT["seed"],
) -> None:
    """Write `<root>/{train,test}.csv` (`name,contentUrl`) and `<root>/{train,test}/cloud<i>.mp4`, the same for the same
    arguments and libraries.

    Args:
        root: folder to fill; made if missing.
        train_clips: clips of the train split.
        test_clips: clips of the test split.
        frames: frames of each clip.
        size: height and width in pixels; even.
        seed: another seed, other clouds.
    """
    for split, clips in (("train", train_clips), ("test", test_clips)):
        (root / split).mkdir(parents=True, exist_ok=True)
        with (root / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(("name", "contentUrl"))
            table.writerows(_clips(root, split, clips, frames, size, seed))


def _clips(root: Path, split: str, clips: int, frames: int, size: int, seed: int) -> Iterator[tuple[str, str]]:
    """Write the clips of a split; their captions and paths."""
    for index in range(clips):
        drawn, path = hash_of("cloud", seed, split, index), f"{split}/cloud{index:05}.mp4"
        _write_mp4(root / path, render(drawn, told(index), frames, size))
        yield caption(drawn, told(index)), path


def _write_mp4(path: Path, frames: np.ndarray) -> None:
    """(T, H, W, 3) uint8, H.264. One thread and no look-ahead, whose fast paths read memory that nobody wrote: without
    it 61 of 150 files came out different.
    """
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(FPS), options=X264)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def clouds_root() -> Path:
    """The default clips' folder in the cache, written on first use (a few seconds)."""
    return cached("clouds", VERSION, DEFAULT, lambda folder: write_clouds(folder, **DEFAULT))


if __name__ == "__main__":
    import tyro

    tyro.cli(write_clouds)

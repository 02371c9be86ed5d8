"""Captioned pictures that anyone can make: one coloured shape on a dark ground, for text-to-image without downloads.

What a caption says can be measured in its picture: one of six colours, four shapes and five places, as
`core.slots.metric` defines the words. Colours and ground are those of the captioned clouds, so that an autoencoder of
clouds serves here too.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import numpy as np

from core.hashing import hash_of
from core.slots.metric import COLOURS, PLACES, SHAPES, Outline
from data.synthetic import noise_spectrum, smoothstep
from data.synthetic_captions import backdrop

VERSION = 1  # of the pictures: raise it when they change
DEFAULT = {"train_pictures": 2400, "test_pictures": 240, "size": 64, "seed": 0}
SIZE = (0.18, 0.205)  # of a shape, in sides of the picture
ASIDE = 0.02  # how far a shape is from the middle of its place, at most
SOFT = 0.022  # half the width of an edge, in sides of the picture
PHRASES = (
    "a {colour} {shape} in the {place}",
    "there is a {colour} {shape} in the {place}",
    "{colour} {shape}, {place}",
    "in the {place} a {colour} {shape}",
    "a picture of a {shape} in the {place}, {colour}",
)


class Told(NamedTuple):
    """What the caption of a picture says."""

    colour: str
    shape: str
    place: str


COMBINATIONS = sorted((Told(*words) for words in product(COLOURS, SHAPES, PLACES)), key=lambda words: hash_of(*words))
"""All 120, mixed, so that the first few have some of everything."""


def told(index: int) -> Told:
    """The words of picture `index`: all combinations in turn."""
    return COMBINATIONS[index % len(COMBINATIONS)]


def caption(seed: int, words: Told) -> str:
    """One of several ways to say the words."""
    return PHRASES[seed % len(PHRASES)].format(**words._asdict())


def render(seed: int, words: Told, size: int) -> np.ndarray:
    """One picture, uint8 (size, size, 3): a pure function of its arguments."""
    rng = np.random.default_rng(seed)
    centre = np.array(PLACES[words.place]) + rng.uniform(-ASIDE, ASIDE, size=2)
    alpha = _covered(SHAPES[words.shape], centre, rng.uniform(*SIZE), size)[..., None]  # (size, size, 1)
    colour = np.array(COLOURS[words.colour], np.float64) * rng.uniform(0.92, 1.04) * _shade(rng, size)
    return np.rint(np.clip(backdrop(rng, size) * (1 - alpha) + colour * alpha, 0, 255)).astype(np.uint8)


def _covered(outline: Outline, centre: np.ndarray, reach: float, size: int) -> np.ndarray:
    """How much of each pixel the shape covers, (size, size) in [0, 1], with a soft edge."""
    at = (np.arange(size) + 0.5) / size
    gauge = outline.gauge((at[:, None] - centre[0]) / reach, (at[None, :] - centre[1]) / reach)
    edge = SOFT / (reach * outline.reach)
    return smoothstep((1 - gauge) / (2 * edge) + 0.5)


def _shade(rng: np.random.Generator, size: int) -> np.ndarray:
    """(size, size, 1) soft texture: up to an eighth darker."""
    texture = np.fft.irfft2(noise_spectrum(rng, 64), s=(64, 64))
    at = (np.arange(size) * 64) // size  # noise is drawn at 64 x 64 whatever the size
    return (1 - 0.12 * smoothstep(0.5 + texture[at][:, at]))[..., None]


def pictures(
    split: str, count: int, size: int = DEFAULT["size"], seed: int = DEFAULT["seed"]
) -> Iterator[tuple[str, np.ndarray]]:
    """Captions and pictures, uint8 (size, size, 3), of a split: the same for the same arguments, others for another
    split or seed.
    """
    for index in range(count):
        drawn = hash_of("picture", seed, split, index)
        yield caption(drawn, told(index)), render(drawn, told(index), size)

"""Metric slots: what generated clips are scored by at the end of a run, besides the Fréchet distance."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from core.slots.slot import Slot

if TYPE_CHECKING:
    from torch import Tensor

    Score = Callable[[Tensor, Sequence[str], Tensor, Sequence[str]], dict[str, float]]
    """`score(generated, captions, real, real_captions)`: clips (N, 3, T, H, W) in [-1, 1] generated from N captions,
    and real clips with theirs; gives numbers by name.
    """

COLOURS = {
    "red": (214, 44, 40),
    "yellow": (232, 208, 48),
    "green": (48, 172, 68),
    "blue": (44, 92, 226),
    "purple": (164, 60, 204),
    "white": (236, 236, 240),
}
"""RGB that a colour word of a caption means."""
DIRECTIONS = {"left": (0.0, -1.0), "right": (0.0, 1.0), "up": (-1.0, 0.0), "down": (1.0, 0.0)}
"""Rows and columns of a unit step in the direction of a word."""
SPEEDS = {"slowly": (0.028, 0.034), "quickly": (0.052, 0.058)}
"""Speeds from and to, in sides of the picture a frame, that a word means."""
PLACES = {
    "upper left": (0.3, 0.3),
    "upper right": (0.3, 0.7),
    "middle": (0.5, 0.5),
    "lower left": (0.7, 0.3),
    "lower right": (0.7, 0.7),
}
"""Row and column, in sides of the picture, of the centre that a place in words means."""


class Outline(NamedTuple):
    """A regular polygon around the origin that stands on a side, drawn out in breadth."""

    sides: int
    reach: float
    """Distance of the lowest side from the centre."""
    breadth: float = 1.0

    def gauge(self, down: Any, right: Any) -> Any:
        """Distance of points from the centre in units of the reach, measured across the nearest side: below 1 inside.
        Arrays of numpy and tensors alike.
        """
        turns = (math.tau * k / self.sides for k in range(self.sides))
        across = ((down * math.cos(turn) + right * (math.sin(turn) / self.breadth)) / self.reach for turn in turns)
        return functools.reduce(lambda a, b: (a + b + abs(a - b)) / 2, across)  # the largest


SHAPES = {
    "disc": Outline(24, 1.0),
    "square": Outline(4, 0.9),
    "triangle": Outline(3, 0.62),
    "bar": Outline(4, 0.62, breadth=2.0),
}
"""What a word for a shape looks like, in units of a thing's size."""


class Metric(Slot):
    """A score of generated clips, given the captions that they were asked for."""

    def build(self) -> Score:
        """The function that scores."""
        raise NotImplementedError


class ColourAndMotion(Metric):
    """Whether the colour, the direction and the speed that a caption names are seen in the clip, or the colour, the
    shape and the place in a picture (core/attributes.py).

    For captions of one coloured thing before a dull background, as the synthetic ones of data/synthetic_captions.py and
    data/synthetic_pictures.py.
    """

    def build(self) -> Score:
        from core.attributes import report

        return report

"""Metric slots: what generated clips are scored by at the end of a run, besides the Fréchet distance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

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


class Metric(Slot):
    """A score of generated clips, given the captions that they were asked for."""

    def build(self) -> Score:
        """The function that scores."""
        raise NotImplementedError


class ColourAndMotion(Metric):
    """Whether the colour, the direction and the speed that a caption names are seen in the clip (core/attributes.py).

    For captions of one coloured thing before a dull background, as the synthetic ones of data/synthetic_captions.py.
    """

    def build(self) -> Score:
        from core.attributes import report

        return report

"""Reads what a caption says of the one thing in a clip or picture, and holds it against the caption: colour, direction
and speed of what moves, colour, shape and place in a picture (a clip of one frame).

Whether a model listens to its text cannot be seen in a loss. Where captions name what pixels can tell, the share of
clips that match says it; beside it stands what real clips score (the reader's own errors) and what clips score that did
not listen. Words and their meaning: `core/slots/metric.py`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from core.slots.metric import COLOURS, DIRECTIONS, PLACES, SHAPES, SPEEDS, Outline

WORDS: dict[str, Mapping[str, tuple[float, ...]]] = {"colour": COLOURS, "direction": DIRECTIONS, "speed": SPEEDS}
"""What is read from clips."""
WORDS_OF_PICTURES: dict[str, Mapping[str, tuple[float, ...]]] = {"colour": COLOURS, "shape": SHAPES, "place": PLACES}
STANDS_OUT = 0.2
"""Distance from the backdrop's colour (in RGB of [0, 1]) from which a pixel belongs to the thing."""
LEAST_SHARE = 0.002
"""Of the pixels; a thing smaller than this is not there. A cloud of the synthetic set covers 5 to 10 %."""
BLUR = 0.12
"""Softness of the shapes that a picture is held against, in units of their reach."""
FINE = 64
"""Cells along a side in which a shape is looked at."""
UNREAD = -1


def read(video: Tensor) -> dict[str, Tensor]:
    """Clips (N, 3, T, H, W) in [-1, 1] -> per attribute (N,) int64: index of the word seen, or UNREAD. Of pictures,
    T = 1, other attributes are read than of what moves.
    """
    pixels = (video.float() + 1) / 2
    backdrop = pixels.flatten(3).median(-1).values[..., None, None]  # (N, 3, T, 1, 1)
    away = pixels - backdrop
    mass = (away.norm(dim=1) - STANDS_OUT).clamp(min=0)  # (N, T, H, W)
    there = (mass > 0).float().mean((2, 3)) >= LEAST_SHARE  # (N, T)
    colour = _colour(away, mass, backdrop)
    if video.shape[2] == 1:
        centre = _centre(mass)[:, 0]  # (N, 2)
        seen = {"colour": colour, "shape": _shape(mass[:, 0]), "place": _place(centre)}
        return {name: torch.where(there[:, 0], index, UNREAD) for name, index in seen.items()}
    velocity = _velocity(mass, there)
    seen = {"colour": colour, "direction": _direction(velocity), "speed": _speed(velocity)}
    readable = {"colour": there.any(1), "direction": there.sum(1) > 1, "speed": there.sum(1) > 1}
    return {name: torch.where(readable[name], index, UNREAD) for name, index in seen.items()}


def _colour(away: Tensor, mass: Tensor, backdrop: Tensor) -> Tensor:
    """The colour word nearest in direction, seen from the backdrop: how bright the thing is does not count."""
    mean = (away * mass[:, None]).sum((2, 3, 4))  # (N, 3)
    words = torch.tensor(list(COLOURS.values()), device=mean.device) / 255 - backdrop.mean((2, 3, 4))[:, None]
    return torch.cosine_similarity(mean[:, None], words, dim=-1).argmax(1)


def _centre(mass: Tensor) -> Tensor:
    """Centre of mass of each frame, (N, T, 2): row and column in sides of the picture."""
    rows, columns = (torch.linspace(0, 1, side, device=mass.device) for side in mass.shape[2:])
    total = mass.sum((2, 3)).clamp(min=1e-6)
    return torch.stack([(mass.sum(3) * rows).sum(2) / total, (mass.sum(2) * columns).sum(2) / total], -1)


def _velocity(mass: Tensor, there: Tensor) -> Tensor:
    """Slope of the centre of mass over time by least squares, (N, 2) in sides of the picture a frame, downwards and to
    the right. Frames without the thing do not count.
    """
    centre = _centre(mass)  # (N, T, 2)
    weight = there.float()[..., None] / there.sum(1).clamp(min=1)[:, None, None]  # (N, T, 1)
    time = torch.arange(mass.shape[1], device=mass.device, dtype=mass.dtype)[None, :, None]
    time = time - (weight * time).sum(1, keepdim=True)
    return (weight * time * centre).sum(1) / (weight * time.square()).sum(1).clamp(min=1e-6)


def _direction(velocity: Tensor) -> Tensor:
    return (velocity @ torch.tensor(list(DIRECTIONS.values()), device=velocity.device).T).argmax(1)


def _speed(velocity: Tensor) -> Tensor:
    """Nearest on a logarithmic scale: the bound between two words is the geometric mean of where they end and begin."""
    (_, slow), (quick, _) = SPEEDS["slowly"], SPEEDS["quickly"]
    return (velocity.norm(dim=1) > (slow * quick) ** 0.5).long()


def _place(centre: Tensor) -> Tensor:
    """The nearest place."""
    return torch.cdist(centre, torch.tensor(list(PLACES.values()), device=centre.device)).argmin(1)


def _shape(mass: Tensor) -> Tensor:
    """The shape that correlates best with the mass (N, H, W), laid over its centre with the same root-mean-square
    reach: so neither size nor softness counts.
    """
    fine = min(FINE, *mass.shape[1:])
    mass = functional.adaptive_avg_pool2d(mass[:, None], fine)  # (N, 1, fine, fine)
    row, column = _centre(mass)[:, 0].T[..., None, None, None]
    at = torch.linspace(0, 1, fine, device=mass.device)
    down, right = at[:, None] - row, at - column  # (N, 1, fine, 1), (N, 1, 1, fine)
    total = mass.sum((2, 3), keepdim=True).clamp(min=1e-6)
    reach = ((mass * (down**2 + right**2)).sum((2, 3), keepdim=True) / total).sqrt().clamp(min=1e-3)
    fits = [_agreement(mass, _softly(outline, down / reach, right / reach)) for outline in SHAPES.values()]
    return torch.stack(fits, 1).argmax(1)


def _agreement(a: Tensor, b: Tensor) -> Tensor:
    return torch.cosine_similarity(a.flatten(1), b.flatten(1))


def _softly(outline: Outline, down: Tensor, right: Tensor) -> Tensor:
    """A blurred picture of a shape whose root-mean-square reach is 1."""
    unit = _reach_of(outline)
    return torch.sigmoid((1 - outline.gauge(down * unit, right * unit)) / BLUR)


@functools.cache
def _reach_of(outline: Outline) -> float:
    """Root-mean-square distance of a shape's points from its centre."""
    at = torch.linspace(-2, 2, 401)
    down, right = at[:, None], at[None, :]
    inside = (outline.gauge(down, right) < 1).float()
    return ((inside * (down**2 + right**2)).sum() / inside.sum()).sqrt().item()


def words_of(captions: Sequence[str], attribute: str) -> Tensor:
    """(N,) int64: index of the one word of the attribute in each caption, UNREAD where there is none or several."""
    known = list((WORDS | WORDS_OF_PICTURES)[attribute])
    whole = re.compile(rf"(?<![a-z])(?:{'|'.join(known)})(?![a-z])")
    found = [whole.findall(caption.lower()) for caption in captions]
    return torch.tensor([known.index(words[0]) if len(set(words)) == 1 else UNREAD for words in found])


def scores(video: Tensor, captions: Sequence[str]) -> dict[str, float]:
    """`<attribute>_score`: the share of clips in which the caption's word is seen, over captions that have one. An
    attribute that no caption names is left out.
    """
    seen = read(video)
    found: dict[str, float] = {}
    for attribute in seen:
        told = words_of(captions, attribute)
        named = told != UNREAD
        if named.any():
            found[f"{attribute}_score"] = (seen[attribute].cpu() == told)[named].float().mean().item()
    return found


def report(generated: Tensor, captions: Sequence[str], real: Tensor, real_captions: Sequence[str]) -> dict[str, float]:
    """The scores of clips generated from `captions`, beside those of real clips (the reader's own errors), of the
    generated ones with each other's captions, and of one mean clip for all captions.
    """
    shuffled = [captions[i] for i in torch.randperm(len(captions), generator=torch.Generator().manual_seed(0))]
    mean = real.mean(0, keepdim=True).expand_as(real)
    beside = {"real": (real, real_captions), "shuffled": (generated, shuffled), "mean_clip": (mean, real_captions)}
    return scores(generated, captions) | {
        f"{name}_{which}": value for which, pair in beside.items() for name, value in scores(*pair).items()
    }

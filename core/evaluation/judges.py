"""What a set of clips is measured by: features that stand for it, and the score of its captions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from core.errors import UserError
from core.metrics import clip_features

Batch = tuple[Tensor, Sequence[str]]
"""Clips (N, 3, T, H, W) in [-1, 1] and their captions."""


@dataclass(frozen=True)
class Features:
    """A feature set: its two distances by their usual names, and how clips become (N, D)."""

    distance: str
    kernel: str
    standardised: bool
    """Whether distances are taken in units of the real set's deviations."""
    of: Callable[[Tensor], np.ndarray]


def features(inception: Path | None, i3d: Path | None, frames: int, device: torch.device) -> Features:
    """FID's where an Inception is given, FVD's where an I3D is, else hand-made ones that need no weights."""
    if inception is not None:
        if frames != 1:
            raise UserError(f"--inception measures pictures; clips of {frames} frames are measured by --i3d")
        from core.evaluation.inception import Inception

        net = Inception(inception).to(device)
        return Features("fid", "kid", False, lambda clips: _array(net(clips[:, :, 0])))
    if i3d is not None:
        if frames < MOVING:
            raise UserError(f"--i3d measures clips of {MOVING} frames and more; these have {frames}")
        from core.evaluation.i3d import I3D

        moving = I3D(i3d).to(device)
        return Features("fvd", "kvd", False, lambda clips: _array(moving(clips)))
    return Features("frechet", "kernel", True, clip_features)


MOVING = 9
"""Frames of the shortest clip that I3D takes: its last average pool spans two of the frames left of every eight."""


def _array(values: Tensor) -> np.ndarray:
    return values.double().cpu().numpy()


@dataclass
class Measured:
    """What is known of a set, or of a rank's share of it."""

    features: np.ndarray
    clip: np.ndarray
    """CLIP score of each item; empty without CLIP."""
    total: np.ndarray | None
    """Sum of all items in levels of 255, (3, T, H, W)."""
    captions: list[str]
    """Of each item."""

    @staticmethod
    def joined(parts: Sequence[Measured]) -> Measured:
        """Shares together."""
        filled = [part for part in parts if len(part.features)]
        if not filled:
            return parts[0]
        totals = [part.total for part in filled if part.total is not None]
        return Measured(
            np.concatenate([part.features for part in filled]),
            np.concatenate([part.clip for part in filled]),
            np.sum(totals, axis=0) if totals else None,
            [text for part in filled for text in part.captions],
        )

    @property
    def count(self) -> int:
        return len(self.features)


Score = Callable[[Tensor, Sequence[str]], Tensor]


@torch.no_grad()
def measure(batches: Iterable[Batch], by: Features | None, score: Score | None, device: torch.device) -> Measured:
    """Measure a set, batch by batch, by features or score or both."""
    found: list[np.ndarray] = []
    scores: list[np.ndarray] = []
    total: np.ndarray | None = None
    texts: list[str] = []
    for clips, captions in batches:
        texts += captions
        here = clips.to(device)
        if by is not None:
            found.append(by.of(here))
        if score is not None:
            scores.append(_array(score(here, captions)))
        added = ((clips.double() + 1) * 127.5).sum(0).numpy()
        total = added if total is None else total + added
    return Measured(
        np.concatenate(found) if found else np.empty((0, 0)),
        np.concatenate(scores) if scores else np.empty(0),
        total,
        texts,
    )


def as_clips(frames: Sequence[np.ndarray]) -> Tensor:
    """(T, H, W, 3) uint8 each -> (N, 3, T, H, W) in [-1, 1]."""
    return rearrange(torch.from_numpy(np.stack(frames)), "n t h w c -> n c t h w").float() / 127.5 - 1

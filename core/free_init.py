"""FreeInit (arXiv 2312.07537): noise to begin again with, from what was sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from core.slots import FreeInit

AXES = (-3, -2, -1)
"""Frames, height, width."""


def low_pass(slot: FreeInit, shape: Sequence[int]) -> Tensor:
    """The filter over shifted frequencies (T, H, W), 1 where they are kept."""
    ratio = slot.spatial_stop_frequency / slot.temporal_stop_frequency
    t, h, w = ((torch.arange(n) - n // 2) * (2.0 / n) for n in shape)
    square = (ratio * t[:, None, None]) ** 2 + h[:, None] ** 2 + w**2
    stop = slot.spatial_stop_frequency
    if slot.method == "butterworth":
        return 1 / (1 + (square / stop**2) ** slot.order)
    return (-square / (2 * stop**2)).exp() if slot.method == "gaussian" else (square <= 2 * stop).float()


def mixed(noised: Tensor, fresh: Tensor, keep: Tensor) -> Tensor:
    """The frequencies of `noised` (B, C, T, H, W) that the filter keeps, with the others of `fresh`."""
    low, high = (torch.fft.fftshift(torch.fft.fftn(x, dim=AXES), dim=AXES) for x in (noised, fresh))
    keep = keep.to(low.device)
    return torch.fft.ifftn(torch.fft.ifftshift(low * keep + high * (1 - keep), dim=AXES), dim=AXES).real


def rounds(
    slot: FreeInit,
    noise: Tensor,
    fresh: Callable[[int], Tensor],
    sample: Callable[[int, Tensor], Tensor],
    add_noise: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """`sample(i, noise)` in rounds, from `noise` (B, C, T, H, W). `add_noise(x0, noise)` noises a sample to the last
    timestep, `fresh(i)` draws for round i. Returns what the last round gave.
    """
    keep = low_pass(slot, noise.shape[2:])
    x = sample(0, noise)
    for i in range(1, slot.num_iters):
        x = sample(i, mixed(add_noise(x.float(), noise), fresh(i), keep))
    return x

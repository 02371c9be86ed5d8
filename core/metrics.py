"""How far generated clips are from real ones, measured so that it cannot be fooled by clips without motion or detail.

A Fréchet distance alone is easy to please on smooth video: so it is always reported beside what trivial clips score.
The features are hand-made (no pretrained network, nothing to download): comparable between runs of this project on the
same real clips, and not with published FVD, which needs I3D features; `frechet_distance` and `kernel_distance` take
those as well. Formulas: LVDM sheet §13.
"""

import numpy as np
import torch
from torch.nn import functional

from core.errors import UserError

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
LAG = 4
ROWS = 1024
"""Rows of a kernel matrix that are in memory at a time."""
LEAST_DEVIATION = 1e-3  # of a feature over real clips, an eighth of a grey level


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of tensors in [-1, 1] (peak 2); infinite when they are equal."""
    error = (a.double() - b.double()).square().mean()
    return float(10 * torch.log10(4 / error))


# ---- distances of two sets of features ------------------------------------------------------------------------------


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|m1 - m2|² + Tr(S1 + S2 - 2 (S1^½ S2 S1^½)^½) of (N, D) and (M, D) features, with unbiased covariances."""
    _at_least_two(a, b)
    return frechet_of_factors(*factored(a), *factored(b))


def frechet_of_factors(m1: np.ndarray, f1: np.ndarray, m2: np.ndarray, f2: np.ndarray) -> float:
    """The same from means and factors, S = FᵀF. The last trace is the sum of the singular values of F1 F2ᵀ, whose
    squares are the eigenvalues of S1 S2: symmetric, and exact for covariances without full rank.
    """
    overlap = np.linalg.svd(f1 @ f2.T, compute_uv=False).sum()
    return float(np.square(m1 - m2).sum() + np.square(f1).sum() + np.square(f2).sum() - 2 * overlap)


def factored(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and a factor of the covariance of (N, D) features: the centred features themselves, (N, D), while they
    are few (with 2 rows of Inception's 2,048 numbers that is 0.1 ms instead of 20 s), else its root, (D, D).
    """
    x = features.astype(np.float64)
    if len(x) <= x.shape[1]:
        return x.mean(0), (x - x.mean(0)) / np.sqrt(len(x) - 1)
    return factored_moments(*moments(x))


def factored_moments(mean: np.ndarray, covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same from a mean and a covariance."""
    return mean, _root(covariance)


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and unbiased covariance (D, D) of (N, D) features, float64."""
    x = features.astype(np.float64)
    return x.mean(0), np.atleast_2d(np.cov(x, rowvar=False))


def frechet_of_moments(m1: np.ndarray, s1: np.ndarray, m2: np.ndarray, s2: np.ndarray) -> float:
    """The same from means and covariances."""
    return frechet_of_factors(*factored_moments(m1, s1), *factored_moments(m2, s2))


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased squared MMD with the kernel (x·y / D + 1)³: KVD, and KID over all pairs. It can be below zero."""
    _at_least_two(a, b)
    n, m = len(a), len(b)
    own = [(_kernel_sum(x, x) - _kernel_of_itself(x)) / (len(x) * (len(x) - 1)) for x in (a, b)]
    return float(sum(own) - 2 * _kernel_sum(a, b) / (n * m))


def _root(covariance: np.ndarray) -> np.ndarray:
    """The symmetric square root of a positive semi-definite matrix."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


def _kernel_sum(x: np.ndarray, y: np.ndarray) -> float:
    """Over all pairs, some rows at a time: 30,000 by 30,000 would take 7 GB."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    return float(sum(((x[i : i + ROWS] @ y.T / x.shape[1] + 1) ** 3).sum() for i in range(0, len(x), ROWS)))


def _kernel_of_itself(x: np.ndarray) -> float:
    return float(((np.square(x.astype(np.float64)).sum(1) / x.shape[1] + 1) ** 3).sum())


def _at_least_two(a: np.ndarray, b: np.ndarray) -> None:
    if min(len(a), len(b)) < 2 or a.shape[1:] != b.shape[1:]:
        raise UserError(f"a distance needs two sets of two or more equal rows; got shapes {a.shape} and {b.shape}.")


# ---- features -------------------------------------------------------------------------------------------------------


def clip_features(video: torch.Tensor) -> np.ndarray:
    """(N, 3, T, H, W) in [-1, 1] -> (N, 32) float64: pooled pixels 24, frame differences 8.

    Pooled pixels are means over time: brightness in 4 x 4 cells, two colour differences in 2 x 2. Frame differences are
    mean absolute changes of brightness (pooled to 16 x 16 first, so that they tell motion from grain) over 1 and over
    LAG frames, in 2 x 2 cells: stillness, wrong speed and a wrong order of frames all show in them.
    """
    return torch.cat([_one_batch(part.float()) for part in video.split(16)]).double().cpu().numpy()


def _one_batch(video: torch.Tensor) -> torch.Tensor:
    if video.shape[2] == 1:  # a picture is a clip that stands still
        video = video.expand(-1, -1, 2, -1, -1)
    luma = torch.einsum("ncthw,c->nthw", video, video.new_tensor(LUMA))[:, None]  # (N, 1, T, H, W)
    colour = torch.cat([video[:, :1] - luma, video[:, 2:] - luma], 1)  # (N, 2, T, H, W)
    coarse = functional.adaptive_avg_pool3d(luma, (video.shape[2], 16, 16))
    moved = [_cells(_lagged(coarse, lag).abs(), 2) for lag in (1, LAG)]
    return torch.cat([_cells(luma, 4), _cells(colour, 2), *moved], 1)


def _cells(x: torch.Tensor, side: int) -> torch.Tensor:
    """(N, C, T, H, W) -> (N, C side side): means over time in side x side cells."""
    return functional.adaptive_avg_pool3d(x, (1, side, side)).flatten(1)


def _lagged(x: torch.Tensor, lag: int) -> torch.Tensor:
    """Differences over `lag` frames (dim 2), or over as many as there are."""
    lag = min(lag, x.shape[2] - 1)
    return x[:, :, lag:] - x[:, :, : x.shape[2] - lag]


# ---- the report -----------------------------------------------------------------------------------------------------


def frechet_report(generated: torch.Tensor, real: torch.Tensor, second_real: torch.Tensor) -> dict[str, float]:
    """The generated clips' Fréchet distance to `real`, beside what a second real sample and trivial clips score.

    All are (N, 3, T, H, W) in [-1, 1]. A generator has learnt something when it is below each trivial clip, and is as
    good as this can tell when it is near `second_real`. With few clips all values are biased upwards: compare values
    of equal counts only.
    """
    reference = clip_features(real)
    candidates = {"frechet": generated, "frechet_second_real": second_real} | {
        f"frechet_{name}": clips for name, clips in trivial_clips(second_real).items()
    }
    return {name: standard_distance(clip_features(clips), reference) for name, clips in candidates.items()}


def standard_distance(features: np.ndarray, reference: np.ndarray) -> float:
    """`frechet_distance` in units of the reference's deviations, so that no feature's unit dominates."""
    centre, scale = reference.mean(0), np.maximum(reference.std(0), LEAST_DEVIATION)
    return frechet_distance((features - centre) / scale, (reference - centre) / scale)


def trivial_clips(real: torch.Tensor) -> dict[str, torch.Tensor]:
    """What needs no model: one mean frame for all clips; clips frozen at their first frame; their frames shuffled."""
    frames = real.shape[2]
    order = torch.stack([torch.randperm(frames, generator=_generator(index)) for index in range(len(real))])
    shuffle = order.to(real.device)[:, None, :, None, None].expand_as(real)
    return {
        "mean_frame": real.mean((0, 2), keepdim=True).expand_as(real),
        "frozen": real[:, :, :1].expand_as(real),
        "shuffled": real.gather(2, shuffle),
    }


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)

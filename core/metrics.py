"""How far generated clips are from real ones, measured so that it cannot be fooled by clips without motion or detail.

A Fréchet distance alone is easy to please on smooth video: so it is always reported beside what trivial clips score.
The features are hand-made (no pretrained network, nothing to download): comparable between runs of this project on the
same real clips, and not with published FVD, which needs I3D features; `frechet_distance` and `kernel_distance` take
those as well. Formulas: LVDM sheet §13.
"""

import math

import numpy as np
import torch
from torch.nn import functional

from core.errors import UserError

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
LAGS = (1, 2, 4, 8)
FLOOR = 0.004  # half a grey level: what is weaker counts as absent
# The least deviation of a feature over real clips. At 0.01 faint noise weighs as much as stillness, at 0.1 blur hides.
LEAST_DEVIATION = 0.05


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of tensors in [-1, 1] (peak 2); infinite when they are equal."""
    error = (a.double() - b.double()).square().mean()
    return float(10 * torch.log10(4 / error))


# ---- distances of two sets of features ------------------------------------------------------------------------------


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|m1 - m2|² + Tr(S1 + S2 - 2 (S1^½ S2 S1^½)^½) of (N, D) and (M, D) features, with unbiased covariances.

    The last trace is taken as the sum of the singular values of S1^½ S2^½, which is symmetric in a and b and exact
    for covariances without full rank.
    """
    _at_least_two(a, b)
    gap = np.square(a.mean(0) - b.mean(0)).sum()
    s1, s2 = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a.astype(np.float64), b.astype(np.float64)))
    overlap = np.linalg.svd(_root(s1) @ _root(s2), compute_uv=False).sum()
    return float(gap + np.trace(s1) + np.trace(s2) - 2 * overlap)


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased squared MMD with the kernel (x·y / D + 1)³: KVD. It can be below zero."""
    _at_least_two(a, b)
    n, m = len(a), len(b)
    kaa, kbb, kab = _kernel(a, a), _kernel(b, b), _kernel(a, b)
    within = (kaa.sum() - np.trace(kaa)) / (n * (n - 1)) + (kbb.sum() - np.trace(kbb)) / (m * (m - 1))
    return float(within - 2 * kab.mean())


def _root(covariance: np.ndarray) -> np.ndarray:
    """The symmetric square root of a positive semi-definite matrix."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x.astype(np.float64) @ y.astype(np.float64).T / x.shape[1] + 1) ** 3


def _at_least_two(a: np.ndarray, b: np.ndarray) -> None:
    if min(len(a), len(b)) < 2 or a.shape[1:] != b.shape[1:]:
        raise UserError(f"a distance needs two sets of two or more equal rows; got shapes {a.shape} and {b.shape}.")


# ---- features -------------------------------------------------------------------------------------------------------


def clip_features(video: torch.Tensor) -> np.ndarray:
    """(N, 3, T, H, W) in [-1, 1] -> (N, 43) float64: appearance 15, detail 7, motion 14, flow 7.

    Strengths enter as logarithms and mostly as ratios of neighbouring scales or lags, which vary little between real
    clips: so blur, noise, stillness and a wrong order of frames stand far out of them.
    """
    return torch.cat([_one_batch(part.float()) for part in video.split(16)]).double().cpu().numpy()


def _one_batch(video: torch.Tensor) -> torch.Tensor:
    if video.shape[2] == 1:  # a picture is a clip that stands still
        video = video.expand(-1, -1, 2, -1, -1)
    luma = torch.einsum("ncthw,c->nthw", video, video.new_tensor(LUMA))
    return torch.cat([_appearance(video), _detail(luma), _motion(luma), _flow(luma)], dim=1)


def _appearance(video: torch.Tensor) -> torch.Tensor:
    """(N, 15): colour of the four quarters, and the log deviation of each channel."""
    quarters = functional.adaptive_avg_pool3d(video, (1, 2, 2)).flatten(1)
    return torch.cat([quarters, _log_rms(video - video.mean((2, 3, 4), keepdim=True), (2, 3, 4))], dim=1)


def _detail(luma: torch.Tensor) -> torch.Tensor:
    """(N, 7): the gradient at four scales, as the finest and the ratios; its change over time; sharpness, its least."""
    scales = torch.stack([_log_gradient(level) for level in _pyramid(luma)], 1)  # (N, 4, T)
    sharpness = _log_curvature(luma) - scales[:, 0]  # (N, T): log of about a frequency
    own = torch.stack([_spread(scales[:, 0]), sharpness.mean(1), sharpness.amin(1)], 1)
    means = scales.mean(2)
    return torch.cat([means[:, :1], means.diff(dim=1), own], 1)


def _motion(luma: torch.Tensor) -> torch.Tensor:
    """(N, 14): frame differences at four lags, fine and coarse; against the gradient; smoothness; flicker."""
    pace = _log_rms(_lagged(luma, 1), (2, 3))  # (N, T - 1)
    against_gradient = pace.mean(1) - _log_gradient(luma).mean(1)  # log of about a speed
    brightness = _log_rms(_lagged(luma.mean((2, 3)), 1), (1,))
    own = torch.stack([against_gradient, _spread(pace), pace.amin(1), brightness], 1)
    return torch.cat([_lag_strengths(luma), _lag_strengths(_pyramid(luma)[-1]), own], 1)


def _lag_strengths(luma: torch.Tensor) -> torch.Tensor:
    """(N, 5): log difference at lag 1, the ratios to the next lags (order of frames), and of the second difference."""
    lags = torch.stack([_log_rms(_lagged(luma, lag), (1, 2, 3)) for lag in LAGS], 1)
    jerk = _log_rms(_lagged(_lagged(luma, 1), 1), (1, 2, 3)) - lags[:, 0]
    return torch.cat([lags[:, :1], lags.diff(dim=1), jerk[:, None]], 1)


def _flow(luma: torch.Tensor) -> torch.Tensor:
    """(N, 7): the frame's common velocity (pixels at half size) and what it leaves unexplained.

    Least squares of dI/dt + u dI/dx + v dI/dy = 0 over each pair of frames (Lucas, Kanade 1981).
    """
    half = _pyramid(luma)[1]
    dt, middle = _lagged(half, 1), (half[:, 1:] + half[:, :-1]) / 2
    dy, dx = torch.gradient(functional.pad(middle, (1, 1, 1, 1), mode="replicate"), dim=(2, 3))
    dy, dx = dy[..., 1:-1, 1:-1], dx[..., 1:-1, 1:-1]  # (N, T - 1, h, w)
    xx, xy, yy = ((p * q).mean((2, 3)) for p, q in ((dx, dx), (dx, dy), (dy, dy)))
    xt, yt = (dx * dt).mean((2, 3)), (dy * dt).mean((2, 3))
    xx, yy = xx + FLOOR**2, yy + FLOOR**2
    scale = xx * yy - xy**2
    u, v = (xy * yt - yy * xt) / scale, (xy * xt - xx * yt) / scale  # (N, T - 1)
    left = _log_rms(dt + u[..., None, None] * dx + v[..., None, None] * dy, (2, 3)) - _log_rms(dt, (2, 3))
    speed = 0.5 * torch.log(u.mean(1) ** 2 + v.mean(1) ** 2 + 0.1**2)
    unsteady = 0.5 * torch.log(u.var(1, correction=0) + v.var(1, correction=0) + 0.03**2)
    return torch.stack([u.mean(1), v.mean(1), speed, unsteady, left.mean(1), left.amax(1), _spread(left)], 1)


def _pyramid(luma: torch.Tensor) -> list[torch.Tensor]:
    """(N, T, H, W) at full, half, quarter and eighth size."""
    levels = [luma]
    for _ in range(3):
        height, width = levels[-1].shape[2:]
        levels.append(functional.adaptive_avg_pool2d(levels[-1], (max(1, height // 2), max(1, width // 2))))
    return levels


def _log_gradient(luma: torch.Tensor) -> torch.Tensor:
    """(N, T, H, W) -> (N, T): log of the root mean square of the gradient."""
    return 0.5 * torch.log(_mean_square(luma.diff(dim=2), (2, 3)) + _mean_square(luma.diff(dim=3), (2, 3)) + FLOOR**2)


def _log_curvature(luma: torch.Tensor) -> torch.Tensor:
    """(N, T, H, W) -> (N, T): the same of the second differences, where blur shows first."""
    down, right = luma.diff(n=2, dim=2), luma.diff(n=2, dim=3)
    return 0.5 * torch.log(_mean_square(down, (2, 3)) + _mean_square(right, (2, 3)) + FLOOR**2)


def _log_rms(x: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    return 0.5 * torch.log(_mean_square(x, dims) + FLOOR**2)


def _mean_square(x: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """The mean of no elements is 0 here: too short for a lag means that nothing moved."""
    count = math.prod(x.shape[dim] for dim in dims)
    return x.square().sum(dims) / max(1, count)


def _lagged(x: torch.Tensor, lag: int) -> torch.Tensor:
    """Differences over `lag` frames (dim 1), or over as many as there are."""
    lag = min(lag, max(1, x.shape[1] - 1))
    return x[:, lag:] - x[:, :-lag]


def _spread(x: torch.Tensor) -> torch.Tensor:
    """(N, T) -> (N,): deviation over time."""
    return x.std(1, correction=0)


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

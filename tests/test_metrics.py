"""Distances agree with published numbers, and no trivial clip comes near a second real sample."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from core.errors import UserError
from core.metrics import (
    clip_features,
    frechet_distance,
    frechet_report,
    kernel_distance,
    psnr,
    standard_distance,
    trivial_clips,
)
from data.slots import FrameFolders
from data.synthetic import write_sky

PHASE = np.arange(64)[:, None] * np.arange(1, 17)  # i · (j + 1)
X, Y = np.sin(0.1 * PHASE), np.cos(0.2 * PHASE) + 0.1  # the sheet's check, §15


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small tensors: two threads on a busy machine are ten times as slow as one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def sky(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.Tensor, torch.Tensor]:
    """Two samples of 64 synthetic clips each, read from their files: (64, 3, 16, 64, 64)."""
    root = tmp_path_factory.mktemp("sky")
    write_sky(root, train_videos=64, test_videos=64, clips_per_video=1, frames=16)
    both = [FrameFolders(root=root, split=split, resolution=64).build() for split in ("train", "test")]
    train, test = (torch.stack([clips[0, 0, i, i]["pixel_values"] for i in range(64)]) for clips in both)
    return train, test


@pytest.fixture(scope="module")
def scores(sky: tuple[torch.Tensor, torch.Tensor]) -> dict[str, float]:
    real, second = sky
    return frechet_report(_blurred(second), real, second)


def _blurred(video: torch.Tensor) -> torch.Tensor:
    """A Gaussian of deviation 1.1 pixels: visible, and no more."""
    weights = torch.exp(-(torch.arange(-4.0, 5.0) ** 2) / (2 * 1.1**2))
    kernel = (weights[:, None] * weights / weights.sum() ** 2)[None, None]
    frames = video.transpose(1, 2).reshape(-1, 1, *video.shape[-2:])
    padded = functional.pad(frames, (4, 4, 4, 4), mode="reflect")
    return functional.conv2d(padded, kernel).reshape(video.transpose(1, 2).shape).transpose(1, 2)


def test_the_frechet_distance_is_that_of_the_reference():
    assert frechet_distance(X, Y) == pytest.approx(0.2434217, abs=5e-8)


def test_the_kernel_distance_is_that_of_the_reference():
    assert kernel_distance(X, Y) == pytest.approx(-0.0263781, abs=5e-8)


def test_a_set_has_no_distance_to_itself():
    assert abs(frechet_distance(X, X)) < 1e-12


@given(st.integers(0, 2**32 - 1), st.integers(2, 12), st.integers(2, 12), st.integers(1, 20))
@settings(max_examples=40, deadline=None)
def test_distances_are_symmetric_whatever_the_rank(seed: int, n: int, m: int, dim: int):
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((n, dim)), 2 * rng.standard_normal((m, dim)) + 1
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9, abs=1e-9)
    assert kernel_distance(a, b) == pytest.approx(kernel_distance(b, a), rel=1e-9, abs=1e-9)
    assert frechet_distance(a, b) > 0


@given(st.floats(-3, 3), st.floats(0.1, 5))
@settings(max_examples=30, deadline=None)
def test_shift_and_scale_cost_what_the_formula_says(shift: float, scale: float):
    trace = np.trace(np.cov(X, rowvar=False))
    wanted = np.square((scale - 1) * X.mean(0) + shift).sum() + (1 - scale) ** 2 * trace
    assert frechet_distance(X, scale * X + shift) == pytest.approx(wanted, rel=1e-9, abs=1e-9)


def test_one_row_or_another_width_is_refused():
    with pytest.raises(UserError, match=r"shapes \(1, 16\) and \(64, 16\)"):
        frechet_distance(X[:1], X)
    with pytest.raises(UserError, match=r"shapes \(64, 16\) and \(64, 8\)"):
        kernel_distance(X, X[:, :8])


def test_psnr_is_in_decibels_of_a_peak_of_two():
    a = torch.zeros(3, 4, 4)
    assert psnr(a, a + 0.2) == pytest.approx(20.0, abs=1e-5)
    assert psnr(a, a) == math.inf


def test_features_have_one_width_and_are_finite_for_any_shape():
    for shape in ((2, 3, 1, 16, 16), (1, 3, 2, 8, 8), (3, 3, 5, 9, 33), (2, 3, 16, 64, 64), (1, 3, 4, 2, 2)):
        features = clip_features(torch.rand(shape) * 2 - 1)
        assert features.shape == (shape[0], 32) and features.dtype == np.float64
        assert np.isfinite(features).all()
    assert np.isfinite(clip_features(torch.zeros(2, 3, 4, 8, 8))).all()


def test_a_clips_features_do_not_depend_on_its_batch(sky: tuple[torch.Tensor, torch.Tensor]):
    together = clip_features(sky[0][:18])
    alone = np.concatenate([clip_features(sky[0][i : i + 1]) for i in range(18)])
    assert np.abs(together - alone).max() < 1e-4


def test_the_features_are_what_the_docstring_says():
    clip = torch.zeros(1, 3, 8, 16, 16)
    clip[:, :, :, :4, :4] = 0.5  # the first cell is brighter
    clip[:, 2, :, 8:] += 0.2  # the lower half is bluer
    clip[:, :, 1::2, 8:, 8:] += 0.25  # the last quarter flickers: it changes at lag 1 and not at lag 4
    cells, colours, near, far = np.split(clip_features(clip)[0], [16, 24, 28])
    blue = 0.2 * 0.114
    assert cells[:2] == pytest.approx([0.5, 0.0], abs=1e-6) and cells[12] == pytest.approx(blue, abs=1e-6)
    assert colours == pytest.approx([0, 0, -blue, -blue, 0, 0, 0.2 - blue, 0.2 - blue], abs=1e-6)
    assert near == pytest.approx([0, 0, 0, 0.25], abs=1e-6) and far == pytest.approx([0] * 4, abs=1e-6)


@pytest.mark.parametrize("name", ["mean_frame", "frozen", "shuffled"])
def test_a_trivial_clip_is_far_worse_than_a_second_real_sample(scores: dict[str, float], name: str):
    assert scores[f"frechet_{name}"] > 5 * scores["frechet_second_real"] > 0


def test_noise_and_one_clip_for_all_are_clearly_worse_and_reversed_time_is_not(
    sky: tuple[torch.Tensor, torch.Tensor], scores: dict[str, float]
):
    real, second = clip_features(sky[0]), sky[1]
    noise = 0.2 * torch.randn(second.shape, generator=torch.Generator().manual_seed(0))
    limit = 3 * scores["frechet_second_real"]
    assert standard_distance(clip_features(second + noise), real) > limit
    assert standard_distance(clip_features(second[:1]).repeat(64, axis=0), real) > limit
    assert standard_distance(clip_features(second.flip(2)), real) < limit / 2


def test_the_report_is_the_same_each_time_and_a_real_set_has_no_distance_to_itself(
    sky: tuple[torch.Tensor, torch.Tensor],
):
    real, second = (clips[:6] for clips in sky)
    first = frechet_report(real, real, second)
    assert first == frechet_report(real, real, second)
    assert list(first) == ["frechet", "frechet_second_real", "frechet_mean_frame", "frechet_frozen", "frechet_shuffled"]
    assert abs(first["frechet"]) < 1e-9


def test_trivial_clips_are_what_their_names_say(sky: tuple[torch.Tensor, torch.Tensor]):
    real = sky[0][:8]
    trivial = trivial_clips(real)
    assert trivial["mean_frame"].unique(dim=0).shape[0] == 1
    assert torch.allclose(trivial["mean_frame"][0, :, 3], real.mean((0, 2)), atol=1e-6)
    assert all(torch.equal(trivial["frozen"][:, :, t], real[:, :, 0]) for t in range(16))
    frames = (
        [clip[0, :, 0, 0].sort().values for clip in real],
        [clip[0, :, 0, 0].sort().values for clip in trivial["shuffled"]],
    )
    assert all(torch.equal(a, b) for a, b in zip(*frames, strict=True))
    orders = {tuple(_order(clip, mixed)) for clip, mixed in zip(real, trivial["shuffled"], strict=True)}
    assert len(orders) == 8 and tuple(range(16)) not in orders


def _order(clip: torch.Tensor, mixed: torch.Tensor) -> list[int]:
    """Which frame of `clip` (3, T, H, W) each frame of `mixed` is."""
    return [int((clip - frame[:, None]).abs().sum((0, 2, 3)).argmin()) for frame in mixed.unbind(1)]

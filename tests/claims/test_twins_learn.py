"""That every tiny twin learns, at its full length: scores against chance and trivial baselines. `make claims`; minutes each."""

import pytest
import torch

from core.slots import Launch
from core.train import train
from core.validate import real_clips
from registry import get

pytestmark = pytest.mark.claims


def finished(name, tmp_path, store):
    torch.set_num_threads(2)
    return train(get(name), Launch(output_dir=tmp_path / "run", store=store, device="cpu")).metrics


def show(name, values):
    print(f"\n{name}: " + "  ".join(f"{k.removeprefix('val/')} {v:.3f}" for k, v in values.items()))


def test_the_sky_twin_is_near_a_second_real_sample_and_far_from_everything_trivial(tmp_path, store):
    metrics = finished("lvdm-short-sky-tiny", tmp_path, store)
    show("lvdm-short-sky-tiny", metrics)
    score = metrics["val/frechet"]
    assert score <= 2 * metrics["val/frechet_second_real"]
    for trivial in ("mean_frame", "frozen", "shuffled"):
        assert score < metrics[f"val/frechet_{trivial}"]


def test_the_autoencoder_twin_rebuilds_clips_far_better_than_any_constant(tmp_path, store):
    recipe = get("lvdm-video-vae-tiny")
    metrics = finished(recipe.name, tmp_path, store)
    clips = real_clips(recipe.validation_data.build(), 32)

    def decibels(guess: torch.Tensor) -> float:
        return float((10 * torch.log10(4 / (clips - guess).square().flatten(1).mean(1))).mean())

    own_mean, one_mean = decibels(clips.mean((2, 3, 4), keepdim=True)), decibels(clips.mean(0, keepdim=True))
    show(recipe.name, metrics | {"psnr of each clip's mean colour": own_mean, "psnr of the mean clip": one_mean})
    assert metrics["val/psnr"] > 31.0 and metrics["val/psnr"] > max(own_mean, one_mean) + 6.0

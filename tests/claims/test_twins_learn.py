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


def constants(recipe):
    """PSNR of held-out clips guessed as each clip's mean colour, and as the mean clip."""
    clips = real_clips(recipe.validation_data.build(), 32)

    def decibels(guess: torch.Tensor) -> float:
        return float((10 * torch.log10(4 / (clips - guess).square().flatten(1).mean(1))).mean())

    return decibels(clips.mean((2, 3, 4), keepdim=True)), decibels(clips.mean(0, keepdim=True))


def test_the_autoencoder_twin_rebuilds_clips_far_better_than_any_constant(tmp_path, store):
    recipe = get("lvdm-video-vae-tiny")
    metrics = finished(recipe.name, tmp_path, store)
    own_mean, one_mean = constants(recipe)
    show(recipe.name, metrics | {"psnr of each clip's mean colour": own_mean, "psnr of the mean clip": one_mean})
    assert metrics["val/psnr"] > 31.0 and metrics["val/psnr"] > max(own_mean, one_mean) + 6.0


def assert_it_listens(metrics, wanted):
    """To each attribute of its captions: `wanted` is what guessing gets, and the least share that will do."""
    for attribute, (chance, least) in wanted.items():
        score = metrics[f"val/{attribute}_score"]
        assert metrics[f"val/{attribute}_score_real"] >= 0.98
        assert score >= least
        for deaf in ("shuffled", "mean_clip"):
            assert metrics[f"val/{attribute}_score_{deaf}"] < min(score, chance + 0.2)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("lvdm-text2video-tiny", {"colour": (1 / 6, 0.8), "direction": (1 / 4, 0.8), "speed": (1 / 2, 0.8)}),
        ("ldm-laion400m-tiny", {"colour": (1 / 6, 0.7), "place": (1 / 5, 0.6)}),
    ],
)
def test_a_text_twin_listens_to_what_its_captions_say(name, wanted, tmp_path, store):
    metrics = finished(name, tmp_path, store)
    show(name, {key: value for key, value in metrics.items() if "score" in key})
    assert_it_listens(metrics, wanted)


def test_the_frame_autoencoder_twin_rebuilds_pictures_far_better_than_any_constant(tmp_path, store):
    recipe = get("kl-vae-tiny")
    metrics = finished(recipe.name, tmp_path, store)
    own_mean, one_mean = constants(recipe)
    show(recipe.name, metrics | {"psnr of each clip's mean colour": own_mean, "psnr of the mean clip": one_mean})
    assert metrics["val/psnr"] > 28.0 and metrics["val/psnr"] > max(own_mean, one_mean) + 6.0

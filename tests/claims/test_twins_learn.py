"""That every tiny twin learns, at its full length: scores against chance and trivial baselines. `make claims`; minutes each."""

import pytest
import torch

from core.draw import Draw
from core.slots import Launch
from core.sources import find_source, load_networks
from core.train import train
from core.validate import captions, real_clips
from registry import get, names

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
        ("animatediff-image-finetune-tiny", {"colour": (1 / 6, 0.8)}),
        ("animatediff-full-tiny", {"colour": (1 / 6, 0.8), "direction": (1 / 4, 0.7), "speed": (1 / 2, 0.7)}),
        ("animatediff-lora-tiny", {"colour": (1 / 6, 0.8), "direction": (1 / 4, 0.7), "speed": (1 / 2, 0.7)}),
        ("animatediff-motion-lora-tiny", {"colour": (1 / 6, 0.8), "direction": (1 / 4, 0.7), "speed": (1 / 2, 0.7)}),
    ],
)
def test_a_text_twin_listens_to_what_its_captions_say(name, wanted, tmp_path, store):
    metrics = finished(name, tmp_path, store)
    show(name, {key: value for key, value in metrics.items() if "score" in key})
    assert_it_listens(metrics, wanted)


@torch.no_grad()
def clips_of(where):
    """Clips of eight held-out captions, of the same noise whatever the weights."""
    system, _ = load_networks(find_source(str(where), get, names()))
    system.mode(training=False)
    recipe = get("animatediff-full-tiny")
    texts, numbers = captions(recipe.validation_data.build(), 8), range(8)
    draw = Draw.fixed("equal noise", [str(number) for number in numbers], list(numbers), 8)
    return system.sample(texts, recipe.data.clip_shape(), recipe.validation.sampler, draw)


def test_a_lora_changes_clips_less_than_as_many_updates_of_the_whole_motion_modules(tmp_path, store):
    torch.set_num_threads(2)
    shipped = "--system.denoiser.motion.weights shipped:animatediff-tiny"
    before, moved = clips_of(f"animatediff-full-tiny {shipped}"), {}
    for name in ("full", "lora"):
        recipe = get(f"animatediff-{name}-tiny {shipped} --validation.metric-clips 0 --max-steps 200")
        train(recipe, Launch(output_dir=tmp_path / name, store=store, device="cpu"))
        moved[name] = (clips_of(tmp_path / name) - before).abs().mean().item()
    full, lora = moved["full"], moved["lora"]
    print(f"\nmean difference to the clips before: full {full:.4f}, LoRA {lora:.4f}")
    assert 0 < lora < full


def test_the_frame_autoencoder_twin_rebuilds_pictures_far_better_than_any_constant(tmp_path, store):
    recipe = get("kl-vae-tiny")
    metrics = finished(recipe.name, tmp_path, store)
    own_mean, one_mean = constants(recipe)
    show(recipe.name, metrics | {"psnr of each clip's mean colour": own_mean, "psnr of the mean clip": one_mean})
    assert metrics["val/psnr"] > 28.0 and metrics["val/psnr"] > max(own_mean, one_mean) + 6.0

"""Validation: numbers that two runs can be compared by, and pictures of what the recipe says."""

import pytest
import torch

from core.build import load_frozen
from core.distributed import Ranks
from core.validate import evaluate, fixed_keys, generate, prompts_of, reconstructions
from tests.engine.running import short

HERE = Ranks(torch.device("cpu"), 0, 1, None)


@pytest.fixture(scope="module", params=["lvdm-short-sky-tiny", "lvdm-text2video-tiny"])
def built(request, sky):
    """Name, a system whose output is not zero, and the held-out data."""
    recipe = short(request.param, sky)
    torch.manual_seed(0)
    system = recipe.system.build()
    load_frozen(recipe, system)
    for parameter in system.trained.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    system.mode(training=False)
    return request.param, system, recipe.validation_data.build()


def loss(built, sky, more=""):
    name, system, held_out = built
    return evaluate(system, held_out, short(name, sky, more), HERE)["val/loss"]


def test_the_loss_of_the_same_weights_is_the_same_in_every_run(built, sky):
    """Whatever its seed and how it trains, and whatever was drawn before."""
    first = loss(built, sky)
    torch.manual_seed(7)
    assert loss(built, sky, "--seed 8 --lr 1e-3 --global-batch 2 --batch-size 1") == first
    # other kernels for another batch, the same clips, noise and timesteps
    assert loss(built, sky, "--validation.batch-size 1 --validation.num-batches 4") == pytest.approx(first, rel=1e-5)


def test_the_loss_leaves_no_caption_out_and_moves_with_the_weights(built, sky):
    name, system, _ = built
    first = loss(built, sky)
    if name == "lvdm-text2video-tiny":
        assert loss(built, sky, "--system.conditions.0.dropout 0.9") == first
    weight = next(system.trained.parameters())
    weight.data += 0.01
    assert loss(built, sky) != first
    weight.data -= 0.01


def test_the_loss_covers_the_whole_schedule(built, sky):
    """Timesteps lie evenly over it, so that four clips say something of all noise levels."""
    system = built[1]
    seen = []
    original = system.denoiser.forward

    def looking(x, t, *condition):
        seen.extend(t.tolist())
        return original(x, t, *condition)

    system.denoiser.forward = looking
    try:
        loss(built, sky)
    finally:
        system.denoiser.forward = original
    assert seen == [125, 375, 625, 875]


def test_as_many_clips_are_shown_and_rebuilt_as_the_recipe_says_with_its_frames(built, sky):
    name, system, held_out = built
    recipe = short(name, sky, "--validation.num-samples 3 --validation.batch-size 2")
    shape = (3, *recipe.data.clip_shape())
    pairs = reconstructions(system, held_out, recipe, HERE)
    assert pairs.shape == (6, *shape)
    keys = fixed_keys(held_out, 3)
    for row, key in enumerate(keys):
        assert torch.equal(pairs[2 * row], held_out[key]["pixel_values"])
    assert (pairs[1::2] - pairs[::2]).abs().mean() < 0.2  # the shipped autoencoder works
    prompts = prompts_of(recipe, held_out, 3, HERE)
    assert prompts == ([held_out[key]["caption"] for key in keys] if recipe.told else [""] * 3)
    assert generate(system, recipe, recipe.validation.sampler, 3, HERE, prompts=prompts).shape == (3, *shape)

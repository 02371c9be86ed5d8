"""The stock autoencoder frame by frame: the same numbers as diffusers', bounded memory, folders that diffusers opens."""

import json

import pytest
import torch
from diffusers import AutoencoderKL
from torch.testing import assert_close

from core.errors import UserError
from core.slots import FrameVAE
from core.weights.folder import write_folder

TINY = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return FrameVAE(**TINY, scale_factor=0.5, shift_factor=1.5).build().eval()


def _noise(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _size(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_defaults_are_stable_diffusion_s():
    with torch.device("meta"):
        full = FrameVAE().build()
    assert (_size(full), len(full.state_dict())) == (83_653_863, 248)
    assert full.latent_shape(16, 256, 256) == (4, 16, 32, 32)
    assert full.to_latents(torch.ones(1)).item() == pytest.approx(0.18215)


@torch.no_grad()
def test_a_saved_folder_opens_as_the_stock_class_and_gives_the_same_numbers(tiny, tmp_path):
    write_folder(tiny, tmp_path, tiny.state_dict())
    stock = AutoencoderKL.from_pretrained(tmp_path).eval()
    assert type(stock) is AutoencoderKL
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "AutoencoderKL"
    video = _noise(2, 3, 3, 16, 24)
    decoded, posterior = tiny(video)
    for i in range(3):
        z = stock.encode(video[:, :, i]).latent_dist
        assert_close(posterior.mean[:, :, i], z.mean, rtol=0, atol=1e-4)
        assert_close(posterior.logvar[:, :, i], z.logvar, rtol=0, atol=1e-4)
        assert_close(decoded[:, :, i], stock.decode(z.mean).sample, rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_frame_s_latents_do_not_depend_on_the_other_frames(tiny):
    video, other = _noise(1, 3, 4, 16, 16), _noise(1, 3, 4, 16, 16, seed=2)
    other[:, :, 2] = video[:, :, 2]
    assert_close(tiny.encode(video).mean[:, :, 2], tiny.encode(other).mean[:, :, 2], rtol=0, atol=1e-5)


@torch.no_grad()
def test_an_image_is_a_clip_of_one_frame(tiny):
    image = _noise(2, 3, 1, 16, 16)
    posterior = tiny.encode(image)
    assert posterior.mean.shape == (2, *tiny.latent_shape(1, 16, 16)) == (2, 4, 1, 8, 8)
    assert tiny.decode(posterior.mean).shape == image.shape


@pytest.mark.parametrize(("grad", "seen"), [(False, [5, 5, 2]), (True, [12])])
def test_frames_go_through_a_few_at_a_time_unless_a_gradient_is_wanted(tiny, monkeypatch, grad, seen):
    monkeypatch.setattr(tiny, "frames_at_a_time", 5)
    counts: list[int] = []
    tiny.encoder.register_forward_pre_hook(lambda module, args: counts.append(len(args[0])))
    video = _noise(2, 3, 6, 16, 16)
    with torch.set_grad_enabled(grad):
        mean = tiny.encode(video).mean
    assert counts == seen
    monkeypatch.setattr(tiny, "frames_at_a_time", 100)
    with torch.no_grad():
        assert_close(tiny.encode(video).mean, mean, rtol=0, atol=1e-5)


def test_latents_are_shifted_first_and_scaled_then_and_the_config_says_it_in_diffusers_words(tiny):
    z = _noise(2, 4, 3, 2, 2)
    assert_close(tiny.to_latents(z), 0.5 * (z + 1.5))
    assert_close(tiny.from_latents(tiny.to_latents(z)), z)
    stock = (z - tiny.config.shift_factor) * tiny.config.scaling_factor  # as diffusers' pipelines do it
    assert_close(tiny.to_latents(z), stock)


def test_constants_go_through_a_config_and_a_stock_config_s_empty_shift_is_none_at_all(tiny):
    assert tiny.constants_of(tiny.constants_config(0.7, -0.25)) == (0.7, -0.25)
    assert tiny.constants_of({"scaling_factor": 0.13025, "shift_factor": None}) == (0.13025, 0.0)
    assert tiny.constants_of({"_class_name": "AutoencoderKL"}) == (0.18215, 0.0)


def test_blocks_are_called_once_in_the_order_given_and_hold_nearly_all_parameters(tiny):
    calls = []
    for block in tiny.blocks():
        block.register_forward_pre_hook(lambda module, args: calls.append(module))
    tiny(_noise(1, 3, 2, 16, 16))
    assert calls == tiny.blocks()
    with torch.device("meta"):
        full = FrameVAE().build()
    assert sum(map(_size, full.blocks())) >= 0.99 * _size(full)


def test_noise_moves_the_reconstruction_and_every_parameter_gets_a_gradient(tiny):
    video = _noise(2, 3, 2, 16, 16)
    decoded, posterior = tiny(video, _noise(2, 4, 2, 8, 8))
    assert not torch.equal(decoded, tiny(video)[0])
    (decoded.square().mean() + posterior.kl().mean()).backward()
    assert [name for name, p in tiny.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(("frames", "height", "width"), [(0, 16, 16), (4, 15, 16), (4, 16, 7)])
def test_a_clip_that_does_not_fit_is_refused_with_what_would(tiny, frames, height, width):
    with pytest.raises(UserError, match=f"{frames} frames at {height} x {width}: .* 1 frame, .* multiples of 2"):
        tiny.latent_shape(frames, height, width)


@pytest.mark.parametrize("wrong", [{"block_out_channels": ()}, {"block_out_channels": (8, 30)}, {"latent_channels": 0}])
def test_sizes_that_cannot_be_built_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        FrameVAE(**{**TINY, **wrong})

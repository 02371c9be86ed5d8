"""The 3D autoencoder: sizes in space and time, its latents' constants, its posterior, and what it refuses."""

import pytest
import torch
from torch.testing import assert_close

from core.errors import UserError
from core.models.video_vae import Posterior, VideoAutoencoder, pad_edges, strides

TINY = {"n_hiddens": 4, "norm_num_groups": 4}


@pytest.fixture(scope="module")
def full():
    with torch.device("meta"):
        return VideoAutoencoder()


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return VideoAutoencoder(**TINY, scale_factor=0.33422927, shift_factor=1.4606637).eval()


def _noise(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _size(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_full_size_is_the_published_one(full):
    sizes = [_size(part) for part in (full, full.encoder, full.decoder, full.quant_conv, full.post_quant_conv)]
    assert sizes == [19_446_759, 7_458_952, 11_987_715, 72, 20]
    assert [len(part.state_dict()) for part in (full, full.encoder, full.decoder)] == [96, 36, 56]


def test_every_kernel_has_one_name(full):
    assert len({id(value) for value in full.state_dict(keep_vars=True).values()}) == 96


@pytest.mark.parametrize("options", [{}, TINY])
def test_blocks_hold_nearly_all_parameters_and_are_called_once_a_direction(options):
    with torch.device("meta"):
        vae = VideoAutoencoder(**options)
    calls = []
    for block in vae.blocks():
        block.register_forward_pre_hook(lambda module, args: calls.append(module))
    vae(torch.empty(1, 3, 4, 16, 16, device="meta"))
    assert calls == vae.blocks()
    assert sum(_size(block) for block in vae.blocks()) >= 0.95 * _size(vae)


def test_the_twin_has_a_third_of_a_million_parameters(tiny):
    assert _size(tiny) == 319_063


def test_strides_are_two_until_an_axis_s_factor_is_used_up():
    assert strides((4, 8, 8)) == [(2, 2, 2), (2, 2, 2), (1, 2, 2)]
    assert strides((2, 4, 4)) == [(2, 2, 2), (1, 2, 2)]
    assert strides((1, 2, 2)) == [(1, 2, 2)]


def test_the_odd_element_of_the_padding_goes_in_front():
    x = torch.arange(1.0, 4.0).view(1, 1, 3, 1, 1).expand(1, 1, 3, 2, 2)
    assert pad_edges(x, (4, 4, 4), (1, 2, 2))[0, 0, :, 0, 0].tolist() == [1, 1, 1, 2, 3, 3]
    assert pad_edges(x, (4, 4, 4), (1, 2, 2)).shape == (1, 1, 6, 4, 4)


@torch.no_grad()
@pytest.mark.parametrize(("frames", "latent_frames"), [(4, 1), (7, 1), (13, 3), (16, 4), (17, 4), (20, 5)])
def test_any_number_of_frames_is_rounded_down_to_latent_frames(tiny, frames, latent_frames):
    posterior = tiny.encode(_noise(1, 3, frames, 16, 24))
    assert posterior.mean.shape == (1, 4, latent_frames, 2, 3)
    assert tiny.latent_shape(frames, 16, 24) == posterior.mean.shape[1:]
    assert tiny.decode(posterior.mean).shape == (1, 3, 4 * latent_frames, 16, 24)


@torch.no_grad()
@pytest.mark.parametrize("factors", [(2, 4, 4), (1, 8, 8), (8, 4, 4)])
def test_factors_are_the_config_s(factors):
    vae = VideoAutoencoder(**TINY, downsample=factors)
    assert (vae.temporal_factor, vae.spatial_factor) == factors[:2]
    assert vae.encode(_noise(1, 3, 8, 16, 8)).mean.shape[1:] == vae.latent_shape(8, 16, 8)


def test_latents_and_their_inverse_are_shifted_first_and_scaled_then(tiny):
    z = _noise(2, 4, 4, 2, 2)
    assert_close(tiny.to_latents(z), 0.33422927 * (z + 1.4606637))
    assert_close(tiny.from_latents(tiny.to_latents(z)), z)


@pytest.mark.parametrize(("frames", "height", "width"), [(3, 16, 16), (16, 20, 16), (16, 16, 12)])
def test_a_clip_that_does_not_fit_is_refused_with_what_would(tiny, frames, height, width):
    with pytest.raises(UserError, match=f"{frames} frames at {height} x {width}: .* 4 frames, .* multiples of 8"):
        tiny.encode(_noise(1, 3, frames, height, width))


def test_factors_that_are_no_powers_of_two_are_refused():
    with pytest.raises(UserError, match="powers of two"):
        VideoAutoencoder(downsample=(3, 8, 8))


def test_the_posterior_is_the_normal_distribution_it_says():
    moments = _noise(3, 8, 2, 4, 4)
    posterior = Posterior.of(moments)
    normal = torch.distributions.Normal(moments[:, :4], (moments[:, 4:] / 2).exp())
    standard = torch.distributions.Normal(0.0, 1.0)
    assert_close(posterior.kl(), torch.distributions.kl_divergence(normal, standard).sum((1, 2, 3, 4)))
    noise = _noise(3, 4, 2, 4, 4, seed=2)
    assert_close(posterior.sample(noise), normal.mean + normal.stddev * noise)


def test_the_log_variance_stays_between_minus_30_and_20():
    posterior = Posterior.of(torch.tensor([0.0, -1e4]).view(1, 2, 1, 1, 1))
    assert posterior.logvar.item() == -30.0
    assert Posterior.of(torch.tensor([0.0, 1e4]).view(1, 2, 1, 1, 1)).logvar.item() == 20.0
    assert not Posterior.of(torch.zeros(2, 8, 1, 2, 2)).kl().any()


@torch.no_grad()
def test_a_clip_alone_is_the_clip_in_a_batch(tiny):
    video = _noise(3, 3, 8, 16, 16)
    batch, _ = tiny(video)
    assert_close(torch.cat([tiny(clip)[0] for clip in video.split(1)]), batch, rtol=0.0, atol=1e-4)


def test_noise_moves_the_reconstruction_and_every_parameter_gets_a_gradient():
    torch.manual_seed(0)
    vae, video = VideoAutoencoder(**TINY), _noise(2, 3, 8, 16, 16)
    decoded, posterior = vae(video, _noise(2, 4, 2, 2, 2))
    assert not torch.equal(decoded, vae(video)[0])
    (decoded.square().mean() + posterior.kl().mean()).backward()
    assert [name for name, p in vae.named_parameters() if p.grad is None or not p.grad.any()] == []


@torch.no_grad()
def test_a_bfloat16_autoencoder_takes_float32_clips(tiny):
    half = VideoAutoencoder(**TINY)
    half.load_state_dict(tiny.state_dict())
    video = _noise(1, 3, 8, 16, 16)
    decoded, _ = half.to(torch.bfloat16)(video)
    expected, _ = tiny(video)
    assert (decoded.float() - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_a_saved_autoencoder_comes_back_with_its_constants_and_every_bit(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    again = VideoAutoencoder.from_pretrained(tmp_path)
    assert (again.config.scale_factor, again.config.shift_factor) == (0.33422927, 1.4606637)
    assert all(torch.equal(a, b) for a, b in zip(tiny.state_dict().values(), again.state_dict().values(), strict=True))

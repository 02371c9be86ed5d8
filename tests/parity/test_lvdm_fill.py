"""Networks filled with sines of their keys' checksums, against what the original's modules give for the same fill.

These reach the full-size autoencoder and single blocks without stored weights. Figures: mean, population deviation, first four, last.
"""

import math
import zlib

import pytest
import torch

import core.models.lvdm_unet as lvdm_unet
from core.models.lvdm_text_unet import LVDMTextUNet, TemporalAttention
from core.models.lvdm_unet import LVDMUNet, STAttentionBlock
from core.models.video_vae import VideoAutoencoder

# in float64 the autoencoder's figures are as far from the original's float32 ones as in float32, up to 1.7e-4 (the decoder's last)
AUTOENCODER = 2.5e-4


def _filled(module):
    """phase p = 2 pi (crc32(key) mod 10007) / 10007, s_i = sin(p + 0.7 i); kernels 1.5 s / sqrt(fan), norm scales 1 + 0.1 s, rest 0.1 s."""
    state = {}
    for key, value in module.state_dict().items():
        phase = 2 * math.pi * (zlib.crc32(key.encode()) % 10007) / 10007
        s = torch.sin(phase + 0.7 * torch.arange(value.numel(), dtype=torch.float64))
        if value.dim() >= 2:
            s = s * 1.5 / math.sqrt(value.numel() / value.shape[0])
        else:
            s = 1 + 0.1 * s if key.endswith("weight") else 0.1 * s
        state[key] = s.reshape(value.shape).float()
    module.load_state_dict(state)
    return module.eval()


def _cosine(*shape, step=0.11):
    return torch.cos(step * torch.arange(math.prod(shape), dtype=torch.float64)).float().reshape(shape)


def _figures(y):
    flat = y.detach().double().flatten()
    return [flat.mean().item(), flat.std(correction=0).item(), *flat[:4].tolist(), flat[-1].item()]


def _is(y, *expected, within=2e-5):
    assert _figures(y)[:2] == pytest.approx(expected[:2], abs=within)
    assert _figures(y)[2:] == pytest.approx(expected[2:], abs=within)


@pytest.fixture(scope="module")
def unet():
    return _filled(
        LVDMUNet(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(2,), num_heads=4)
    )


def test_the_filled_unet_has_the_original_s_parameters_and_keys(unet):
    assert sum(p.numel() for p in unet.parameters()) == 824_964
    assert len(unet.state_dict()) == 160


@torch.no_grad()
def test_the_filled_unet_gives_the_original_s_figures(unet):
    _is(
        unet(_cosine(1, 4, 4, 8, 8), torch.tensor([37])),
        *(0.194188, 1.449186, 0.62855, 0.88302, 1.04391, 1.21628, 0.00520),
    )


@torch.no_grad()
def test_the_filled_unet_gives_the_original_s_figures_for_a_batch_of_two_timesteps(unet):
    _is(
        unet(_cosine(2, 4, 4, 8, 8), torch.tensor([37, 900])),
        *(0.201541, 1.605893, 0.62855, 0.88302, 1.04391, 1.21628, -0.20986),
    )


@torch.no_grad()
def test_the_filled_unet_gives_the_original_s_figures_beyond_the_reach_of_relative_positions(unet):
    _is(
        unet(_cosine(1, 4, 6, 8, 8), torch.tensor([37])),
        *(0.225892, 1.581999, 3.26451, 5.60264, 7.19935, 7.69133, 0.09785),
    )


@torch.no_grad()
def test_the_filled_text_unet_gives_the_original_s_figures():
    unet = _filled(
        LVDMTextUNet(
            model_channels=32,
            channel_mult=(1, 2),
            num_res_blocks=1,
            attention_resolutions=(2, 1),
            num_heads=4,
            context_dim=16,
            temporal_length=4,
        )
    )
    assert (sum(p.numel() for p in unet.parameters()), len(unet.state_dict())) == (1_204_708, 412)
    _is(
        unet(_cosine(1, 4, 4, 8, 8), torch.tensor([37]), _cosine(1, 5, 16, step=0.23)),
        *(0.201569, 1.256470, 0.55607, 0.85011, 1.00894, 0.97599, 0.00583),
    )


@torch.no_grad()
def test_the_filled_attention_over_frames_gives_the_original_s_figures():
    attention = _filled(TemporalAttention(32, heads=4, reach=4, dropout=0.0))
    y = attention(_cosine(2, 4, 32).unsqueeze(2)).squeeze(2)  # one pixel
    _is(y, *(0.012483, 0.870992, -0.99419, 1.00802, -0.51943, 0.21054, -0.05852))


@torch.no_grad()
def test_the_filled_encoder_gives_the_original_s_figures():
    encoder = _filled(VideoAutoencoder().encoder)
    assert sum(p.numel() for p in encoder.parameters()) == 7_458_952
    _is(
        encoder(_cosine(1, 3, 8, 16, 16)),
        0.271116,
        0.384951,
        0.55046,
        0.55226,
        0.32658,
        0.32481,
        -0.04812,
        within=AUTOENCODER,
    )


@torch.no_grad()
def test_the_filled_decoder_gives_the_original_s_figures():
    decoder = _filled(VideoAutoencoder().decoder)
    assert sum(p.numel() for p in decoder.parameters()) == 11_987_715
    _is(
        decoder(_cosine(1, 4, 2, 2, 2)),
        0.062281,
        1.180404,
        0.08639,
        0.09003,
        0.09159,
        0.09103,
        -0.13504,
        within=AUTOENCODER,
    )


PUBLISHED = (-0.015828, 1.055025, 0.52872, 0.46049, 0.62038, 0.84506, 1.46629)
CONVENTIONAL = (-0.015603, 1.052938, 0.51033, 0.43145, 0.57627, 0.80936, 1.45270)


def _block():
    return _filled(STAttentionBlock(32, heads=4, reach=4, frame_positions=False, groups=32))


@torch.no_grad()
def test_the_filled_attention_block_gives_the_original_s_figures():
    _is(_block()(_cosine(1, 32, 4, 2, 2)), *PUBLISHED)


@torch.no_grad()
def test_the_usual_orientation_of_relative_keys_gives_other_figures(monkeypatch):
    usual = lvdm_unet.relative_logits
    monkeypatch.setattr(lvdm_unet, "relative_logits", lambda q, rows: usual(q, rows).transpose(2, 3))
    y = _block()(_cosine(1, 32, 4, 2, 2))
    assert _figures(y) != pytest.approx(PUBLISHED, abs=1e-3)
    _is(y, *CONVENTIONAL)

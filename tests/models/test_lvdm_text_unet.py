"""The text-to-video UNet of LVDM: its size block by block, how it starts, what it sees, and what its options change."""

import functools
import re

import pytest
import torch
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from core.attention import set_attention
from core.errors import UserError
from core.models.lvdm_text_unet import LVDMTextUNet, TemporalAttention
from tests.models.drawn import awake, noise, parts_are, size

TINY = {
    "model_channels": 32,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (1, 2),
    "num_heads": 4,
    "context_dim": 24,
    "temporal_length": 4,
}


@pytest.fixture(scope="module")
def full():
    with torch.device("meta"):
        return LVDMTextUNet()


def _awake(**options):
    return awake(LVDMTextUNet, **(TINY | options))


X, TEXT, T = noise(2, 4, 4, 8, 8), noise(2, 7, 24, seed=2), torch.tensor([5, 900])


# ------------------------------------------------------------------------------------------------------------- size


def test_the_full_size_is_the_published_one(full):
    assert size(full) == 958_924_964
    assert len(full.state_dict()) == 974


def test_every_part_has_its_published_size(full):
    parts_are(
        full,
        ("time_embed", 2_050_560, 4),
        ("input_blocks", 284_131_520, 356),
        ("middle_block", 110_174_080, 64),
        ("output_blocks", 562_556_640, 546),
        ("out", 12_164, 4),
    )


X320, X640, X1280 = 3_372_640, 12_479_680, 47_896_960
INPUT = [
    *[[11_840]],
    *[[2_255_040, X320]] * 2,
    *[[921_920]],
    *[[6_558_080, X640], [8_196_480, X640]],
    *[[3_687_040]],
    *[[24_584_960, X1280], [31_138_560, X1280]],
    *[[14_746_880]],
    *[[31_138_560]] * 2,
]
OUTPUT = [
    *[[49_164_800]] * 2,
    *[[49_164_800, 14_746_880]],
    *[[49_164_800, X1280]] * 2,
    *[[40_971_520, X1280, 14_746_880]],
    *[[16_801_280, X640], [12_704_000, X640], [10_655_360, X640, 3_687_040]],
    *[[4_407_040, X320]],
    *[[3_382_400, X320]] * 2,
]


def test_every_block_has_its_published_layers_and_size(full):
    assert [[size(layer) for layer in stage] for stage in full.input_blocks] == INPUT
    assert [size(layer) for layer in full.middle_block] == [31_138_560, X1280, 31_138_560]
    assert [[size(layer) for layer in stage] for stage in full.output_blocks] == OUTPUT


def test_tables_of_relative_positions_have_the_published_shapes(full):
    shapes = {tuple(p.shape) for name, p in full.named_parameters() if "embeddings_table" in name}
    assert shapes == {(33, 40), (33, 80), (33, 160)}


# ------------------------------------------------------------------------------------------------------------- start


@pytest.mark.parametrize("frames", [1, 3, 7])
def test_a_fresh_unet_outputs_exactly_zero_for_any_number_of_frames(frames):
    y = LVDMTextUNet(**TINY)(noise(2, 4, frames, 8, 4), torch.tensor([0, 999]), TEXT)
    assert y.shape == (2, 4, frames, 8, 4)
    assert not y.any()


def test_a_fresh_unet_has_its_branches_and_all_of_temporal_attention_at_zero():
    pattern = r"out_layers\.3\.|\.proj_out\.|_tmp\.to_(q|k|v|out\.0)\.|^out\.2\."
    zero = {name for name, p in LVDMTextUNet(**TINY).named_parameters() if not p.any()}
    biases = {name for name in zero if re.search(r"(norm\d?|_layers\.0|^out\.0)\.bias$", name)}
    assert zero - biases == {name for name, _ in LVDMTextUNet(**TINY).named_parameters() if re.search(pattern, name)}


@pytest.mark.parametrize("relative", [True, False])
def test_temporal_attention_leaves_zero(relative):
    torch.manual_seed(0)
    attention = TemporalAttention(32, heads=4, reach=4 if relative else None, dropout=0.0)
    optimizer, x = torch.optim.SGD(attention.parameters(), lr=0.1), noise(2, 4, 3, 32)
    for _ in range(3):
        optimizer.zero_grad()
        (attention(x) - x.flip(1)).square().sum().backward()
        optimizer.step()
    assert all(p.any() for p in attention.parameters())


def test_every_parameter_gets_a_gradient_once_the_zeroed_layers_have_left_zero():
    unet = _awake()
    unet(X, T, TEXT).square().sum().backward()
    assert [name for name, p in unet.named_parameters() if p.grad is None or not p.grad.any()] == []


# ---------------------------------------------------------------------------------------------------------- the text


@torch.no_grad()
def test_a_sample_sees_its_own_text_whatever_its_batch():
    unet = _awake()
    both = unet(X, T, TEXT)
    alone = torch.cat([unet(X[i : i + 1], T[i : i + 1], TEXT[i : i + 1]) for i in range(2)])
    assert_close(both, alone, rtol=0.0, atol=1e-4)
    assert (unet(X, T, TEXT.flip(0)) - both).abs().amax((1, 2, 3, 4)).min() > 1e-2


@torch.no_grad()
def test_the_order_of_words_is_the_encoder_s_business():
    assert_close(_awake()(X, T, TEXT.flip(1)), _awake()(X, T, TEXT), rtol=0.0, atol=1e-4)


@torch.no_grad()
def test_without_a_text_frames_attend_to_themselves_where_the_widths_allow_it():
    unet = _awake(channel_mult=(1, 1), context_dim=32)
    assert unet(X, T).isfinite().all()
    with pytest.raises(UserError, match=r"this denoiser needs a text \(B, N, 24\)"):
        _awake()(X, T)


@pytest.mark.parametrize("shape", [(2, 7, 25), (1, 7, 24), (2, 24)])
def test_a_text_of_another_shape_is_refused_with_the_one_expected(shape):
    with pytest.raises(UserError, match=r"expected \(2, N, 24\)"):
        _awake()(X, T, torch.zeros(shape))


# ----------------------------------------------------------------------------------------------------------- options


@torch.no_grad()
@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({"use_relative_position": False}, True),
        ({"use_relative_position": True}, False),
        ({"use_relative_position": False, "frame_positions": True}, False),
    ],
)
def test_the_order_of_frames_is_seen_through_positions_only(options, same):
    unet, order = _awake(**options), [2, 0, 3, 1]
    moved = unet(X[:, :, order], T, TEXT)
    assert torch.allclose(moved, unet(X, T, TEXT)[:, :, order], atol=1e-3) is same


def test_frame_positions_have_no_parameters():
    assert LVDMTextUNet(**TINY, frame_positions=True).state_dict().keys() == LVDMTextUNet(**TINY).state_dict().keys()


def test_depth_repeats_the_transformer_block():
    blocks = LVDMTextUNet(**TINY, transformer_depth=2).middle_block[1].transformer_blocks
    assert len(blocks) == 2


@torch.no_grad()
@pytest.mark.parametrize("backend", ["eager", "flash"])
def test_every_attention_back_end_gives_the_same(backend):
    unet = _awake()
    expected = unet(X, T, TEXT)
    set_attention(unet, backend)
    assert_close(unet(X, T, TEXT), expected, rtol=0.0, atol=1e-4)


def test_activation_checkpointing_changes_no_bit():
    def gradients(checkpointing):
        unet = _awake(dropout=0.2).train()
        for block in unet.blocks() if checkpointing else []:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        torch.manual_seed(1)
        y = unet(X, T, TEXT)
        y.square().mean().backward()
        return [y.detach(), *(p.grad for p in unet.parameters())]

    assert all(torch.equal(a, b) for a, b in zip(gradients(False), gradients(True), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_nearly_the_same_output_and_finite_gradients(dtype):
    unet = _awake()
    expected = unet(X, T, TEXT).detach()
    with torch.autocast("cpu", dtype):
        y = unet(X, T, TEXT)
    assert y.dtype == torch.float32
    assert (y - expected).abs().mean() < 0.05 * expected.abs().mean()
    y.square().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in unet.parameters())


def test_a_saved_unet_comes_back_with_its_config_and_every_bit(tmp_path):
    unet = _awake(frame_positions=True)
    unet.save_pretrained(tmp_path)
    again = LVDMTextUNet.from_pretrained(tmp_path)
    assert {name: again.config[name] for name in ("frame_positions", *TINY)} == {
        "frame_positions": True,
        **{name: list(v) if isinstance(v, tuple) else v for name, v in TINY.items()},
    }
    assert torch.equal(again(X, T, TEXT), unet(X, T, TEXT))

"""The UNet of LVDM: its size block by block, how it starts, and what its options change."""

import re

import pytest
import torch
from torch.testing import assert_close

from core.errors import UserError
from core.models.lvdm_unet import GroupNorm, LVDMUNet, PixelNorm, sinusoids
from tests.models.drawn import awake, noise, parts_are, size

TINY = {"model_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": (1, 2)}


@pytest.fixture(scope="module")
def full():
    with torch.device("meta"):
        return LVDMUNet()


def _awake(**options):
    return awake(LVDMUNet, **(TINY | options))


# ------------------------------------------------------------------------------------------------------------- size


def test_the_full_size_is_the_published_one(full):
    assert size(full) == 548_904_580
    assert len(full.state_dict()) == 668


def test_every_part_has_its_published_size(full):
    parts_are(
        full,
        ("time_embed", 1_312_768, 4),
        ("input_blocks", 171_957_120, 260),
        ("middle_block", 50_364_928, 34),
        ("output_blocks", 325_260_032, 366),
        ("out", 9_732, 4),
    )


A512, A768, A1024 = 2_105_600, 4_731_264, 8_405_504
INPUT = [
    *[[9_472]],
    *[[1_705_984]] * 3,
    *[[590_080]],
    *[[4_722_688, A512]],
    *[[5_771_264, A512]] * 2,
    *[[2_359_808]],
    *[[10_819_840, A768]],
    *[[12_195_840, A768]] * 2,
    *[[5_309_184]],
    *[[19_407_360, A1024]],
    *[[20_979_712, A1024]] * 2,
]
OUTPUT = [
    *[[32_517_120, A1024]] * 3,
    *[[29_895_168, A1024, 9_438_208]],
    *[[20_652_800, A768]],
    *[[18_686_208, A768]] * 2,
    *[[16_719_616, A768, 5_309_184]],
    *[[9_967_616, A512]],
    *[[8_656_384, A512]] * 2,
    *[[7_345_152, A512, 2_359_808]],
    *[[3_083_520]],
    *[[2_427_648]] * 3,
]


def test_every_block_has_its_published_layers_and_size(full):
    assert [[size(layer) for layer in stage] for stage in full.input_blocks] == INPUT
    assert [size(layer) for layer in full.middle_block] == [20_979_712, A1024, 20_979_712]
    assert [[size(layer) for layer in stage] for stage in full.output_blocks] == OUTPUT


def test_kernels_see_one_frame_and_keep_five_dimensions(full):
    kernels = [p.shape for name, p in full.named_parameters() if p.dim() == 5]
    assert {shape[2] for shape in kernels} == {1}
    assert full.input_blocks[0][0].weight.shape == (256, 4, 1, 3, 3)
    assert full.input_blocks[5][1].relative_position_k.embeddings_table.shape == (9, 128)


# ------------------------------------------------------------------------------------------------------------ blocks


def test_blocks_hold_nearly_all_parameters_and_are_called_once_with_tensors(full):
    assert sum(size(block) for block in full.blocks()) >= 0.95 * size(full)
    unet, calls = LVDMUNet(**TINY), []
    for block in unet.blocks():
        block.register_forward_pre_hook(lambda module, args: calls.append((module, args)))
    unet(noise(1, 4, 4, 8, 8), torch.tensor(3))
    assert [module for module, _ in calls] == unet.blocks()
    assert all(isinstance(x, torch.Tensor) for _, args in calls for x in args)


# ------------------------------------------------------------------------------------------------------------- start


def test_timestep_embedding_is_cosines_then_sines():
    expected = [0.765414, -0.848100, 0.932327, 0.999316, -0.643538, -0.529836, 0.361615, 0.036992]
    assert sinusoids(torch.tensor([37]), 8)[0].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("frames", [1, 2, 4, 7])
def test_a_fresh_unet_outputs_exactly_zero_for_any_number_of_frames(frames):
    y = LVDMUNet(**TINY)(noise(2, 4, frames, 8, 4), torch.tensor([0, 999]))
    assert y.shape == (2, 4, frames, 8, 4)
    assert not y.any()


# name, mean and deviation of the values drawn; kernels are uniform in +-1/sqrt(fan-in), that is 1/sqrt(3 fan-in)
START = [
    (r"time_embed\.0\.weight", 0.0, (3 * 256) ** -0.5),
    (r"input_blocks\.0\.0\.weight", 0.0, (3 * 4 * 9) ** -0.5),
    (r"\.in_layers\.2\.weight$", 0.0, (3 * 256 * 9) ** -0.5),
    (r"\.emb_layers\.1\.weight$", 0.0, (3 * 1024) ** -0.5),
    (r"\.qkv_[st]\.weight$", 0.0, (3 * 256) ** -0.5),
    (r"\.(op|conv)\.weight$", 0.0, (3 * 256 * 9) ** -0.5),
    (r"embeddings_table$", 0.0, (2 / (9 + 64)) ** 0.5),
    (r"(\.out_layers\.3|proj_out_[st]|^out\.2)\.(weight|bias)$", 0.0, 0.0),
    (r"(norm_[st]|(in|out)_layers\.0|^out\.0)\.weight$", 1.0, 0.0),
    (r"(norm_[st]|(in|out)_layers\.0|^out\.0)\.bias$", 0.0, 0.0),
]


@pytest.mark.parametrize(("pattern", "mean", "deviation"), START)
def test_initialisation_is_the_table_of_names_and_deviations(fresh, pattern, mean, deviation):
    found = {n: p for n, p in fresh.named_parameters() if re.search(pattern, n) and "output_blocks" not in n}
    assert found
    for name, parameter in found.items():
        assert parameter.std().item() == pytest.approx(deviation, rel=0.15), name
        assert parameter.mean().item() == pytest.approx(mean, abs=0.05), name


@pytest.fixture(scope="module")
def fresh():
    torch.manual_seed(0)
    return LVDMUNet(channel_mult=(1, 1), num_res_blocks=1, attention_resolutions=(1,))


def test_every_parameter_gets_a_gradient_once_the_zeroed_layers_have_left_zero():
    unet = _awake()
    unet(noise(2, 4, 4, 8, 8), torch.tensor([5, 900])).square().sum().backward()
    assert [name for name, p in unet.named_parameters() if p.grad is None or not p.grad.any()] == []


# ----------------------------------------------------------------------------------------------------------- options


@torch.no_grad()
def test_a_timestep_without_dimensions_counts_for_the_whole_batch():
    unet, x = _awake(), noise(2, 4, 4, 8, 8)
    expected = unet(x, torch.tensor([37, 37]))
    assert torch.equal(unet(x, torch.tensor(37)), expected)
    assert torch.equal(unet(x, torch.tensor([37.0, 37.0])), expected)
    assert (unet(x, torch.tensor([37, 38])) - expected)[1].any()


@torch.no_grad()
def test_a_sample_does_not_depend_on_its_batch():
    unet, x = _awake(), noise(3, 4, 4, 8, 8)
    t = torch.tensor([1, 500, 999])
    alone = torch.cat([unet(x[i : i + 1], t[i : i + 1]) for i in range(3)])
    assert_close(unet(x, t), alone, rtol=0.0, atol=1e-4)


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
    unet, x = _awake(**options), noise(1, 4, 4, 8, 8)
    order = [2, 0, 3, 1]
    moved = unet(x[:, :, order], torch.tensor(9))
    assert torch.allclose(moved, unet(x, torch.tensor(9))[:, :, order], atol=1e-3) is same


def test_frame_positions_have_no_parameters():
    assert LVDMUNet(**TINY, frame_positions=True).state_dict().keys() == LVDMUNet(**TINY).state_dict().keys()


@torch.no_grad()
def test_the_time_embedding_may_be_added_instead_of_scaling_and_shifting():
    unet = _awake(use_scale_shift_norm=False)
    assert unet.input_blocks[1][0].emb_layers[1].weight.shape == (32, 128)
    x = noise(1, 4, 4, 8, 8)
    # with 32 groups over 32 channels what is added in front of the norm cancels: look at the wider level
    assert not torch.allclose(unet(x, torch.tensor(3)), unet(x, torch.tensor(900)), atol=1e-3)


def test_dropout_acts_in_training_only():
    unet, x = _awake(dropout=0.5), noise(1, 4, 4, 8, 8)
    assert torch.equal(unet(x, torch.tensor(3)), unet(x, torch.tensor(3)))
    unet.train()
    assert not torch.equal(unet(x, torch.tensor(3)), unet(x, torch.tensor(3)))


def test_sizes_that_do_not_halve_are_refused_with_the_multiple():
    with pytest.raises(UserError, match="H and W multiples of 2"):
        LVDMUNet(**TINY)(noise(1, 4, 4, 7, 8), torch.tensor(0))


# ------------------------------------------------------------------------------------------------------------ dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_nearly_the_same_output_and_finite_gradients(dtype):
    unet, x = _awake(), noise(2, 4, 4, 8, 8)
    expected = unet(x, torch.tensor([3, 700])).detach()
    with torch.autocast("cpu", dtype):
        y = unet(x, torch.tensor([3, 700]))
    assert y.dtype == torch.float32
    assert (y - expected).abs().mean() < 0.05 * expected.abs().mean()
    y.square().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in unet.parameters())


def test_parameters_may_have_any_dtype():
    unet, x = _awake(), noise(1, 4, 4, 8, 8)
    expected = unet(x, torch.tensor(3)).detach()
    y = unet.to(torch.bfloat16)(x, torch.tensor(3))
    assert y.dtype == x.dtype
    assert (y - expected).abs().mean() < 0.05 * expected.abs().mean()


@pytest.mark.parametrize("norm", [GroupNorm, PixelNorm])
def test_group_norms_compute_in_float32_in_half_precision(norm):
    """Around a mean of 300, float16 squares overflow and bfloat16 loses all of a deviation of 1."""
    x = (300 + noise(2, 8, 4, 16)).half()
    y = norm(4, 8).half()(x)
    assert y.dtype == torch.float16
    assert_close(y.float(), norm(4, 8)(x.float()), rtol=2e-3, atol=2e-3)


def test_the_norm_over_frames_is_a_group_norm_of_every_pixel():
    norm, x = PixelNorm(4, 8), noise(2, 8, 3, 5)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    pixels = x.permute(0, 3, 1, 2).flatten(0, 1)  # (B P, C, T)
    expected = torch.nn.functional.group_norm(pixels, 4, norm.weight, norm.bias, norm.eps)
    assert_close(norm(x), expected.unflatten(0, (2, 5)).permute(0, 2, 3, 1))


# -------------------------------------------------------------------------------------------------------------- disk


def _as_json(value):
    return list(value) if isinstance(value, tuple) else value


def test_a_saved_unet_comes_back_with_its_config_and_every_bit(tmp_path):
    unet = _awake(frame_positions=True)
    unet.save_pretrained(tmp_path)
    again = LVDMUNet.from_pretrained(tmp_path)
    assert all(getattr(again.config, name) == _as_json(value) for name, value in unet.config.items() if name[0] != "_")
    assert all(torch.equal(a, b) for a, b in zip(unet.state_dict().values(), again.state_dict().values(), strict=True))
    x = noise(1, 4, 4, 8, 8)
    assert torch.equal(again(x, torch.tensor(3)), unet(x, torch.tensor(3)))

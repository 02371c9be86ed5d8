"""LoRA on motion modules: which layers, at what scale, what learns, and dropout that belongs to the sample."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNetMotionModel
from safetensors import safe_open
from torch.testing import assert_close

from core.blocks import prepare_blocks
from core.errors import UserError
from core.models.motion_unet import SampleDropout, Samples
from core.models.partly import exported, kept, learnt
from core.slots import Loop, LoRA, MotionUNet
from core.weights.start import load_learnt
from tests.models.test_motion_unet import TINY, _gradients, _inputs, _meta, _random, _System


@pytest.mark.parametrize(
    ("lora", "layers", "parameters"),
    [
        (LoRA(targets="all"), 252, 5_135_360),
        (LoRA(targets="transformer"), 210, 4_531_200),
        (LoRA(targets="attention"), 168, 2_416_640),
        (LoRA(rank=64, targets="attention"), 168, 19_333_120),
    ],
)
def test_the_layers_of_each_preset_are_those_of_the_published_networks(lora, layers, parameters):
    own = learnt(_meta(MotionUNet(lora=lora)))
    assert (len(own), sum(p.numel() for p in own.values())) == (2 * layers, parameters)
    assert all("motion_modules" in name and ".lora_" in name for name in own)


def test_the_regex_says_where_for_example_spatial_attention_as_in_the_domain_adapter():
    slot = MotionUNet(trainable_modules=r".*attentions\..*", lora=LoRA(rank=128, targets="attention"))
    own = learnt(_meta(slot))
    assert (len(own) // 2, sum(p.numel() for p in own.values())) == (128, 25_509_888)
    with pytest.raises(UserError, match=r"'conv_in.*' with LoRA targets 'attention': no linear layer"):
        TINY.but(trainable_modules="conv_in.*", lora=LoRA(targets="attention")).build()
    with pytest.raises(UserError, match="trainable_modules 'nothing' matches no parameter"):
        TINY.but(trainable_modules="nothing", lora=LoRA()).build()


def test_a_fresh_lora_changes_nothing_and_a_step_moves_its_tensors_alone():
    plain, unet = _random(TINY), TINY.but(lora=LoRA(targets="all")).build()
    names = {name: name.replace(".base_layer.", ".") for name in unet.state_dict() if ".lora_" not in name}
    unet.load_state_dict({name: plain.state_dict()[theirs] for name, theirs in names.items()}, strict=False)
    x, t, text = _inputs()
    with torch.no_grad():
        assert torch.equal(unet.eval()(x, t, text), plain(x, t, text))
    layer = unet.down_blocks[0].motion_modules[0].transformer_blocks[0].attn1.to_q
    assert layer.scaling["default"] == 4.0
    before = {name: p.clone() for name, p in unet.state_dict().items()}
    optimizer = torch.optim.AdamW(learnt(unet).values(), lr=1e-2, weight_decay=0.0)
    _, gradients = _gradients(unet)
    assert gradients.keys() == learnt(unet).keys()
    optimizer.step()
    changed = {name for name, p in unet.state_dict().items() if not torch.equal(p, before[name])}
    assert changed == {name for name in learnt(unet) if ".lora_B." in name}  # A has no gradient while B is zero
    assert kept(unet).keys() == learnt(unet).keys()


def test_projections_need_the_hook_because_diffusers_calls_them_by_keyword():
    unet = TINY.but(lora=LoRA(targets="all", dropout=0.0)).build()
    x, t, text = _inputs()
    unet(x, t, text)
    hooked = [module for module in unet.modules() if module._forward_pre_hooks]
    assert len(hooked) == 2 * 7
    for module in hooked:
        module._forward_pre_hooks.clear()
    with pytest.raises(TypeError, match="'x'"):
        unet(x, t, text)


def _masks(keys, rows=2, name="a.layer"):
    samples = Samples()
    samples.keys = keys
    return SampleDropout(0.25, name, samples)(torch.ones(rows * len(keys), 3, 50))


def test_masks_of_dropout_belong_to_the_sample_and_the_layer_not_to_the_batch_or_the_rank():
    whole = _masks([11, 12, 13, 14])
    assert torch.equal(whole[4:], _masks([13, 14])) and torch.equal(whole[:2], _masks([11]))
    assert not torch.equal(whole[:2], whole[2:4]) and not torch.equal(whole, _masks([11, 12, 13, 14], name="another"))
    assert whole.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert (whole == 0).float().mean().item() == pytest.approx(0.25, abs=0.05)
    layer = SampleDropout(0.25, "a", Samples()).eval()
    assert torch.equal(layer(whole), whole)


def _with_dropout(keys):
    torch.manual_seed(0)
    unet = TINY.but(lora=LoRA(dropout=0.5)).build().train()
    noise = torch.Generator().manual_seed(3)
    for parameter in unet.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=noise))
    unet.samples.keys = keys
    return unet


def test_dropout_is_the_same_in_a_micro_batch_of_one_and_under_checkpointing():
    x, t, text = _inputs()
    unet = _with_dropout([5, 6])
    loss, expected = _gradients(unet)
    with torch.no_grad():
        together = unet(x, t, text)
        unet.samples.keys = [6]
        assert_close(unet(x[1:], t[1:], text[1:]), together[1:], rtol=0, atol=1e-5)
        assert (unet.eval()(x, t, text) - together).abs().max() > 1e-3
    less = _with_dropout([5, 6])
    prepare_blocks(_System(less), Loop(max_steps=1, activation_checkpointing=True))
    same, found = _gradients(less)
    assert same == loss and all(torch.equal(found[name], expected[name]) for name in expected)


@torch.no_grad()
def test_what_is_written_keeps_alpha_opens_in_stock_diffusers_and_comes_back(tmp_path: Path):
    unet = _with_dropout([1, 2]).eval()
    x, t, text = _inputs()
    expected = unet(x, t, text)
    unet.write(tmp_path, exported(unet))
    path = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    about = safe_open(path, "pt").metadata()["lora_adapter_metadata"]
    assert {key: json.loads(about)[f"unet.{key}"] for key in ("r", "lora_alpha")} == {"r": 8, "lora_alpha": 32.0}
    stock = TINY.build()
    state = {name.replace(".base_layer.", "."): p for name, p in unet.state_dict().items() if ".lora_" not in name}
    stock.load_state_dict(state)
    again = TINY.but(lora=LoRA()).build().eval()
    load_learnt(again, str(tmp_path / "lora"), "unet")
    assert all(torch.equal(p, learnt(again)[name]) for name, p in learnt(unet).items())
    stock.load_lora_adapter(tmp_path / "lora", prefix="unet", weight_name=path.name)
    got = UNetMotionModel.forward(stock.eval(), x, t, text.repeat_interleave(5, dim=0)).sample
    assert_close(got, expected, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match=r"does not fit MotionUNet \(140 tensors\): 140 misshapen"):
        load_learnt(TINY.but(lora=LoRA(rank=4)).build(), str(tmp_path / "lora"), "unet")


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}])
def test_a_lora_that_cannot_be_is_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        LoRA(**wrong)

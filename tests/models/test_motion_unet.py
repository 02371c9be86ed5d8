"""AnimateDiff's UNet: published sizes, what stock diffusers leaves to its caller, and training a part of it only."""

import pytest
import torch
from diffusers import UNet2DConditionModel, UNetMotionModel
from torch.testing import assert_close

import core.attention
import core.sampling
from core.blocks import prepare_blocks
from core.build import parameter_groups
from core.checkpoint import tensors
from core.deferred import recording
from core.ema import EMA
from core.errors import UserError
from core.fresh import Fresh
from core.models.partly import learnt, unlearnt
from core.plan import plan
from core.slots import EMA as EMASlot
from core.slots import Loop, MotionModules, MotionUNet, StableDiffusionUNet, StockDDIM
from registry import get

SIZES = {"block_out_channels": (16, 32), "layers_per_block": 1, "num_heads": 4, "context_dim": 16, "norm_num_groups": 4}
MOTION = MotionModules(num_heads=4, max_length=8)
TINY = MotionUNet(motion=MOTION, **SIZES)
VECTORS = 396_480


def _meta(slot):
    with torch.device("meta"):
        return slot.build()


def _random(slot, seed=0):
    """The network with every parameter drawn anew, also those that begin at zero."""
    torch.manual_seed(seed)
    unet = slot.build().eval()
    noise = torch.Generator().manual_seed(seed)
    for parameter in unet.parameters():
        values = torch.randn(parameter.shape, generator=noise) / max(parameter[0].numel(), 16) ** 0.5
        parameter.data.copy_(values + (parameter.data if parameter.dim() == 1 else 0))
    return unet


def _inputs(frames=5, clips=2):
    noise = torch.Generator().manual_seed(1)
    x, text = torch.randn(clips, 4, frames, 8, 8, generator=noise), torch.randn(clips, 6, 16, generator=noise)
    return x, torch.tensor([3, 900])[:clips], text


def test_the_networks_have_the_published_sizes():
    unet = _meta(MotionUNet())
    own, rest = learnt(unet), unlearnt(unet)
    assert sum(p.numel() for p in unet.parameters()) == 1_312_730_244 and len(unet.state_dict()) == 1253
    assert (len(own), sum(p.numel() for p in own.values())) == (546, 453_209_280)
    assert (len(rest), sum(p.numel() for p in rest.values())) == (686, 859_520_964)
    assert next(iter(own)) == "down_blocks.0.motion_modules.0.norm.weight"
    assert sum(p.numel() for p in own.values() if p.dim() == 1) == VECTORS
    sides = {side: sum(p.numel() for n, p in own.items() if n.startswith(side)) for side in ("down", "mid", "up")}
    assert sides == {"down": 166_855_040, "mid": 36_071_680, "up": 250_282_560}
    adapter = unet.adapter()
    assert len(adapter.state_dict()) == 567 and set(own) == {name for name, _ in adapter.named_parameters()}
    image = _meta(StableDiffusionUNet())
    assert {n: p.shape for n, p in rest.items()} == {n: p.shape for n, p in image.named_parameters()}
    without = _meta(MotionUNet(motion=MotionModules(mid_block=False)))
    assert sum(p.numel() for p in learnt(without).values()) == 417_137_600


def test_the_plan_of_the_full_recipe_tells_what_learns_from_what_is_frozen():
    rows = {row.name: (row.parameters, row.tensors, row.trained) for row in plan(get("animatediff-full")).modules}
    assert rows == {
        "unet": (453_209_280, 546, True),
        "unet, rest": (859_520_964, 686, False),
        "vae": (83_653_863, 248, False),
        "text_encoder": (123_060_480, 196, False),
    }


@torch.no_grad()
def test_fresh_motion_modules_change_nothing_frame_by_frame():
    image, motion = _random(StableDiffusionUNet(**SIZES)), TINY.build().eval()
    motion.load_state_dict(image.state_dict(), strict=False)
    x, t, text = _inputs()
    y = motion(x, t, text)
    assert y.abs().max() > 0.1
    assert_close(y, image(x, t, text), rtol=0, atol=1e-5)
    for i in range(x.shape[2]):
        assert_close(y[:, :, i], UNet2DConditionModel.forward(image, x[:, :, i], t, text).sample, rtol=0, atol=1e-5)
    ends = {n: p for n, p in motion.named_parameters() if "motion_modules" in n and ".proj_out." in n}
    assert len(ends) == 2 * 7 and not any(p.any() for p in ends.values())


@torch.no_grad()
def test_the_stock_forward_wants_the_text_once_a_frame_and_gets_it_clip_by_clip():
    unet = _random(TINY)
    x, t, text = _inputs()
    stock = UNetMotionModel.forward(unet, x, t, text.repeat_interleave(5, dim=0)).sample
    assert_close(unet(x, t, text), stock, rtol=0, atol=0)
    with pytest.raises(RuntimeError):
        UNetMotionModel.forward(unet, x, t, text)
    alone = torch.cat([unet(x[i : i + 1], t[i : i + 1], text[i : i + 1]) for i in range(2)])
    assert_close(unet(x, t, text), alone, rtol=0, atol=2e-5)


@torch.no_grad()
def test_the_order_of_the_frames_matters_through_their_positions_alone():
    unet = _random(TINY)
    x, t, text = _inputs()
    order = torch.tensor([3, 0, 4, 1, 2])
    moved = unet(x[:, :, order], t, text)
    assert (moved - unet(x, t, text)[:, :, order]).abs().max() > 1e-3
    for name, table in unet.named_buffers():
        assert name.endswith("pos_embed.pe") and table.shape[1] == 8
        table.zero_()
    assert_close(unet(x[:, :, order], t, text), unet(x, t, text)[:, :, order], rtol=0, atol=2e-5)


@torch.no_grad()
def test_as_many_frames_as_there_are_positions_and_no_more():
    unet = TINY.build()
    x, t, text = _inputs(frames=8)
    assert unet(x, t, text).shape == x.shape
    with pytest.raises(UserError, match="a clip of 9 frames: the motion modules have positions for 8"):
        unet(*_inputs(frames=9))
    with pytest.raises(UserError, match=r"data.num_frames = 33: the motion modules have positions for 32 frames; take"):
        get("animatediff-full --num-frames 33")
    assert get("animatediff-full --num-frames 32").data.num_frames == 32


@torch.no_grad()
def test_temporal_attention_over_more_pixels_than_cuda_takes_is_split(monkeypatch):
    unet, batches = _random(TINY), []
    x, t, text = _inputs()
    whole = unet(x, t, text)
    kernel = core.attention.BACKENDS["sdpa"]
    monkeypatch.setattr(core.attention, "MAX_BATCH_HEADS", 100)
    monkeypatch.setitem(core.attention.BACKENDS, "sdpa", lambda *qkv: batches.append(qkv[0].shape[:2]) or kernel(*qkv))
    assert_close(unet(x, t, text), whole, rtol=0, atol=1e-5)
    assert len(batches) > 2 * 7 and max(pixels * heads for pixels, heads in batches) == 100


def _gradients(unet):
    x, t, text = _inputs()
    loss = unet(x, t, text).square().mean()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in unet.named_parameters() if p.grad is not None}


class _System:
    def __init__(self, unet):
        self.unet = unet

    def blocks(self):
        return self.unet.blocks()


def test_checkpointing_covers_every_motion_module_and_gradients_are_bit_equal():
    plain, less = _random(TINY), _random(TINY)
    prepare_blocks(_System(less), Loop(max_steps=1, activation_checkpointing=True))
    calls = {name: 0 for name, m in less.named_modules() if type(m).__name__ == "AnimateDiffTransformer3D"}
    for name in calls:
        less.get_submodule(name).proj_in.register_forward_pre_hook(
            lambda *_, name=name: calls.update({name: calls[name] + 1})
        )
    (loss, expected), (same, found) = _gradients(plain), _gradients(less)
    assert len(calls) == 7 and set(calls.values()) == {2}  # once more in the backward pass
    assert loss == same and found.keys() == expected.keys() == set(learnt(plain))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# ---------------------------------------------------------------------------------------------------------- a part only


def test_only_what_learns_is_in_optimizer_average_and_checkpoint():
    unet = _random(TINY)
    trained = torch.nn.ModuleDict({"unet": unet})
    recipe = get("animatediff-full-tiny")
    optimizer = recipe.optim.build(parameter_groups(trained, recipe.optim), fused=False)
    ema = EMA(EMASlot(decay=0.5), trained)
    before = {name: p.clone() for name, p in unet.state_dict().items()}
    _gradients(unet)
    optimizer.step()
    ema.update()
    changed = {name for name, p in unet.state_dict().items() if not torch.equal(p, before[name])}
    own = set(learnt(unet))
    assert changed == own and {f"unet.{name}" for name in own} == set(ema.average)
    held = tensors(trained, optimizer, ema)
    kinds = ("weights", "ema", "optimizer.exp_avg", "optimizer.exp_avg_sq")
    assert set(held) == {f"{kind}.unet.{name}" for kind in kinds for name in own}


def test_a_regex_that_matches_nothing_is_one_line_with_names_as_they_are():
    with pytest.raises(
        UserError, match=r"trainable_modules 'motion_modules' matches no parameter of MotionUNet; .*conv_in"
    ):
        TINY.but(trainable_modules="motion_modules").build()
    with pytest.raises(UserError, match=r"trainable_modules = '\('.*no regular expression"):
        TINY.but(trainable_modules="(")
    part = TINY.but(trainable_modules=r".*motion_modules.*attn1.*").build()
    assert len(learnt(part)) == 7 * 5 and part.written_as == "motion_adapter"
    whole = TINY.but(trainable_modules=".*").build()
    assert not unlearnt(whole) and whole.written_as == "unet"


def test_a_network_that_is_made_tensor_by_tensor_is_frozen_and_zeroed_as_one_that_is_built():
    with recording() as tape:
        unet = TINY.build()
    Fresh(tape, unet).fill(unet, 0, torch.device("cpu"))
    assert set(learnt(unet)) == set(learnt(TINY.build()))
    x, t, text = _inputs()
    assert not unet(x, t, text).any()
    assert_close(
        unet.down_blocks[0].motion_modules[0].transformer_blocks[0].pos_embed.pe[0, 0, :4],
        torch.tensor([0.0, 1.0, 0.0, 1.0]),
    )


@pytest.mark.parametrize(
    ("wrong", "why"),
    [({"num_heads": 3}, "num_heads"), ({"max_length": 0}, "max_length"), ({"num_layers": 0}, "num_layers")],
)
def test_motion_modules_that_cannot_be_built_are_refused(wrong, why):
    with pytest.raises(UserError, match=why):
        TINY.but(motion=MOTION.but(**wrong))


# ------------------------------------------------------------------------------------------------------------- sampling


def test_the_schedule_is_the_linear_one_and_sampling_starts_where_the_original_does():
    recipe = get("animatediff-full")
    scheduler = recipe.validation.sampler.build(recipe.system.objective)
    told = {0: 0.99915, 250: 0.568788, 500: 0.160772, 750: 0.0225192, 999: 0.00157896}
    assert {t: pytest.approx(v, rel=1e-5) for t, v in told.items()} == {
        t: float(scheduler.alphas_cumprod[t]) for t in told
    }
    assert scheduler.final_alpha_cumprod == 1.0 and not scheduler.config.clip_sample
    for spacing, first, last in (("leading", [961, 921], 1), ("linspace", [999, 957], 0), ("trailing", [999, 959], 39)):
        slot = StockDDIM(num_inference_steps=25, timestep_spacing=spacing)
        scheduler = slot.build(recipe.system.objective)
        core.sampling.start(scheduler, 25)
        assert (scheduler.timesteps[:2].tolist(), int(scheduler.timesteps[-1])) == (first, last)

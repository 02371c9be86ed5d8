"""FreeInit and FreeNoise: held against diffusers' own."""

import pytest
import torch
from diffusers.pipelines.free_init_utils import FreeInitMixin
from diffusers.pipelines.free_noise_utils import AnimateDiffFreeNoiseMixin

from core.errors import UserError
from core.free_init import low_pass, mixed, rounds
from core.objective import NoiseSchedule
from core.sampling import ddim, shuffled
from core.slots import FreeInit, FreeNoise, SlotError
from registry import get

SHAPE = (2, 3, 6, 4, 8)
"""Even sizes: diffusers' filter is half a frequency off the middle of odd ones."""


class Stock(FreeInitMixin):
    """Of the pipeline only what FreeInit asks for."""

    def __init__(self, slot, scheduler):
        self.scheduler = scheduler
        self.enable_free_init(
            slot.num_iters,
            slot.fast,
            slot.method,
            slot.order,
            slot.spatial_stop_frequency,
            slot.temporal_stop_frequency,
        )

    def again(self, x, i, seed):
        noise, timesteps = self._apply_free_init(x, i, 8, "cpu", x.dtype, torch.Generator().manual_seed(seed))
        return noise, len(timesteps)


@pytest.mark.parametrize(
    "slot",
    [
        FreeInit(),
        FreeInit(method="gaussian", temporal_stop_frequency=0.5, num_iters=2),
        FreeInit(method="ideal", spatial_stop_frequency=0.5, fast=True),
    ],
    ids=lambda slot: slot.method,
)
def test_free_init_begins_each_round_with_the_noise_and_steps_of_diffusers(slot):
    stock = Stock(slot, ddim(0.00085, 0.012, "linear"))
    schedule = NoiseSchedule(0.00085, 0.012, "linear")
    last = torch.full((2,), 999)
    seen = []

    def sample(i, noise):
        seen.append(noise)
        return 0.3 * noise.roll(1, 2) + i

    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    rounds(
        slot,
        noise,
        lambda i: torch.randn(SHAPE, generator=torch.Generator().manual_seed(i)),
        sample,
        lambda x, noise: schedule.add_noise(x, noise, last),
    )
    assert len(seen) == slot.num_iters
    x = noise
    for i, mine in enumerate(seen.copy()):
        theirs, steps = stock.again(x, i, seed=i)
        assert torch.allclose(mine, theirs, atol=1e-5) and steps == slot.steps(i, 8)
        x = sample(i, theirs)


def test_the_filter_keeps_what_does_not_change_and_drops_the_finest_pattern():
    keep = low_pass(FreeInit(), (5, 4, 7))
    assert keep.shape == (5, 4, 7) and keep[2, 2, 3] == 1 and keep.min() < 1e-3
    still, none = torch.ones(1, 1, 5, 4, 7), torch.zeros(1, 1, 5, 4, 7)
    assert torch.allclose(mixed(still, none, keep), still, atol=1e-6)
    assert torch.allclose(mixed(none, still, keep), none, atol=1e-6)


def motion_unet():
    torch.manual_seed(0)
    unet = get("animatediff-full-tiny").system.denoiser.build().eval()
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return unet


class Windows(AnimateDiffFreeNoiseMixin):
    """Of the pipeline only what FreeNoise asks for."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, slot):
        self._free_noise_context_length = slot.context_length
        self._free_noise_context_stride = slot.context_stride
        self._free_noise_weighting_scheme = slot.weighting
        self._free_noise_noise_type = "shuffle_context"
        self.vae_scale_factor = 1


@pytest.mark.parametrize(
    "slot",
    [FreeNoise(context_length=4, context_stride=2), FreeNoise(context_length=6, context_stride=3, weighting="flat")],
)
def test_windows_of_frames_give_what_diffusers_gives_and_leave_the_network_as_it_was(slot):
    unet, text, t = motion_unet(), torch.randn(1, 5, 64), torch.tensor([500])
    short, long = torch.randn(1, 4, 8, 8, 8), torch.randn(1, 4, 13, 8, 8)
    with pytest.raises(UserError, match=r"a clip of 13 frames.* for 8; in windows.*--sampler.free-noise=FreeNoise"):
        unet(long, t, text)
    with torch.no_grad():
        before = unet(short, t, text)
        with unet.windowed(slot):
            mine = unet(long, t, text)
        assert torch.equal(unet(short, t, text), before)
        stock = Windows(slot)
        for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
            stock._enable_free_noise_in_block(block)
        unet.window = slot.context_length
        theirs = unet(long, t, text)
    assert torch.allclose(mine, theirs, atol=1e-5) and mine.shape == long.shape


def test_later_frames_have_the_noise_of_earlier_ones_in_the_order_of_diffusers():
    slot = FreeNoise(context_length=8, context_stride=4)
    ours, theirs = (torch.Generator().manual_seed(3) for _ in range(2))
    noise = torch.randn(1, 3, 18, 2, 2, generator=ours)
    mine = shuffled(noise, slot, [ours])
    stock = Windows(slot)._prepare_latents_free_noise(1, 3, 18, 2, 2, torch.float32, torch.device("cpu"), theirs)
    assert torch.equal(mine, stock) and not torch.equal(mine, noise)
    assert torch.equal(mine[:, :, :8], noise[:, :, :8])
    assert torch.allclose(mine[:, :, 8:12].sum(2), noise[:, :, :4].sum(2), atol=1e-5)


def test_settings_that_mean_nothing_are_refused():
    for bad in (
        lambda: FreeInit(num_iters=0),
        lambda: FreeInit(temporal_stop_frequency=0.0),
        lambda: FreeNoise(context_length=1),
        lambda: FreeNoise(context_length=4, context_stride=5),
    ):
        with pytest.raises(SlotError):
            bad()

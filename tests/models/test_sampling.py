"""Sampling: the timesteps and noise of DDIM, and that a clip depends on nothing but its own noise."""

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler
from torch.testing import assert_close

from core.errors import UserError
from core.objective import NoiseSchedule
from core.sampling import ddim, guided, sample

SKY, T2V = (0.0015, 0.0155), (0.00085, 0.012)


def _noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _oracle(x0, ends=SKY):
    """A denoiser that knows the clean sample."""
    schedule = NoiseSchedule(*ends)
    return lambda x_t, t: schedule.to_x0_and_epsilon(x0.expand_as(x_t), x_t, t.round().long(), "sample")[1]


@pytest.mark.parametrize(("steps", "first", "last"), [(50, [981, 961], [21, 1]), (200, [996, 991], [6, 1])])
def test_timesteps_are_one_plus_multiples(steps, first, last):
    seen = []
    sample(lambda x, t: (seen.append(t.tolist()), x)[1], _noise(2, 3), ddim(*SKY), num_inference_steps=steps)
    assert seen[:2] + seen[-2:] == [[t, t] for t in first + last]


@pytest.mark.parametrize(("ends", "first", "last"), [(SKY, 0.509461, 0.027427), (T2V, 0.454463, 0.020648)])
def test_eta_one_adds_the_published_noise(ends, first, last):
    """From zero, and with a network that answers zero, all there is after a step is its noise."""
    for step, sigma in ((0, first), (49, last)):
        seen = []
        sample(
            lambda x, t: torch.zeros_like(x),
            torch.zeros(1, 2),
            ddim(*ends),
            num_inference_steps=50,
            eta=1.0,
            step_noise=lambda i, shape, step=step: torch.full(shape, float(i == step)),
            on_step=lambda i, x, seen=seen: seen.append(x),
        )
        assert seen[step].flatten().tolist() == pytest.approx([sigma, sigma], abs=1e-6)


@pytest.mark.parametrize("scheduler", [ddim, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_a_network_that_knows_the_answer_is_led_to_it_by_any_scheduler(scheduler):
    x0 = _noise(2, 3, 2, 4, 4).clamp(-1, 1)
    made = scheduler(beta_start=SKY[0], beta_end=SKY[1], beta_schedule="scaled_linear")
    x = sample(_oracle(x0), _noise(2, 3, 2, 4, 4, seed=1), made, num_inference_steps=50)
    assert (x - x0).abs().mean() < 0.1


def _per_clip(ids):
    return lambda i, shape: torch.cat([_noise(1, *shape[1:], seed=1000 * clip + i) for clip in ids])


def test_a_clip_is_the_same_whatever_it_shares_a_batch_with():
    def run(ids):
        start = torch.cat([_noise(1, 3, 2, 4, 4, seed=clip) for clip in ids])
        return sample(
            lambda x, t: x.tanh() * (t / 1000).view(-1, 1, 1, 1, 1),
            start,
            ddim(*SKY),
            num_inference_steps=10,
            eta=1.0,
            step_noise=_per_clip(ids),
        )

    assert_close(run([5, 6, 7])[1:2], run([6]))
    assert not torch.equal(run([5]), run([6]))


def test_without_eta_no_noise_is_asked_for():
    def never(i, shape):
        raise AssertionError("noise was drawn")

    sample(lambda x, t: x, _noise(1, 2), ddim(*SKY), num_inference_steps=5, step_noise=never)


def test_guidance_goes_beyond_the_conditional_prediction():
    both = guided(lambda x, t: x + 3, lambda x, t: x + 1, 7.5)
    assert both(torch.zeros(2), torch.tensor(0)).tolist() == [16.0, 16.0]
    one = {"num_inference_steps": 5, "guidance_scale": 7.5, "unconditional": lambda x, t: 0.1 * x}
    x = sample(lambda x, t: 0.2 * x, _noise(1, 2), ddim(*SKY), **one)
    assert torch.equal(
        x, sample(lambda x, t: 0.1 * x + 7.5 * (0.2 * x - 0.1 * x), _noise(1, 2), ddim(*SKY), num_inference_steps=5)
    )


def test_guidance_without_an_unconditional_prediction_is_refused():
    with pytest.raises(UserError, match="guidance_scale 2"):
        sample(lambda x, t: x, _noise(1, 2), ddim(*SKY), num_inference_steps=5, guidance_scale=2.0)


def test_clamping_holds_the_clean_sample_in_range():
    free = sample(lambda x, t: -x, 9 * _noise(1, 8), ddim(*SKY), num_inference_steps=10)
    held = sample(
        lambda x, t: -x, 9 * _noise(1, 8), ddim(*SKY, clip_sample=True, clip_sample_range=1.5), num_inference_steps=10
    )
    assert free.abs().max() > 3
    assert held.abs().max() < 1.6


@pytest.mark.parametrize("steps", [0, 1000, 1001])
def test_step_counts_that_would_visit_an_unknown_timestep_are_refused(steps):
    with pytest.raises(UserError, match=f"num_inference_steps {steps}: expected 1 to 1000"):
        sample(lambda x, t: x, _noise(1, 2), ddim(*SKY), num_inference_steps=steps)


def test_eta_is_refused_where_the_scheduler_has_none():
    with pytest.raises(UserError, match="EulerDiscreteScheduler has no eta"):
        sample(lambda x, t: x, _noise(1, 2), EulerDiscreteScheduler(), num_inference_steps=5, eta=1.0)

"""Noise schedules, targets, losses and weights, against published figures and each other."""

import pytest
import torch
from diffusers import DDPMScheduler
from torch.testing import assert_close

from core.errors import UserError
from core.objective import LOSSES, NoiseSchedule

SKY, T2V = (0.0015, 0.0155), (0.00085, 0.012)
TYPES = ["epsilon", "v_prediction", "sample"]


def _batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x0, noise = (torch.randn(4, 2, 3, 4, 4, generator=generator) for _ in range(2))
    return x0, noise, torch.tensor([0, 250, 700, 999])


@pytest.mark.parametrize(
    ("ends", "betas", "total", "abar"),
    [
        (
            SKY,
            {0: 0.0015, 1: 0.00150666, 2: 0.00151333, 3: 0.00152002, 499: 0.006653908, 998: 0.01547863, 999: 0.0155},
            7.275169079,
            {
                0: 0.9985,
                1: 0.9969956,
                20: 0.96759317,
                249: 0.53742323,
                499: 0.15107742,
                980: 0.00089640545,
                999: 0.00066866517,
            },
        ),
        (
            T2V,
            {0: 0.00085, 1: 0.0008547, 2: 0.00085941, 3: 0.00086413, 499: 0.004803793, 998: 0.01198238, 999: 0.012},
            5.348992792,
            {
                0: 0.99915,
                1: 0.99829603,
                20: 0.98131436,
                249: 0.67543241,
                499: 0.27766965,
                980: 0.0058437833,
                999: 0.0046600985,
            },
        ),
    ],
)
def test_schedules_have_the_published_figures(ends, betas, total, abar):
    schedule = NoiseSchedule(*ends)
    assert {i: schedule.betas[i].item() for i in betas} == pytest.approx(betas, abs=5e-9, rel=1e-7)
    assert schedule.betas.sum().item() == pytest.approx(total, rel=1e-9)
    assert {i: schedule.alphas_cumprod[i].item() for i in abar} == pytest.approx(abar, rel=1e-7)


@pytest.mark.parametrize("kind", ["scaled_linear", "linear"])
def test_schedules_agree_with_diffusers(kind):
    schedule = NoiseSchedule(0.0001, 0.02, kind, num_train_timesteps=500)
    theirs = DDPMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule=kind, num_train_timesteps=500)
    assert len(schedule) == 500
    assert_close(schedule.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=1e-4, atol=0.0)
    x0, noise, _ = _batch()
    t = torch.tensor([0, 20, 300, 499])
    assert_close(schedule.add_noise(x0, noise, t), theirs.add_noise(x0, noise, t), rtol=1e-4, atol=1e-4)
    velocity = theirs.get_velocity(x0, noise, t)
    assert_close(schedule.target(x0, noise, t, "v_prediction"), velocity, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_a_perfect_prediction_stands_for_the_clean_sample_and_the_noise(prediction_type):
    schedule, (x0, noise, t) = NoiseSchedule(*SKY), _batch()
    x_t = schedule.add_noise(x0, noise, t)
    x0_again, noise_again = schedule.to_x0_and_epsilon(
        schedule.target(x0, noise, t, prediction_type), x_t, t, prediction_type
    )
    assert_close(x0_again, x0, rtol=0.0, atol=1e-4)
    assert_close(noise_again, noise, rtol=0.0, atol=1e-4)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_min_snr_weighs_every_prediction_type_as_the_same_error_of_the_clean_sample(prediction_type):
    schedule, (x0, noise, t) = NoiseSchedule(*SKY), _batch()
    x_t = schedule.add_noise(x0, noise, t)
    target = schedule.target(x0, noise, t, prediction_type)
    output = target + 0.1 * torch.randn(target.shape, generator=torch.Generator().manual_seed(3))
    weighted = schedule.min_snr_weight(t, prediction_type, gamma=5.0) * LOSSES["mse"](output, target)
    x0_error = LOSSES["mse"](schedule.to_x0_and_epsilon(output, x_t, t, prediction_type)[0], x0)
    assert_close(weighted, schedule.snr.float()[t].clamp(max=5.0) * x0_error, rtol=2e-2, atol=1e-8)


def test_losses_are_means_over_each_sample():
    output, target = torch.tensor([[3.0, 0.5], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    assert LOSSES["l1"](output, target).tolist() == [1.75, 0.5]
    assert LOSSES["mse"](output, target).tolist() == [4.625, 0.5]
    assert LOSSES["huber"](output, target).tolist() == [(2.5 + 0.125) / 2, 0.25]


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_are_float32_whatever_the_prediction_s_dtype(loss):
    assert LOSSES[loss](torch.zeros(2, 3, dtype=torch.bfloat16), torch.ones(2, 3)).dtype == torch.float32


def test_noised_samples_are_float32_and_on_the_device_of_the_samples():
    x0, noise, t = _batch()
    assert NoiseSchedule(*SKY).add_noise(x0.half(), noise.half(), t).dtype == torch.float32
    assert NoiseSchedule(*SKY).add_noise(x0.to("meta"), noise.to("meta"), t.to("meta")).device.type == "meta"


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"prediction_type 'eps': expected one of epsilon, v_prediction, sample"):
        NoiseSchedule(*SKY).target(*_batch(), "eps")
    with pytest.raises(UserError, match=r"did you mean 'linear'"):
        NoiseSchedule(*SKY, "liner")

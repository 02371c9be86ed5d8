"""Schedule, noising, loss and DDIM trajectories of the unconditional model against the original's numbers."""

import pytest
import torch
from torch.testing import assert_close

from core.objective import LOSSES, NoiseSchedule
from core.sampling import ddim, sample
from tests.parity.nets import short_unet
from tests.parity.recorded import OUTPUT, recorded

SKY = (0.0015, 0.0155)


@pytest.fixture(scope="module")
def case():
    return recorded("lvdm-ddim")


@pytest.fixture(scope="module")
def unet(case):
    return short_unet(recorded(case.config["weights_from"]["short"]))


def _trajectory_tolerance(trajectory):
    return {"rtol": 0.0, "atol": 5e-5 * trajectory.abs().max().item()}


def test_the_schedule_is_the_original_s(case):
    schedule = NoiseSchedule(*SKY)
    assert_close(schedule.betas.float(), case.outputs["short.schedule.betas"], rtol=1e-6, atol=0.0)
    assert_close(schedule.alphas_cumprod.float(), case.outputs["short.schedule.alphas_cumprod"], rtol=1e-6, atol=0.0)
    sigma = (1 - schedule.alphas_cumprod).sqrt().float()
    assert_close(sigma, case.outputs["short.schedule.sqrt_one_minus_alphas_cumprod"], rtol=1e-6, atol=0.0)


def test_noised_latents_and_both_losses_are_the_original_s(case, unet):
    x0, noise, t = (case.inputs[f"short.loss.{name}"] for name in ("x0", "noise", "t"))
    schedule = NoiseSchedule(*SKY)
    x_t = schedule.add_noise(x0, noise, t)
    assert_close(x_t, case.outputs["short.loss.x_noisy"], rtol=0.0, atol=1e-6)
    with torch.no_grad():
        output = unet(x_t, t)
    target = schedule.target(x0, noise, t, "epsilon")
    assert_close(LOSSES["l1"](output, target).mean(), case.outputs["short.loss.l1"][0], **OUTPUT)
    assert_close(LOSSES["mse"](output, target).mean(), case.outputs["short.loss.l2"][0], **OUTPUT)


def test_every_parameter_gets_the_gradient_norm_of_the_original(case, unet):
    x0, noise, t = (case.inputs[f"short.loss.{name}"] for name in ("x0", "noise", "t"))
    schedule = NoiseSchedule(*SKY)
    unet.zero_grad()
    LOSSES["l1"](unet(schedule.add_noise(x0, noise, t), t), noise).mean().backward()
    norms = {name: parameter.grad.norm().item() for name, parameter in unet.named_parameters()}
    expected = case.config["loss_grad_norms"]["short"]
    assert norms.keys() == expected.keys()
    assert norms == pytest.approx(expected, rel=1e-3, abs=1e-5)
    total = torch.tensor(list(norms.values())).norm()
    assert_close(total, case.outputs["short.loss.grad_total_norm"][0], rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_takes_the_steps_of_the_original(case, unet, eta):
    trajectory = case.outputs[f"short.ddim10.eta{eta:.0f}.x"]
    steps = [trajectory[0]]
    noise = case.inputs["short.step_noise"]
    end = sample(
        unet,
        case.inputs["short.x_T"],
        ddim(*SKY),
        num_inference_steps=10,
        eta=eta,
        step_noise=lambda i, shape: noise[i].reshape(shape),
        on_step=lambda i, x: steps.append(x),
    )
    assert_close(torch.stack(steps), trajectory, **_trajectory_tolerance(trajectory))
    assert torch.equal(end, steps[-1])


def test_the_predicted_clean_sample_is_the_original_s(case):
    x, predicted = case.outputs["short.ddim10.eta1.x"], case.outputs["short.ddim10.eta1.pred_x0"]
    times = case.outputs["short.ddim10.timesteps"].flip(0)
    schedule = NoiseSchedule(*SKY)
    for i, t in enumerate(times):
        at = t.expand(x.shape[1])
        x0, epsilon = schedule.to_x0_and_epsilon(case.outputs["short.ddim10.eta1.eps"][i], x[i], at, "epsilon")
        assert_close(x0, predicted[i], **_trajectory_tolerance(predicted))
        assert_close(schedule.add_noise(x0, epsilon, at), x[i], **_trajectory_tolerance(x))


def test_ten_steps_visit_the_timesteps_of_the_original(case):
    scheduler = ddim(*SKY)
    scheduler.set_timesteps(10)
    assert scheduler.timesteps.tolist() == case.outputs["short.ddim10.timesteps"].flip(0).tolist()

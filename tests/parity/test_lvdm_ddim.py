"""Schedule, noising, loss and DDIM trajectories of both denoisers against the original's numbers."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from core.objective import LOSSES, NoiseSchedule
from core.sampling import ddim, sample, told
from tests.parity.nets import short_unet, text_unet
from tests.parity.recorded import OUTPUT, Case, recorded

KINDS = {"short": ((0.0015, 0.0155), "l1", short_unet), "t2v": ((0.00085, 0.012), "mse", text_unet)}


@dataclass
class Trained:
    """One of the two systems of the recording; inputs and outputs by their names without the system's."""

    case: Case
    kind: str
    betas: tuple[float, float]
    loss: str
    unet: nn.Module

    def given(self, *names: str) -> list[Tensor]:
        return [self.case.inputs[f"{self.kind}.{name}"] for name in names]

    def said(self, name: str) -> Tensor:
        return self.case.outputs[f"{self.kind}.{name}"]

    def denoise(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.unet(x_t, t, *(self.given("context") if self.kind == "t2v" else ()))


@pytest.fixture(scope="module", params=KINDS)
def trained(request):
    case = recorded("lvdm-ddim")
    betas, loss, unet = KINDS[request.param]
    return Trained(case, request.param, betas, loss, unet(recorded(case.config["weights_from"][request.param])))


def _trajectory_tolerance(trajectory):
    return {"rtol": 0.0, "atol": 5e-5 * trajectory.abs().max().item()}


def test_the_schedule_is_the_original_s(trained):
    schedule = NoiseSchedule(*trained.betas)
    assert_close(schedule.betas.float(), trained.said("schedule.betas"), rtol=1e-6, atol=0.0)
    assert_close(schedule.alphas_cumprod.float(), trained.said("schedule.alphas_cumprod"), rtol=1e-6, atol=0.0)
    sigma = (1 - schedule.alphas_cumprod).sqrt().float()
    assert_close(sigma, trained.said("schedule.sqrt_one_minus_alphas_cumprod"), rtol=1e-6, atol=0.0)


def test_noised_latents_and_both_losses_are_the_original_s(trained):
    x0, noise, t = trained.given("loss.x0", "loss.noise", "loss.t")
    schedule = NoiseSchedule(*trained.betas)
    x_t = schedule.add_noise(x0, noise, t)
    assert_close(x_t, trained.said("loss.x_noisy"), rtol=0.0, atol=1e-6)
    with torch.no_grad():
        output = trained.denoise(x_t, t)
    target = schedule.target(x0, noise, t, "epsilon")
    assert_close(LOSSES["l1"](output, target).mean(), trained.said("loss.l1")[0], **OUTPUT)
    assert_close(LOSSES["mse"](output, target).mean(), trained.said("loss.l2")[0], **OUTPUT)


def test_every_parameter_gets_the_gradient_norm_of_the_original(trained):
    x0, noise, t = trained.given("loss.x0", "loss.noise", "loss.t")
    trained.unet.zero_grad()
    x_t = NoiseSchedule(*trained.betas).add_noise(x0, noise, t)
    LOSSES[trained.loss](trained.denoise(x_t, t), noise).mean().backward()
    norms = {name: parameter.grad.norm().item() for name, parameter in trained.unet.named_parameters()}
    expected = trained.case.config["loss_grad_norms"][trained.kind]
    assert norms.keys() == expected.keys()
    assert norms == pytest.approx(expected, rel=1e-3, abs=1e-5)
    total = torch.tensor(list(norms.values())).norm()
    assert_close(total, trained.said("loss.grad_total_norm")[0], rtol=1e-4, atol=0.0)


def _takes_the_recorded_steps(trained, denoise, eta, trajectory):
    steps, (noise, start) = [trajectory[0]], trained.given("step_noise", "x_T")
    end = sample(
        denoise,
        start,
        ddim(*trained.betas),
        num_inference_steps=10,
        eta=eta,
        step_noise=lambda i, shape: noise[i].reshape(shape),
        on_step=lambda i, x: steps.append(x),
    )
    assert_close(torch.stack(steps), trajectory, **_trajectory_tolerance(trajectory))
    assert torch.equal(end, steps[-1])


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_takes_the_steps_of_the_original(trained, eta):
    _takes_the_recorded_steps(trained, trained.denoise, eta, trained.said(f"ddim10.eta{eta:.0f}.x"))


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("trained", ["t2v"], indirect=True)
def test_guided_ddim_takes_the_steps_of_the_original(trained, eta):
    denoise = told(trained.unet, *trained.given("context", "uncond_context"), 7.5)
    _takes_the_recorded_steps(trained, denoise, eta, trained.said(f"ddim10.eta{eta:.0f}.cfg7.5.x"))


def test_the_predicted_clean_sample_is_the_original_s(trained):
    x, predicted = trained.said("ddim10.eta1.x"), trained.said("ddim10.eta1.pred_x0")
    times = trained.said("ddim10.timesteps").flip(0)
    schedule = NoiseSchedule(*trained.betas)
    for i, t in enumerate(times):
        at = t.expand(x.shape[1])
        x0, epsilon = schedule.to_x0_and_epsilon(trained.said("ddim10.eta1.eps")[i], x[i], at, "epsilon")
        assert_close(x0, predicted[i], **_trajectory_tolerance(predicted))
        assert_close(schedule.add_noise(x0, epsilon, at), x[i], **_trajectory_tolerance(x))


def test_ten_steps_visit_the_timesteps_of_the_original(trained):
    scheduler = ddim(*trained.betas)
    scheduler.set_timesteps(10)
    assert scheduler.timesteps.tolist() == trained.said("ddim10.timesteps").flip(0).tolist()

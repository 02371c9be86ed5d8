"""The objective of Open-Sora-Plan v1.3 and its flow against the original's numbers, with its network in the loop too."""

import pytest
import torch
from diffusers import DDPMScheduler
from torch.testing import assert_close

from core.draw import Draw
from core.errors import UserError
from core.models.opensora_dit import OpenSoraDiT
from core.objective import LOSSES, FlowSchedule, NoiseSchedule, schedule_of
from core.slots import DDIM, EulerAncestral, FlowMatchEuler, Objective, StockDDIM
from tests.parity.recorded import recorded

WITHIN = {"rtol": 5e-6, "atol": 5e-6}
OURS = Objective(
    prediction_type="v_prediction",
    beta_start=1e-4,
    beta_end=0.02,
    beta_schedule="linear",
    zero_terminal_snr=True,
    snr_gamma=5.0,
)
SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
VARIANTS = {
    "v_zsnr_snr5": OURS,
    "v_zsnr": OURS.but(snr_gamma=None),
    "v_snr5": OURS.but(zero_terminal_snr=False),
    "sd15_v_zsnr_snr5": OURS.but(**SD15),
    "eps": OURS.but(prediction_type="epsilon", zero_terminal_snr=False, snr_gamma=None),
    "eps_snr5_offset": OURS.but(prediction_type="epsilon", zero_terminal_snr=False, noise_offset=0.02),
    "flow_logit_normal": Objective(prediction_type="flow"),
}


@pytest.fixture(scope="module")
def case():
    return recorded("opensora-diffusion")


def _loss(objective, output, x0, noise, t):
    """Mean over everything, (noisy, target, mean loss)."""
    schedule = schedule_of(objective)
    target = schedule.target(x0, noise, t, objective.prediction_type)
    losses = LOSSES["mse"](output, target)
    if objective.snr_gamma is not None:
        losses = losses * schedule.min_snr_weight(t, objective.prediction_type, objective.snr_gamma)
    return schedule.add_noise(x0, noise, t), target, losses.mean()


@pytest.mark.parametrize("variant", VARIANTS)
def test_noise_target_loss_and_gradient_are_those_of_the_original(case, variant):
    objective, given = VARIANTS[variant], case.inputs
    expected = {n.removeprefix(f"{variant}."): t for n, t in case.outputs.items() if n.startswith(f"{variant}.")}
    t = FlowSchedule().times(given["u"]) if objective.prediction_type == "flow" else given["timestep"]
    noise = given["noise"] + objective.noise_offset * given["offset_noise"]
    output = given["prediction"].clone().requires_grad_()
    noisy, target, loss = _loss(objective, output, given["latents"], noise, t)
    (gradient,) = torch.autograd.grad(loss, output)
    assert_close(noisy, expected["noisy"], **WITHIN)
    assert_close(target, expected["target"], **WITHIN)
    assert_close(loss, expected["loss"][0], **WITHIN)
    assert_close(gradient, expected["grad_prediction"], rtol=5e-5, atol=1e-8)
    if "timestep" in expected:
        assert_close(t, expected["timestep"].float(), rtol=0.0, atol=1e-3)


@pytest.mark.parametrize(("name", "objective"), [("linear", OURS), ("sd15", OURS.but(**SD15))])
def test_schedules_without_signal_at_the_end_are_those_of_the_original(case, name, objective):
    schedule = schedule_of(objective)
    assert_close(schedule.alphas_cumprod.float(), case.outputs[f"alphas_cumprod.{name}_zsnr"], rtol=0.0, atol=5e-6)
    assert schedule.alphas_cumprod[-1] == 0 and schedule.snr[-1] == 0
    assert_close(torch.cumprod(1.0 - schedule.betas, dim=0), schedule.alphas_cumprod, rtol=1e-9, atol=1e-12)
    plain = schedule_of(objective.but(zero_terminal_snr=False))
    assert_close(plain.alphas_cumprod.float(), case.outputs[f"alphas_cumprod.{name}"], rtol=0.0, atol=5e-6)


def test_weights_are_those_of_the_sheet():
    schedule = schedule_of(OURS)
    weight = schedule.min_snr_weight(torch.arange(1000), "v_prediction", 5.0)
    some = [weight[t].item() for t in (0, 100, 250, 500, 750, 999)]
    assert some == pytest.approx([0.00050, 0.52755, 0.51886, 0.07525, 0.00264, 0.0], abs=6e-6)
    assert weight.mean().item() == pytest.approx(0.190696, abs=1e-6) and weight.argmax() == 130


@pytest.mark.parametrize(("variant", "sparse_n"), [("dense", 1), ("sparse", 4)])
def test_a_step_of_the_network_has_the_loss_and_gradients_of_the_original(case, variant, sparse_n):
    sizes = {"num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 4, "out_channels": 4}
    dit = OpenSoraDiT(**sizes, num_layers=6, caption_channels=20, sparse_n=sparse_n)
    dit.load_state_dict(recorded("opensora-dit").weights)
    x0, noise, t, text, mask = (case.inputs[f"step_{n}"] for n in ("latents", "noise", "timestep", "text", "text_mask"))
    noisy = schedule_of(OURS).add_noise(x0, noise, t)
    output = dit(noisy, t, text[:, 0], mask[:, 0])
    loss = _loss(OURS, output, x0, noise, t)[2]
    loss.backward()
    assert_close(loss, case.outputs[f"step.{variant}.loss"][0], rtol=1e-5, atol=1e-6)
    norms = case.config["step"]["gradient_norms"][variant]
    assert norms.keys() == dict(dit.named_parameters()).keys()
    for name, parameter in dit.named_parameters():
        assert parameter.grad.norm().item() == pytest.approx(norms[name], rel=2e-4, abs=2e-6)


# ------------------------------------------------------------------------------------------------- which are learnt when


def test_strata_are_those_of_the_original_s_ranks(case):
    """The original draws half a timestep lower and rounds. A timestep that a border cuts belongs to both slices."""
    schedule = NoiseSchedule(1e-4, 0.02, "linear")
    for recording in case.config["stratified_timesteps"]:
        ranks, rank = recording["ranks"], recording["rank"]
        ends = torch.tensor([rank / ranks + 1e-7, (rank + 1) / ranks - 1e-7])
        lowest, highest = schedule.times(ends).tolist()
        cut = 1000 % ranks > 0
        assert abs(lowest - recording["lowest"]) <= cut and abs(highest - recording["highest"]) <= cut
        assert all(lowest <= t <= highest for t in recording["timesteps"])


def test_the_samples_of_an_update_share_the_timesteps_evenly_whatever_their_ranks():
    whole = Draw.training(3, 7, range(16), 16).stratified(8, "timesteps")
    assert (whole * 8).long().tolist() == [place // 2 for place in range(16)]
    halves = [Draw.training(3, 7, places, 16).stratified(8, "timesteps") for places in (range(8), range(8, 16))]
    assert torch.equal(torch.cat(halves), whole)
    draw = Draw.training(3, 7, range(16), 16)
    assert torch.equal(draw.stratified(1, "timesteps"), draw.uniform("timesteps"))


def test_levels_of_a_flow_have_their_density_and_move_with_the_shift(case):
    for u, t in case.config["flow_u_to_timestep"]:
        assert FlowSchedule().times(torch.tensor([u], dtype=torch.float64)).item() == t
    u = (torch.arange(4000) + 0.5) / 4000
    levels = FlowSchedule(density="logit_normal").times(u) / 1000
    assert levels.mean().item() == pytest.approx(0.5, abs=2e-3) and levels.std().item() == pytest.approx(
        0.208, abs=1e-3
    )
    theirs = FlowMatchEuler(shift=3.0).build(Objective(prediction_type="flow", flow_shift=3.0))
    ours = FlowSchedule(shift=3.0).times((torch.arange(1000) + 0.5) / 1000)
    assert_close(ours, theirs.timesteps.float(), rtol=0.0, atol=1e-3)
    edges = FlowSchedule(density="logit_normal").times(torch.tensor([0.0, 1.0]))
    assert edges.isfinite().all() and (edges > 0).all()


# --------------------------------------------------------------------------------------------------- what may be sampled


def test_sampling_starts_where_the_schedule_ends():
    """100 steps of v1.3 (section 9.2 of the sheet)."""
    scheduler = EulerAncestral(num_inference_steps=100).build(OURS)
    scheduler.set_timesteps(100)
    assert scheduler.timesteps[[0, 1, -1]].tolist() == [999, 989, 9]
    assert scheduler.sigmas[[0, 1, 2]].tolist() == pytest.approx([4096, 1478.557, 706.076], rel=1e-4)
    stock = StockDDIM(timestep_spacing="trailing").build(OURS)
    theirs = DDPMScheduler(beta_start=1e-4, beta_end=0.02, rescale_betas_zero_snr=True)
    assert_close(stock.alphas_cumprod, theirs.alphas_cumprod)
    for sampler in (DDIM(), StockDDIM()):
        with pytest.raises(UserError, match="does not start from pure noise"):
            sampler.build(OURS)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [({"zero_terminal_snr": True}, "predict v"), ({"flow_shift": 3.0}, "unless prediction_type is 'flow'"),
     ({"timestep_strata": 0}, "at least 1"), ({"prediction_type": "flow", "snr_gamma": 5.0}, "must be None for a flow"),
     ({"prediction_type": "flow", "flow_std": 0.0}, "above 0"), ({"prediction_type": "flow", "zero_terminal_snr": True}, "pure noise as it is")],
)  # fmt: skip
def test_what_goes_ill_together_is_refused(wrong, why):
    with pytest.raises(UserError, match=why):
        Objective(**wrong)


def test_the_last_timestep_of_a_flow_is_pure_noise():
    schedule, x0, noise = FlowSchedule(), torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    assert torch.equal(schedule.add_noise(x0, noise, torch.full((2,), schedule.last)), noise)

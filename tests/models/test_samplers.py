"""Every sampler, against data whose exact denoiser is known: nothing but the right samples passes.

Clean samples are normal with mean M and deviation S in every element. Then the best prediction of x_0 is linear in x_t,
and the path of the probability flow is alpha m + sqrt(alpha^2 s^2 + sigma^2) z with one z from noise to sample, so that
the sample that belongs to a noise is known exactly, not only its distribution.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from core.draw import Draw
from core.errors import UserError
from core.objective import NoiseSchedule
from core.sampling import sample, signal_at_start
from core.slots import (
    DDIM,
    DDPM,
    LMS,
    PNDM,
    Diffusion,
    DPMSolverMultistep,
    Euler,
    EulerAncestral,
    FlowMatchEuler,
    Heun,
    LVDMShortUNet,
    Objective,
    Sampler,
    UniPC,
)
from registry import get

M, S = 0.7, 0.4
SKY = {"beta_start": 0.0015, "beta_end": 0.0155}
TABLE = NoiseSchedule(**SKY).alphas_cumprod.numpy()
SIGMAS = np.sqrt((1 - TABLE) / TABLE)

DETERMINISTIC = {
    "ddim": (DDIM(), 0.03),
    "pndm": (PNDM(), 0.01),
    "pndm, warmed up": (PNDM(warm_up=True), 0.01),
    "lms": (LMS(), 0.01),
    "lms, even": (LMS(karras_sigmas=False), 0.01),
    "euler": (Euler(), 0.02),
    "euler, even": (Euler(karras_sigmas=False), 0.04),
    "heun": (Heun(), 0.005),
    "heun, even": (Heun(karras_sigmas=False), 0.005),
    "dpm-solver": (DPMSolverMultistep(), 0.005),
    "dpm-solver 1": (DPMSolverMultistep(solver_order=1), 0.02),
    "dpm-solver 3": (DPMSolverMultistep(solver_order=3), 0.005),
    "dpm-solver, even": (DPMSolverMultistep(karras_sigmas=False), 0.04),
    "unipc": (UniPC(), 0.005),
    "unipc 3": (UniPC(solver_order=3), 0.005),
    "unipc, even": (UniPC(karras_sigmas=False), 0.04),
}
"""With the largest mean error at 50 steps. The first-order ones are limited by their steps, the others by the timesteps
that a network is asked at being whole."""
STOCHASTIC = {
    "ddim, eta 1": DDIM(eta=1.0),
    "ddpm": DDPM(),
    "euler ancestral": EulerAncestral(),
    "sde-dpm-solver": DPMSolverMultistep(stochastic=True),
}
ALL = {name: made for name, (made, _) in DETERMINISTIC.items()} | STOCHASTIC


def cases(samplers):
    return [(name, kind) for name in samplers for kind in ALL[name].predicts]


def levels(t: float, kind: str) -> tuple[float, float]:
    """(alpha, sigma) at a timestep; between two whole ones as samplers do, sigma / alpha in a straight line."""
    if kind == "flow":
        return 1 - t / 1000, t / 1000
    ratio = np.interp(t, np.arange(1000), SIGMAS)
    alpha = 1 / np.sqrt(1 + ratio**2)
    return alpha, alpha * ratio


class Oracle:
    """The best network for data of mean M and deviation `s`; it notes where it was first asked, and at which times."""

    def __init__(self, kind: str, s: float = S):
        self.kind, self.s, self.first, self.times = kind, s, None, []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.times.append(t[0].item())
        alpha, sigma = levels(self.times[-1], self.kind)
        self.first = (x, alpha, sigma) if self.first is None else self.first
        spread = alpha**2 * self.s**2 + sigma**2
        x0 = M + alpha * self.s**2 / spread * (x.double() - alpha * M)
        epsilon = (x.double() - alpha * x0) / sigma
        made = {"epsilon": epsilon, "sample": x0, "v_prediction": alpha * epsilon - sigma * x0, "flow": epsilon - x0}
        return made[self.kind].float()

    def exact(self, to_abar_0: bool) -> Tensor:
        """Where the probability flow leads from where it was first asked."""
        x, alpha, sigma = self.first
        z = (x - alpha * M) / np.sqrt(alpha**2 * self.s**2 + sigma**2)
        alpha, sigma = levels(0, "epsilon") if to_abar_0 else (1.0, 0.0)
        return alpha * M + np.sqrt(alpha**2 * self.s**2 + sigma**2) * z


def run(sampler: Sampler, oracle, steps: int = 50, ids=(0,), shape=(1, 40, 40)) -> Tensor:
    draw = Draw.fixed("test", ids, range(len(ids)), len(ids))
    objective = Objective(prediction_type="epsilon" if oracle.kind == "flow" else oracle.kind, **SKY)
    return sample(
        oracle,
        draw.noise(shape, "initial"),
        sampler.scheduler(objective) if oracle.kind == "flow" else sampler.build(objective),
        num_inference_steps=steps,
        eta=getattr(sampler, "eta", 0.0),
        step_noise=lambda i, shape: draw.noise(shape[1:], f"step {i}"),
        generators=lambda i: draw.generators(f"step {i}"),
    )


def error(sampler: Sampler, kind: str = "epsilon", steps: int = 50) -> float:
    oracle = Oracle(kind)
    made = run(sampler, oracle, steps)
    return (made - oracle.exact(isinstance(sampler, (DDIM, PNDM)))).abs().mean().item()


@pytest.mark.parametrize(("name", "kind"), cases(DETERMINISTIC))
def test_each_noise_is_led_to_the_sample_that_belongs_to_it(name, kind):
    sampler, limit = DETERMINISTIC[name]
    if name.startswith("pndm") and kind == "v_prediction":
        limit = 0.03  # of first order there
    assert error(sampler, kind) < limit


def test_straight_paths_are_followed_by_flow_matching():
    oracle = Oracle("flow")
    made = run(FlowMatchEuler(), oracle, 50)
    assert (made - oracle.exact(to_abar_0=False)).abs().mean() < 0.02
    shifted = run(FlowMatchEuler(shift=3.0), shifted_oracle := Oracle("flow"), 50)
    assert (shifted - shifted_oracle.exact(to_abar_0=False)).abs().mean() < 0.03
    assert np.median(shifted_oracle.times) > np.median(oracle.times) + 100


@pytest.mark.parametrize(("name", "kind"), cases(STOCHASTIC))
def test_stochastic_samplers_end_at_the_data_s_mean_and_deviation(name, kind):
    def made(steps, ids=(0,)):
        return run(STOCHASTIC[name], Oracle(kind), steps, ids, shape=(1, 80, 80))

    fine, coarse = made(400), made(40)
    assert fine.mean() == pytest.approx(M, abs=0.02)
    assert fine.std() == pytest.approx(S, rel=0.06)
    # DDPM's variance is the smaller of the two bounds of arXiv 2006.11239, section 3.2: few steps make too little noise
    assert abs(fine.std() - S) <= abs(coarse.std() - S) + 0.01
    assert not torch.equal(coarse, made(40, ids=(1,)))


@pytest.mark.parametrize(("name", "kind"), [*cases(ALL), ("flow", "flow")])
def test_data_of_one_point_are_found(name, kind):
    made = run(ALL.get(name, FlowMatchEuler()), Oracle(kind, s=0.0), 30)
    # what ends at abar_0 keeps its noise of 0.04, and the warm-up and multistep formulas some of the first steps'
    assert (made - M).abs().mean() < 0.08


@pytest.mark.parametrize("sampler", [Heun(), DPMSolverMultistep(), UniPC(), LMS()], ids=lambda s: type(s).__name__)
def test_higher_orders_pay_where_the_first_order_is_still_far(sampler):
    assert error(sampler, steps=20) < error(Euler(), steps=20) / 3


def test_spaced_noise_levels_are_what_makes_few_steps_enough():
    assert error(DPMSolverMultistep(), steps=20) < error(DPMSolverMultistep(karras_sigmas=False), steps=20) / 5


# ----------------------------------------------------------------------------------------------- which fits, how often


KINDS = ("epsilon", "v_prediction", "sample")
MISFITS = [(s, kind) for s in (DDIM, DDPM, PNDM, LMS, Euler, EulerAncestral, Heun, DPMSolverMultistep, UniPC, FlowMatchEuler)
           for kind in KINDS if kind not in s.predicts]  # fmt: skip


@pytest.mark.parametrize(("sampler", "kind"), MISFITS)
def test_what_does_not_fit_the_prediction_type_is_refused_with_the_reason(sampler, kind):
    with pytest.raises(UserError, match=f"{sampler.__name__} needs a network that predicts .*, not {kind}: "):
        sampler().build(Objective(prediction_type=kind))


@pytest.mark.parametrize("sampler", [PNDM, EulerAncestral])
def test_what_is_refused_has_no_formula_in_diffusers_either(sampler):
    scheduler = sampler().scheduler(Objective(prediction_type="sample", **SKY))
    with pytest.raises((ValueError, NotImplementedError), match="prediction_type"):
        sample(lambda x, t: x, torch.randn(1, 2), scheduler, num_inference_steps=5)


def test_a_recipe_with_a_sampler_that_does_not_fit_is_refused_before_it_runs():
    with pytest.raises(UserError, match=r"validation.sampler: FlowMatchEuler needs .* predicts flow, not v_prediction"):
        get("lvdm-short-sky-tiny --validation.sampler=FlowMatchEuler")
    with pytest.raises(UserError, match="DDIM takes at most 999 steps over 1000 timesteps, not 1000"):
        get("lvdm-short-sky-tiny --validation.sampler.num-inference-steps 1000")
    heun = get("lvdm-short-sky-tiny --validation.sampler=Heun --validation.sampler.num-inference-steps 30")
    assert heun.validation.sampler == Heun(num_inference_steps=30)


def stays_sane(sampler, steps):
    made = run(sampler, oracle := Oracle("epsilon"), steps, shape=(2, 2))
    assert made.isfinite().all()
    assert all(0 <= t <= 999 for t in oracle.times)
    assert len(oracle.times) >= steps


@pytest.mark.parametrize("name", ALL)
def test_every_number_of_steps_asks_at_known_times_and_stays_finite(name):
    """At 61 steps diffusers' trailing spacing ends at timestep -1."""
    sampler = ALL[name]
    stays_sane(sampler, max(sampler.least_steps, 4 if getattr(sampler, "warm_up", False) else 1))
    stays_sane(sampler, 61)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "pndm, warmed up", "dpm-solver", "unipc, even"])
def test_as_many_steps_as_are_allowed_stay_finite(name):
    """Rounded timesteps repeat there."""
    stays_sane(ALL[name], ALL[name].most_steps(1000))


@pytest.mark.parametrize("sampler", [DDPM, LMS, Euler, EulerAncestral, Heun], ids=lambda s: s.__name__)
def test_a_single_step_is_refused_where_it_would_only_keep_the_noise(sampler):
    with pytest.raises(UserError, match="num_inference_steps = 1: must be at least 2"):
        sampler(num_inference_steps=1)


def test_the_part_of_the_signal_that_sampling_cannot_know_of_is_measured():
    assert signal_at_start(DDIM().build(Objective(**SKY)), 50) == pytest.approx(0.0009**0.5, rel=0.02)
    assert signal_at_start(DDIM().build(Objective(**SKY)), 600) > 0.15
    assert signal_at_start(FlowMatchEuler().scheduler(Objective()), 10) == 0


# ----------------------------------------------------------------------------------- a clip is alone in whatever batch


@pytest.fixture(scope="module")
def system():
    torch.manual_seed(0)
    unet = LVDMShortUNet(
        in_channels=3, out_channels=3, model_channels=8, channel_mult=(1, 2), num_res_blocks=1, num_heads=2,
        attention_resolutions=(1,), norm_num_groups=4,
    )  # fmt: skip
    built = Diffusion(denoiser=unet).build()
    for parameter in built.trained.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    built.mode(training=False)
    return built


@pytest.mark.parametrize("name", ALL)
def test_the_same_seed_gives_the_same_clip_whatever_the_batch_size(name, system):
    def made(*ids):
        sampler = ALL[name].but(num_inference_steps=6)
        return system.sample([""] * len(ids), (2, 8, 8), sampler, Draw.fixed("sample 7", ids, range(len(ids)), 3))

    together = made(0, 1, 2)
    assert (together[1] - made(1)[0]).abs().max() <= 2 / 255  # a level of 255 in [-1, 1]
    assert (together[0] - together[1]).abs().mean() > 0.05


def test_noise_that_diffusers_draws_is_the_noise_that_we_would_have_drawn():
    draw = Draw.fixed("test", (3, 4), (0, 1), 2)
    rows = [torch.randn(1, 2, 5, generator=g) for g in draw.generators("step 0")]
    assert torch.equal(torch.cat(rows), draw.noise((2, 5), "step 0"))

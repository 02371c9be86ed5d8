"""Sampler slots: how noise becomes samples, each through a scheduler of diffusers.

A sampler says itself which networks it can sample from (`predicts`) and in how many steps, so that a recipe with one
that does not fit is refused before anything runs. Where noise levels can be spaced as in arXiv 2206.00364 (equation 5)
they are by default: on Gaussian data, whose exact path is known, DPM-Solver++ in 20 steps then has a thirteenth of the
error that it has with evenly spaced timesteps (docs/sampling.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from core.slots.free import FreeInit, FreeNoise
from core.slots.slot import Slot, SlotError

if TYPE_CHECKING:
    from core.slots.objective import Objective


class Sampler(Slot):
    """How noise becomes samples."""

    predicts: ClassVar[tuple[str, ...]] = ("epsilon", "v_prediction", "sample")
    """The prediction types of the networks that it can sample from."""
    because: ClassVar[str] = "it has no formula for anything else"
    """Why from no others."""
    least_steps: ClassVar[int] = 1
    """Fewer steps than this leave the noise where it is."""
    from_pure_noise: ClassVar[bool] = False
    """Whether it can start where nothing is left of a sample."""
    since: ClassVar[dict[str, Any]] = {"free_init": None, "free_noise": None}

    num_inference_steps: int = 50
    """Denoising steps."""
    guidance_scale: float = 1.0
    """Classifier-free guidance (arXiv 2207.12598): 1 is the conditional model, 0 the unconditional one, more is beyond.
    """
    negative_prompt: str = ""
    """What guidance leads away from. Empty: the unconditional model."""
    free_init: FreeInit | None = None
    """Sample again from the low frequencies of what was sampled."""
    free_noise: FreeNoise | None = None
    """Clips longer than the network's, in windows of frames. For networks with motion modules."""

    def check(self) -> None:
        if self.guidance_scale < 0:
            self.refuse("guidance_scale", "must not be negative")
        if self.num_inference_steps < self.least_steps:
            self.refuse("num_inference_steps", f"must be at least {self.least_steps}")

    def most_steps(self, total: int) -> int:
        """The most steps over a schedule of `total` timesteps."""
        return total

    def starts_pure(self) -> bool:
        """Whether its first step is the last timestep of a schedule, even if that is pure noise."""
        return self.from_pure_noise

    def misfit(self, objective: Objective) -> str | None:
        """Why it cannot sample from a network of this objective, or None."""
        name, kind, total = type(self).__name__, objective.prediction_type, objective.num_train_timesteps
        if kind not in self.predicts:
            return f"{name} needs a network that predicts {' or '.join(self.predicts)}, not {kind}: {self.because}"
        if objective.zero_terminal_snr and not self.starts_pure():
            return (
                f"{name} does not start from pure noise, and with zero_terminal_snr the network has learnt to; take "
                "EulerAncestral, DDPM, or StockDDIM with timestep_spacing trailing"
            )
        if self.num_inference_steps > self.most_steps(total):
            steps = self.num_inference_steps
            return f"{name} takes at most {self.most_steps(total)} steps over {total} timesteps, not {steps}"
        return None

    def build(self, objective: Objective) -> Any:
        """The diffusers scheduler for this objective. Raises SlotError where it does not fit."""
        if why := self.misfit(objective):
            raise SlotError(why)
        return self.scheduler(objective)

    def scheduler(self, objective: Objective) -> Any:
        """`build` without the check."""
        raise NotImplementedError


def _schedule(objective: Objective) -> dict[str, Any]:
    """The noise schedule in diffusers' words."""
    return {
        "beta_start": objective.beta_start,
        "beta_end": objective.beta_end,
        "beta_schedule": objective.beta_schedule,
        "num_train_timesteps": objective.num_train_timesteps,
        "prediction_type": objective.prediction_type,
    } | ({"rescale_betas_zero_snr": True} if objective.zero_terminal_snr else {})


def _most_leading_steps(total: int) -> int:
    """LVDM's timesteps are 1 + k floor(T / S): in T steps they would visit timestep T, which no network has seen."""
    return max(total - 1, 1)


def _check_order(slot: DPMSolverMultistep | UniPC) -> None:
    if slot.solver_order not in (1, 2, 3):
        slot.refuse("solver_order", "must be 1, 2 or 3")


def _most_of_one_more_level(slot: DPMSolverMultistep | UniPC, total: int) -> int:
    """Even timesteps are those of one step more, and two that are the same would divide by zero."""
    return total if slot.karras_sigmas else total - 1


class DDIM(Sampler):
    """DDIM (arXiv 2010.02502) as LVDM runs it: leading timesteps offset by one, the last step goes to abar_0."""

    eta: float = 0.0
    """0: deterministic, 1: as noisy as DDPM."""
    clip_x0: float | None = None
    """Clamp the predicted clean sample to this range at every step. None: no clamping."""

    def check(self) -> None:
        super().check()
        if not 0.0 <= self.eta <= 1.0:
            self.refuse("eta", "must be in [0, 1]")
        if self.clip_x0 is not None and self.clip_x0 <= 0:
            self.refuse("clip_x0", "must be positive, or None for no clamping")

    def most_steps(self, total: int) -> int:
        return _most_leading_steps(total)

    def scheduler(self, objective: Objective) -> Any:
        from core.sampling import ddim

        return ddim(**_schedule(objective), clip_sample=self.clip_x0 is not None, clip_sample_range=self.clip_x0 or 1.0)


class StockDDIM(DDIM):
    """DDIM (arXiv 2010.02502) as diffusers' pipelines of Stable Diffusion and AnimateDiff run it: the last step goes to
    a clean sample.
    """

    timestep_spacing: Literal["leading", "linspace", "trailing"] = "leading"
    """leading: offset + k floor(T / S), which never visits the last timesteps; linspace: from T - 1 to 0; trailing:
    from T - 1 down."""
    steps_offset: int = 1
    """Of leading timesteps."""
    set_alpha_to_one: bool = True
    """What the last step goes to: a clean sample (abar 1), or abar_0."""

    def check(self) -> None:
        super().check()
        if self.steps_offset < 0:
            self.refuse("steps_offset", "must not be negative")

    def most_steps(self, total: int) -> int:
        return total - self.steps_offset if self.timestep_spacing == "leading" else total

    def starts_pure(self) -> bool:
        return self.timestep_spacing != "leading"

    def scheduler(self, objective: Objective) -> Any:
        from diffusers import DDIMScheduler

        return DDIMScheduler(
            **_schedule(objective),
            clip_sample=self.clip_x0 is not None,
            clip_sample_range=self.clip_x0 or 1.0,
            set_alpha_to_one=self.set_alpha_to_one,
            steps_offset=self.steps_offset,
            timestep_spacing=self.timestep_spacing,
        )


class DDPM(Sampler):
    """Ancestral sampling of DDPM (arXiv 2006.11239, algorithm 2): the published chain in as many steps as the schedule
    has.
    """

    least_steps: ClassVar[int] = 2
    from_pure_noise: ClassVar[bool] = True

    clip_x0: float | None = None
    """Clamp the predicted clean sample to this range at every step. None: no clamping."""

    def check(self) -> None:
        super().check()
        if self.clip_x0 is not None and self.clip_x0 <= 0:
            self.refuse("clip_x0", "must be positive, or None for no clamping")

    def scheduler(self, objective: Objective) -> Any:
        from diffusers import DDPMScheduler

        return DDPMScheduler(
            **_schedule(objective),
            clip_sample=self.clip_x0 is not None,
            clip_sample_range=self.clip_x0 or 1.0,
            timestep_spacing="linspace",
        )


class PNDM(Sampler):
    """Pseudo linear multistep (arXiv 2202.09778) on DDIM's timesteps. It extrapolates what the network predicts, which
    for v is of first order only: there no better than DDIM.
    """

    predicts: ClassVar[tuple[str, ...]] = ("epsilon", "v_prediction")
    because: ClassVar[str] = "its formula moves along the noise"

    warm_up: bool = False
    """Begin with three Runge-Kutta steps (12 evaluations of the network) instead of steps of lower order."""

    def check(self) -> None:
        super().check()
        if self.warm_up and self.num_inference_steps < 4:
            self.refuse("num_inference_steps", "the warm-up alone takes 3: must be at least 4")

    def most_steps(self, total: int) -> int:
        return total // 2 if self.warm_up else _most_leading_steps(total)  # half steps of a warm-up are whole timesteps

    def scheduler(self, objective: Objective) -> Any:
        from diffusers import PNDMScheduler

        return PNDMScheduler(**_schedule(objective), skip_prk_steps=not self.warm_up, steps_offset=1)


class LMS(Sampler):
    """Linear multistep of order 4 over noise levels (Katherine Crowson's k-diffusion)."""

    least_steps: ClassVar[int] = 2

    karras_sigmas: bool = True
    """Space the noise levels as in arXiv 2206.00364, equation 5. False: even timesteps."""

    def scheduler(self, objective: Objective) -> Any:
        from diffusers import LMSDiscreteScheduler

        return LMSDiscreteScheduler(**_schedule(objective), use_karras_sigmas=self.karras_sigmas)


class Euler(Sampler):
    """Euler's method over noise levels (arXiv 2206.00364, algorithm 2 without churn)."""

    least_steps: ClassVar[int] = 2

    karras_sigmas: bool = True
    """Space the noise levels as in arXiv 2206.00364, equation 5. False: even timesteps."""

    def scheduler(self, objective: Objective) -> Any:
        from diffusers import EulerDiscreteScheduler

        return EulerDiscreteScheduler(**_schedule(objective), use_karras_sigmas=self.karras_sigmas)


class EulerAncestral(Sampler):
    """Euler steps that go below the next noise level, and fresh noise up to it (k-diffusion), at even timesteps."""

    from_pure_noise: ClassVar[bool] = True

    predicts: ClassVar[tuple[str, ...]] = ("epsilon", "v_prediction")
    because: ClassVar[str] = "diffusers' scheduler has no formula for it"
    least_steps: ClassVar[int] = 2

    def scheduler(self, objective: Objective) -> Any:
        from diffusers import EulerAncestralDiscreteScheduler

        spacing = {"timestep_spacing": "trailing"} if objective.zero_terminal_snr else {}
        return EulerAncestralDiscreteScheduler(**_schedule(objective), **spacing)


class Heun(Sampler):
    """Heun's method of second order over noise levels (arXiv 2206.00364, algorithm 1): two evaluations of the network a
    step. In fewer than ten steps it overshoots.
    """

    least_steps: ClassVar[int] = 2

    karras_sigmas: bool = True
    """Space the noise levels as in arXiv 2206.00364, equation 5. False: even timesteps."""

    def scheduler(self, objective: Objective) -> Any:
        from diffusers import HeunDiscreteScheduler

        return HeunDiscreteScheduler(**_schedule(objective), use_karras_sigmas=self.karras_sigmas)


class DPMSolverMultistep(Sampler):
    """DPM-Solver++ (arXiv 2211.01095), multistep, deterministic or stochastic."""

    solver_order: int = 2
    """1 is DDIM; 2, or 3 for steps that are many and guidance that is weak."""
    stochastic: bool = False
    """Add fresh noise at each step (the SDE variant)."""
    karras_sigmas: bool = True
    """Space the noise levels as in arXiv 2206.00364, equation 5. False: even timesteps."""

    def check(self) -> None:
        super().check()
        _check_order(self)

    def most_steps(self, total: int) -> int:
        return _most_of_one_more_level(self, total)

    def scheduler(self, objective: Objective) -> Any:
        from diffusers import DPMSolverMultistepScheduler

        return DPMSolverMultistepScheduler(
            **_schedule(objective),
            solver_order=self.solver_order,
            algorithm_type="sde-dpmsolver++" if self.stochastic else "dpmsolver++",
            use_karras_sigmas=self.karras_sigmas,
        )


class UniPC(Sampler):
    """UniPC (arXiv 2302.04867): a predictor of DPM-Solver++'s kind with a corrector that costs no evaluation."""

    solver_order: int = 2
    """Order of the predictor, 1 to 3; the corrector's is one more."""
    karras_sigmas: bool = True
    """Space the noise levels as in arXiv 2206.00364, equation 5. False: even timesteps."""

    def check(self) -> None:
        super().check()
        _check_order(self)

    def most_steps(self, total: int) -> int:
        return _most_of_one_more_level(self, total)

    def scheduler(self, objective: Objective) -> Any:
        from diffusers import UniPCMultistepScheduler

        return UniPCMultistepScheduler(
            **_schedule(objective), solver_order=self.solver_order, use_karras_sigmas=self.karras_sigmas
        )


class FlowMatchEuler(Sampler):
    """Euler's method along the straight paths of a rectified flow (arXiv 2209.03003)."""

    predicts: ClassVar[tuple[str, ...]] = ("flow",)
    because: ClassVar[str] = "it integrates the velocity noise - x_0 of straight paths (1 - s) x_0 + s noise"

    shift: float = 1.0
    """More than 1: more of the steps at high noise (arXiv 2403.03206, section 5.3.2)."""

    def check(self) -> None:
        super().check()
        if self.shift <= 0:
            self.refuse("shift", "must be positive")

    def scheduler(self, objective: Objective) -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=objective.num_train_timesteps, shift=self.shift)

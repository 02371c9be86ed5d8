"""The training loop: the one file to read to know how training works here.

An update is a pure function of (seed, position, data). The loop asks the plan which samples come next, the system for
their loss, and does by plain calls, in plain sight, everything that happens at an interval: log, validate, sample,
save, leave.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from core.build import Built, build
from core.checkpoint import checkpoints
from core.distributed import Ranks, full, local, ranks, synchronise_gradients
from core.draw import Draw
from core.errors import UserError
from core.hashing import hash_of
from core.loader import batches, to_device
from core.meters import Window
from core.precision import autocast
from core.preflight import preflight
from core.profiling import profiler
from core.report import Report
from core.saver import Saver
from core.schedules import learning_rate
from core.slots import Launch, Recipe
from core.state import State, restore, save
from core.stopping import NOTHING, Leave, Stop, Wishes, asked_to_stop


@dataclass(frozen=True)
class Result:
    """What a run left behind. `asked` says what ended it early, if anything did."""

    output_dir: Path
    run_id: str
    step: int
    metrics: dict[str, float]
    asked: Wishes = NOTHING


def train(recipe: Recipe, launch: Launch = Launch(), argv: Sequence[str] = ()) -> Result:
    """Train a recipe from launch to export. Raises UserError for what the user can mend, before anything is written."""
    preflight(recipe, launch)
    with asked_to_stop(launch.grace) as stop, ranks(recipe.parallel, launch.device, launch.timeout) as here:
        built = build(recipe, launch, here)
        stop.polite = True
        report = Report.open(recipe, launch, built, here, argv, stop)
        try:
            with here.naming_the_lost():
                result = _run(recipe, built, here, report, stop)
        except BaseException as error:
            report.close("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED", error)
            raise
        report.close("KILLED" if result.asked.leave else "FINISHED")
        return result


def _run(recipe: Recipe, built: Built, here: Ranks, report: Report, stop: Stop) -> Result:
    """Updates from where the state stands to the last one, then the end of the run: validate, sample, export."""
    state = restore(recipe, built, here)
    report.begin(state.step, built.total_steps)
    metrics: dict[str, float] = {}
    with ExitStack() as cleanup:
        saver = Saver(report.folder / "checkpoints", here, recipe.checkpoint.keep, report.saved)
        cleanup.callback(saver.join, patience=60.0)  # whatever happens, what was handed over gets to the disk
        wishes = _updates(recipe, built, here, report, stop, state, saver)
        if state.saved_at != state.step:
            save(saver, recipe, built, here, state, report.newest())
        saver.join()
        if failure := saver.failure():
            raise UserError(failure)
        if not wishes.leave:
            try:
                metrics = report.validate(built) | report.sample(built, final=True)
                report.export(built)
            except Leave:
                wishes = stop.agreed(here)
    return Result(report.folder, report.run_id, state.step, metrics, wishes)


def _updates(
    recipe: Recipe, built: Built, here: Ranks, report: Report, stop: Stop, state: State, saver: Saver
) -> Wishes:
    """Update after update, and what is due between them. Returns what ended them early, if anything did."""
    loop, total = recipe.loop, built.total_steps
    plan = built.plan
    keys = plan.rank(here.data_rank, here.data_world, state.position, total - state.step)
    stream = batches(built.dataset, keys, workers=loop.num_workers, pin=here.device.type == "cuda")
    with profiler(loop.profile, report.folder, here) as profile:
        while state.step < total:
            began, here.update = time.perf_counter(), state.step + 1
            lr = learning_rate(recipe.optim, state.step, total)
            for group in built.optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            samples, after = plan.update(state.position)
            parts = Parts(len(samples), plan.accumulation(samples, here.data_world))
            sums = _accumulate(recipe, built, here, state, stream, report, parts)
            wishes = _update(recipe, built, here, state, sums, stop.wishes(report.folder if here.first else None))
            if here.first and (wishes.stop or wishes.save):
                stop.obeyed(report.folder)
            state.step, state.position = state.step + 1, after
            took = time.perf_counter() - began
            state.window.end_update(took, parts.samples)
            report.speed.end_update(took)
            profile.step()

            due = state.step % loop.log_every == 0
            if due or state.step == total:
                values = state.window.values(lr, state.nonfinite, here.device)
                report.metrics(values | report.speed.values() if here.first else values, state.step)
            if due:
                state.window = Window()
            report.step(state.step, saver.failure())
            if wishes.leave or state.step == total:
                return wishes
            try:
                if _due(state.step, recipe.validation.every):
                    report.validate(built)
                if _due(state.step, recipe.validation.sample_every):
                    report.sample(built)
            except Leave:
                return stop.agreed(here)
            if wishes.save or _due(state.step, recipe.checkpoint.every):
                save(saver, recipe, built, here, state, report.newest())
    return NOTHING


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


class Parts(NamedTuple):
    """What an update is made of: samples of all ranks, and micro-batches of each."""

    samples: int
    accumulation: int


class _Sums(NamedTuple):
    """Of one update, on this rank: mean loss, mean logs, names of the samples."""

    loss: Tensor
    logs: dict[str, Tensor]
    names: list[str]


def _accumulate(
    recipe: Recipe, built: Built, here: Ranks, state: State, stream: Any, report: Report, parts: Parts
) -> _Sums:
    """Forward and backward of one update's micro-batches. Gradients meet across ranks in the last one alone."""
    loop, system = recipe.loop, built.system
    samples, accumulation = parts
    sums = _Sums(torch.zeros((), device=here.device), {}, [])
    for micro in range(accumulation):
        waited = time.perf_counter()
        batch = next(stream)
        state.window.data_s += time.perf_counter() - waited
        report.skipped(state.skipped.count(batch))
        report.speed.add(batch)
        # dropout and whatever else draws from the global generator
        torch.manual_seed(hash_of(loop.seed, state.step, micro, here.rank) & 0xFFFFFFFF)
        draw = Draw.training(loop.seed, state.step, batch["place"], samples, here.device)
        synchronise_gradients(system.trained, micro == accumulation - 1)
        with autocast(loop.precision, here.device):
            loss, logs = system.loss(to_device(batch, here.device), draw)
        (loss * (built.scaler.scale / accumulation)).backward()  # type: ignore[no-untyped-call]
        sums.loss.add_(loss.detach().float(), alpha=1 / accumulation)
        for name, value in logs.items():
            sums.logs[name] = sums.logs.get(name, torch.zeros_like(sums.loss)) + value.float() / accumulation
        sums.names.extend(batch["id"])
    return sums


def _update(recipe: Recipe, built: Built, here: Ranks, state: State, sums: _Sums, wishes: Wishes) -> Wishes:
    """Clip and step, unless loss or gradient is not finite. Returns what was asked of any rank."""
    if state.step == 0:
        _every_parameter_has_a_gradient(built)
    gradients = [p.grad for p in built.parameters if p.grad is not None]
    norm = full(get_total_norm(gradients, foreach=True)).to(here.device, torch.float32) / built.scaler.scale
    mine = [float(flag) for flag in (*wishes.flags(), state.skipped.skipped)]
    values = torch.stack([sums.loss, norm, *sums.logs.values()])
    # the one device-to-host synchronisation of an update; the norm is global already, its mean over ranks is itself
    values = here.mean(torch.cat([values, torch.tensor(mine, device=here.device)]))
    loss, grad_norm, *rest = values.tolist()
    logs, flags = rest[: len(sums.logs)], [flag * here.world for flag in rest[len(sums.logs) :]]
    state.window.skipped = round(flags.pop())
    finite = math.isfinite(loss) and math.isfinite(grad_norm)
    if finite:
        limit = recipe.optim.max_grad_norm
        clip = min(1.0, limit / (grad_norm + 1e-6)) if limit else 1.0
        if clip / built.scaler.scale != 1.0:
            torch._foreach_mul_([local(g) for g in gradients], clip / built.scaler.scale)
        built.optimizer.step()
        if built.ema is not None:
            built.ema.update()
        state.window.add(loss, grad_norm, dict(zip(sums.logs, logs, strict=True)))
        state.nonfinite_in_a_row = 0
    elif not built.scaler.on or built.scaler.scale <= 1.0:
        state.nonfinite += 1
        state.nonfinite_in_a_row += 1
    built.scaler.update(finite)
    built.optimizer.zero_grad(set_to_none=True)
    if state.nonfinite_in_a_row >= recipe.loop.max_nonfinite:
        raise UserError(_not_finite(built, here, state, loss, grad_norm, sums.names))
    return Wishes.of(flags)


def _every_parameter_has_a_gradient(built: Built) -> None:
    missing = [name for name, p in built.system.trained.named_parameters() if p.requires_grad and p.grad is None]
    if missing:
        raise UserError(
            f"{len(missing)} trained parameters got no gradient, so they would never learn: {', '.join(missing[:5])}"
        )


def _not_finite(built: Built, here: Ranks, state: State, loss: float, norm: float, names: list[str]) -> str:
    samples = [name for rank in here.everyone(names) for name in rank]
    good = next(iter(checkpoints(built.start.folder / "checkpoints")), None)
    return (
        f"step {state.step}: loss {loss}, gradient norm {norm}: {state.nonfinite_in_a_row} updates in a row are not "
        f"finite. The samples of this one: {', '.join(samples[:8])}. The last checkpoint: {good or 'none'}. "
        "Lower --lr, set --optim.max-grad-norm, or take --precision bf16 or fp32"
    )

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
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from core import checkpoint
from core.build import Built, build
from core.distributed import Ranks, full, local, ranks, synchronise_gradients
from core.draw import Draw
from core.errors import UserError
from core.hashing import hash_of
from core.loader import Skipped, batches, to_device
from core.meters import Window
from core.positions import START, Plan, Position
from core.precision import autocast
from core.preflight import preflight
from core.profiling import profiler
from core.report import Report
from core.schedules import learning_rate
from core.slots import Launch, Recipe
from core.stopping import STOPS, Stop, asked_to_stop


@dataclass
class Progress:
    """What changes from update to update, besides tensors. All of it is in a checkpoint."""

    step: int = 0
    position: Position = START
    nonfinite: int = 0
    nonfinite_in_a_row: int = 0


@dataclass(frozen=True)
class Result:
    """What a finished run left behind."""

    output_dir: Path
    run_id: str
    step: int
    metrics: dict[str, float]
    signal: int | None = None


def train(recipe: Recipe, launch: Launch = Launch(), argv: Sequence[str] = ()) -> Result:
    """Train a recipe from launch to export. Raises UserError for what the user can mend, before anything is written."""
    preflight(recipe)
    with ranks(recipe.parallel, launch.device) as here, ExitStack() as cleanup:
        stop = cleanup.enter_context(asked_to_stop())
        built = build(recipe, launch, here)
        report = Report.open(recipe, launch, built, here, argv)
        try:
            result = _run(recipe, built, here, report, stop)
        except BaseException as error:
            report.close("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED", error)
            raise
        report.close("KILLED" if result.signal else "FINISHED")
        return result


def _run(recipe: Recipe, built: Built, here: Ranks, report: Report, stop: Stop) -> Result:
    """Updates from where the state stands to the last one, then the end of the run."""
    loop, system = recipe.loop, built.system
    progress, skipped = restore(recipe, built, here)
    plan = Plan(built.dataset, loop.seed, loop.global_batch, loop.micro_batch)
    stream = batches(
        built.dataset,
        plan.rank(here.rank, here.world, progress.position, built.total_steps - progress.step),
        workers=loop.num_workers,
        pin=here.device.type == "cuda",
    )
    window, asked = Window(), 0
    saved_at = progress.step if built.checkpoint else None
    report.begin(progress.step, built.total_steps)
    with profiler(loop.profile, report.folder, here) as profile:
        while progress.step < built.total_steps:
            began = time.perf_counter()
            lr = learning_rate(recipe.optim, progress.step, built.total_steps)
            for group in built.optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            loss, logs = _accumulate(recipe, built, here, progress.step, stream, skipped, window, report)
            asked = _update(recipe, built, here, progress, loss, logs, window, stop.signal or 0, skipped.skipped)
            progress.step += 1
            _, progress.position = plan.update(progress.position)
            window.end_update(time.perf_counter() - began)
            profile.step()

            last = asked or progress.step == built.total_steps
            if last or _due(progress.step, loop.log_every):
                report.metrics(window.values(lr, loop.global_batch, progress.nonfinite, here.device), progress.step)
                window = Window()
            report.step(progress.step)
            if last:
                break
            if _due(progress.step, recipe.validation.every):
                report.validate(system, built)
            if _due(progress.step, recipe.validation.sample_every):
                report.sample(system, built)
            if _due(progress.step, recipe.checkpoint.every):
                report.saved(save(recipe, built, here, progress, skipped, report.folder), progress.step)
                saved_at = progress.step

    if saved_at != progress.step:
        report.saved(save(recipe, built, here, progress, skipped, report.folder), progress.step)
    if asked:
        return Result(report.folder, report.run_id, progress.step, {}, signal=asked)
    metrics = report.validate(system, built) | report.sample(system, built, final=True)
    report.export(system, built)
    return Result(report.folder, report.run_id, progress.step, metrics)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _accumulate(
    recipe: Recipe, built: Built, here: Ranks, step: int, stream: Any, skipped: Skipped, window: Window, report: Report
) -> tuple[Tensor, dict[str, Tensor]]:
    """Forward and backward of one update's micro-batches. Gradients meet across ranks in the last one alone."""
    loop, system = recipe.loop, built.system
    accumulation = loop.global_batch // (loop.micro_batch * here.world)
    total = torch.zeros((), device=here.device)
    logs: dict[str, Tensor] = {}
    for micro in range(accumulation):
        waited = time.perf_counter()
        batch = next(stream)
        window.data_s += time.perf_counter() - waited
        report.skipped(skipped.count(batch))
        # dropout and whatever else draws from the global generator
        torch.manual_seed(hash_of(loop.seed, step, micro, here.rank) & 0xFFFFFFFF)
        draw = Draw.training(loop.seed, step, batch["place"], loop.global_batch, here.device)
        synchronise_gradients(system.trained, micro == accumulation - 1)
        with autocast(loop.precision, here.device):
            loss, parts = system.loss(to_device(batch, here.device), draw)
        (loss * (built.scaler.scale / accumulation)).backward()  # type: ignore[no-untyped-call]
        total += loss.detach().float() / accumulation
        for name, value in parts.items():
            logs[name] = logs.get(name, torch.zeros_like(total)) + value.float() / accumulation
    return total, logs


def _update(
    recipe: Recipe,
    built: Built,
    here: Ranks,
    progress: Progress,
    loss: Tensor,
    logs: dict[str, Tensor],
    window: Window,
    asked: int,
    skipped: int,
) -> int:
    """Clip and step, unless loss or gradient is not finite. Returns the signal that some rank was sent, or 0."""
    if progress.step == 0:
        _every_parameter_has_a_gradient(built)
    gradients = [p.grad for p in built.parameters if p.grad is not None]
    norm = full(get_total_norm(gradients, foreach=True)) / built.scaler.scale
    stops = [torch.full_like(loss, asked == number) for number in STOPS]
    values = torch.stack([loss, norm.float(), *stops, torch.full_like(loss, skipped), *logs.values()])
    # the one device-to-host synchronisation of an update; the norm is global already, its mean over ranks is itself
    loss_value, norm_value, terminated, interrupted, lost, *rest = here.mean(values).tolist()
    window.skipped = round(lost * here.world)
    finite = math.isfinite(loss_value) and math.isfinite(norm_value)
    if finite:
        limit = recipe.optim.max_grad_norm
        clip = min(1.0, limit / (norm_value + 1e-6)) if limit else 1.0
        if clip / built.scaler.scale != 1.0:
            torch._foreach_mul_([local(g) for g in gradients], clip / built.scaler.scale)
        built.optimizer.step()
        if built.ema is not None:
            built.ema.update()
        window.add(loss_value, norm_value, dict(zip(logs, rest, strict=True)))
        progress.nonfinite_in_a_row = 0
    elif not built.scaler.on or built.scaler.scale <= 1.0:
        progress.nonfinite += 1
        progress.nonfinite_in_a_row += 1
    built.scaler.update(finite)
    built.optimizer.zero_grad(set_to_none=True)
    if progress.nonfinite_in_a_row >= recipe.loop.max_nonfinite:
        raise UserError(
            f"step {progress.step}: loss {loss_value}, gradient norm {norm_value}: "
            f"{progress.nonfinite_in_a_row} updates in a row are not finite. "
            "Lower --lr, set --optim.max-grad-norm, or take --precision bf16 or fp32"
        )
    return next((number for number, on in zip(STOPS, (terminated, interrupted), strict=True) if on), 0)


def _every_parameter_has_a_gradient(built: Built) -> None:
    missing = [name for name, p in built.system.trained.named_parameters() if p.requires_grad and p.grad is None]
    if missing:
        raise UserError(
            f"{len(missing)} trained parameters got no gradient, so they would never learn: {', '.join(missing[:5])}"
        )


def save(recipe: Recipe, built: Built, here: Ranks, progress: Progress, skipped: Skipped, folder: Path) -> Path:
    """Write everything that goes on into `checkpoints/step-<n>`."""
    numbers = {
        "step": progress.step,
        "epoch": progress.position.epoch,
        "drawn": progress.position.drawn,
        "nonfinite": [progress.nonfinite, progress.nonfinite_in_a_row],
        "samples": [skipped.read, skipped.skipped],
        "scaler": [built.scaler.scale, built.scaler.good_steps],
        "ema_count": built.ema.count if built.ema else None,
        "optimizer_steps": checkpoint.optimizer_steps(built.system.trained, built.optimizer),
    }
    state = checkpoint.tensors(built.system.trained, built.optimizer, built.ema)
    return checkpoint.save(folder / "checkpoints", state, numbers, here, recipe.checkpoint.keep)


def restore(recipe: Recipe, built: Built, here: Ranks) -> tuple[Progress, Skipped]:
    """The state to start from: a fresh one, or that of the checkpoint which `build` found."""
    share = getattr(recipe.data, "max_bad_share", 0.0)
    if built.checkpoint is None:
        return Progress(), Skipped(share)
    numbers = checkpoint.numbers_of(built.checkpoint)
    checkpoint.materialise(built.system.trained, built.optimizer, numbers["optimizer_steps"])
    checkpoint.load(built.checkpoint, checkpoint.tensors(built.system.trained, built.optimizer, built.ema), here)
    built.scaler.scale, built.scaler.good_steps = numbers["scaler"]
    if built.ema is not None:
        built.ema.count = numbers["ema_count"]
    progress = Progress(numbers["step"], Position(numbers["epoch"], numbers["drawn"]), *numbers["nonfinite"])
    return progress, Skipped(share, *numbers["samples"])

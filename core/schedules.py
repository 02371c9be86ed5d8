"""Learning-rate factors as pure functions of the step, by the names of diffusers' `get_scheduler`, and `multistep`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from core.slots import Optim, Schedule


def lr_factor(schedule: Schedule, step: int, total: int, lr: float = 1.0) -> float:
    """Factor on the learning rate at update `step` (from 0) of `total`. `lr` matters to polynomial's `lr_end` alone."""
    if schedule.name == "piecewise_constant":
        return _piecewise(schedule.rules, step)
    warmup = schedule.warmup_steps or round(schedule.warmup_ratio * total)
    if step < warmup:
        return step / warmup
    done = min(max((step - warmup) / max(1, total - warmup), 0.0), 1.0)
    match schedule.name:
        case "linear":
            return 1.0 - done
        case "cosine":
            return max(0.0, 0.5 * (1.0 + math.cos(2.0 * math.pi * schedule.num_cycles * done)))
        case "cosine_with_restarts":
            cycles = max(1, round(schedule.num_cycles))
            return 0.0 if done >= 1.0 else max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((cycles * done) % 1.0))))
        case "polynomial":
            end = schedule.lr_end / lr
            return end + (1.0 - end) * (1.0 - done) ** schedule.power
        case "multistep":
            return schedule.gamma ** sum(step >= m for m in schedule.milestones)
        case _:  # constant, constant_with_warmup
            return 1.0


def _piecewise(rules: str, step: int) -> float:
    *steps, last = rules.split(",")
    for rule in steps:
        factor, until = rule.split(":")
        if step < int(until):
            return float(factor)
    return float(last)


def learning_rate(optim: Optim, step: int, total: int) -> float:
    """The learning rate of update `step` (from 0)."""
    return optim.lr * lr_factor(optim.schedule, step, total, optim.lr)

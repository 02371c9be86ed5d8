"""Learning rates by the names of diffusers, held against diffusers."""

import pytest
import torch
from diffusers.optimization import get_scheduler

from core.schedules import learning_rate, lr_factor
from core.slots import AdamW, Schedule, SlotError

TOTAL, WARMUP = 50, 7


def theirs(name: str, **options) -> list[float]:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = get_scheduler(name, optimizer, **options)
    rates = []
    for _ in range(TOTAL):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


CASES = {
    "constant": ({}, {}),
    "constant_with_warmup": ({"warmup_steps": WARMUP}, {"num_warmup_steps": WARMUP}),
    "linear": ({"warmup_steps": WARMUP}, {"num_warmup_steps": WARMUP, "num_training_steps": TOTAL}),
    "cosine": ({"warmup_steps": WARMUP}, {"num_warmup_steps": WARMUP, "num_training_steps": TOTAL, "num_cycles": 0.5}),
    "cosine_with_restarts": (
        {"warmup_steps": WARMUP, "num_cycles": 3.0},
        {"num_warmup_steps": WARMUP, "num_training_steps": TOTAL, "num_cycles": 3},
    ),
    "polynomial": (
        {"warmup_steps": WARMUP, "power": 2.0},
        {"num_warmup_steps": WARMUP, "num_training_steps": TOTAL, "power": 2.0},
    ),
    "piecewise_constant": ({"rules": "1:10,0.1:20,0.01"}, {"step_rules": "1:10,0.1:20,0.01"}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_schedule_equals_that_of_diffusers(name):
    ours, options = CASES[name]
    optim = AdamW(lr=0.5, schedule=Schedule(name=name, **ours))
    assert [learning_rate(optim, s, TOTAL) for s in range(TOTAL)] == pytest.approx(
        theirs(name, **options), rel=1e-9, abs=1e-12
    )


def test_multistep_multiplies_at_each_milestone():
    schedule = Schedule(name="multistep", milestones=(3, 5), gamma=0.5)
    assert [lr_factor(schedule, s, 10) for s in range(7)] == [1, 1, 1, 0.5, 0.5, 0.25, 0.25]


def test_a_warm_up_ratio_is_a_share_of_all_updates():
    by_ratio = Schedule(name="linear", warmup_ratio=0.2)
    by_steps = Schedule(name="linear", warmup_steps=10)
    assert [lr_factor(by_ratio, s, 50) for s in range(50)] == [lr_factor(by_steps, s, 50) for s in range(50)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "cosin"},
        {"name": "multistep"},
        {"name": "constant", "warmup_steps": 5},
        {"name": "linear", "warmup_steps": 5, "warmup_ratio": 0.1},
        {"name": "piecewise_constant", "rules": "1:x"},
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(SlotError, match="Schedule"):
        Schedule(**wrong)

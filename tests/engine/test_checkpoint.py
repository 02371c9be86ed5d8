"""Checkpoints on disk."""

import json

import pytest
import torch
from torch import nn

from core import checkpoint
from core.distributed import Ranks
from core.ema import EMA
from core.errors import UserError
from core.meters import Window
from core.saver import Saver
from core.slots import EMA as EMASlot

HERE = Ranks(torch.device("cpu"), 0, 1, None)


def trained(updates: int):
    torch.manual_seed(updates)
    modules = nn.ModuleDict({"unet": nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))})
    optimizer = torch.optim.AdamW(modules.parameters(), lr=0.1)
    ema = EMA(EMASlot(), modules)
    for _ in range(updates):
        modules["unet"](torch.randn(6, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
    return modules, optimizer, ema


def numbers(step, modules, optimizer):
    counted = {"epoch": 0, "drawn": step, "nonfinite": [0, 0], "samples": [step, 0], "scaler": [1.0, 0]}
    rest = {"ema_count": step, "threads": 1, "world": 1, "window": vars(Window())}
    return {"step": step, "optimizer_steps": checkpoint.optimizer_steps(modules, optimizer)} | counted | rest


def save(folder, step, modules, optimizer, ema, keep=None):
    saver = Saver(folder, HERE, keep, lambda path, step, about: None)
    saver.save(checkpoint.tensors(modules, optimizer, ema), numbers(step, modules, optimizer), "{}")
    saver.join()
    assert saver.failure() is None
    return folder / f"step-{step:08d}"


def test_a_checkpoint_brings_back_every_bit(tmp_path):
    modules, optimizer, ema = trained(3)
    kept = {k: v.clone() for k, v in checkpoint.tensors(modules, optimizer, ema).items()}
    path = save(tmp_path, 3, modules, optimizer, ema)

    other, other_optimizer, other_ema = trained(0)
    checkpoint.materialise(other, other_optimizer, checkpoint.numbers_of(path)["optimizer_steps"])
    state = checkpoint.tensors(other, other_optimizer, other_ema)
    checkpoint.load(path, state, HERE)
    assert state.keys() == kept.keys() and len(state) == 9 + 6 + 12
    assert all(torch.equal(state[name], kept[name]) for name in kept)
    assert checkpoint.optimizer_steps(other, other_optimizer) == checkpoint.optimizer_steps(modules, optimizer)


def test_only_tensors_and_plain_json_are_written(tmp_path):
    modules, optimizer, ema = trained(1)
    path = save(tmp_path, 1, modules, optimizer, ema)
    assert {p.suffix for p in path.iterdir()} == {".safetensors", ".json"}


def test_the_newest_are_kept_and_a_half_written_one_does_not_count(tmp_path):
    modules, optimizer, ema = trained(1)
    for step in (5, 10, 15):
        save(tmp_path, step, modules, optimizer, ema, keep=2)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step-00000015", "step-00000010"]
    (tmp_path / "step-00000020").mkdir()
    (tmp_path / ".partial-step-00000025").mkdir()
    found, damaged = checkpoint.newest(tmp_path)
    assert found.name == "step-00000015" and [line.split(": ", 1)[1] for line in damaged] == [
        "half-written: it has no manifest.json"
    ]
    assert checkpoint.newest(tmp_path / "nowhere") == (None, [])


def test_a_checkpoint_of_another_network_is_refused_by_name(tmp_path):
    modules, optimizer, ema = trained(1)
    path = save(tmp_path, 1, modules, optimizer, ema)
    other = nn.ModuleDict({"unet": nn.Sequential(nn.Linear(4, 7))})
    with pytest.raises(UserError, match="does not fit this recipe"):
        checkpoint.load(path, checkpoint.tensors(other, None, None), HERE)


@pytest.mark.parametrize(
    ("text", "says"), [("{", "cannot be read"), ("[]", "cannot be read"), (json.dumps({"format": 99}), "newer version")]
)
def test_damaged_or_newer_numbers_are_refused(tmp_path, text, says):
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(UserError, match=says):
        checkpoint.numbers_of(tmp_path)

"""Optimizers: their kernels agree, their state comes back, and what is missing is said."""

import sys

import pytest
import torch
from torch import nn

from core import checkpoint
from core.build import parameter_groups
from core.errors import UserError
from core.slots import AdamW, AdamW8bit, Lion
from tests.engine.processes import run_ranks
from tests.engine.running import losses, short
from tests.engine.test_checkpoint import HERE, save

SLOTS = [*(AdamW(lr=0.01, kernels=k) for k in ("fused", "foreach", "loop")), Lion(lr=0.001), AdamW8bit(lr=0.01)]
LIBRARIES = {Lion: "lion_pytorch", AdamW8bit: "bitsandbytes"}


def begun(slot):
    """A small network with a weight that 8-bit moments are kept for (4,096 numbers or more), and its optimizer."""
    if type(slot) in LIBRARIES:
        pytest.importorskip(LIBRARIES[type(slot)])
    torch.manual_seed(0)
    modules = nn.ModuleDict({"unet": nn.Sequential(nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 2))})
    return modules, slot.build(parameter_groups(modules, slot), fused=True)


def update(modules, optimizer, steps):
    for step in steps:
        x = torch.randn(8, 96, generator=torch.Generator().manual_seed(step))
        (modules["unet"](x) - 1.0).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def test_every_kernel_of_adamw_takes_the_same_steps():
    networks = []
    for slot in SLOTS[:3]:
        modules, optimizer = begun(slot)
        update(modules, optimizer, range(5))
        networks.append(list(modules.parameters()))
    for found in networks[1:]:
        for a, b in zip(found, networks[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("slot", SLOTS, ids=lambda slot: f"{type(slot).__name__}-{getattr(slot, 'kernels', '')}")
def test_an_optimizer_goes_on_from_a_checkpoint_with_every_bit(slot, tmp_path):
    whole, optimizer = begun(slot)
    update(whole, optimizer, range(6))
    first, optimizer = begun(slot)
    update(first, optimizer, range(3))
    path = save(tmp_path, 3, first, optimizer, None)

    then, optimizer = begun(slot)
    steps = checkpoint.numbers_of(path)["optimizer_steps"]
    checkpoint.materialise(then, optimizer, steps)
    checkpoint.load(path, checkpoint.tensors(then, optimizer, None), HERE)
    assert set(steps.values()) == {0.0 if isinstance(slot, Lion) else 3.0}
    update(then, optimizer, range(3, 6))
    for a, b in zip(then.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)


def test_lion_on_two_ranks_that_share_its_state_goes_on_on_one_with_the_losses_of_one(sky, store, tmp_path):
    pytest.importorskip("lion_pytorch")

    def recipe(steps, more=""):
        made = short("lvdm-video-vae-tiny", sky, f"--batch-size 1 --max-steps {steps} {more}")
        return made.but(optim=Lion(lr=1e-4, weight_decay=0.01))

    one = run_ranks(recipe(4), 1, tmp_path / "one", store)
    run_ranks(recipe(2, "--parallel.shard None"), 2, tmp_path / "two", store)
    two = run_ranks(recipe(4, "--parallel.shard None"), 1, tmp_path / "two", store, resume="auto")
    assert losses(two).keys() == {1, 2, 3, 4} and losses(two) == pytest.approx(losses(one), rel=1e-4)


@pytest.mark.parametrize("slot", SLOTS[3:], ids=lambda slot: type(slot).__name__)
def test_a_library_that_is_missing_is_named_before_anything_is_built(slot, monkeypatch):
    monkeypatch.setitem(sys.modules, LIBRARIES[type(slot)], None)
    with pytest.raises(UserError, match=rf"{type(slot).__name__} needs .*\[optimizers\]'"):
        slot.ready(1)


def test_what_cannot_be_spread_over_ranks_is_refused():
    with pytest.raises(UserError, match=r"no weights that are spread over 2 ranks.*--optim=AdamW"):
        AdamW8bit().ready(2)
    with pytest.raises(UserError, match="fused kernels know no sharded weights on the CPU; take foreach"):
        AdamW(kernels="fused").build([], fused=False)

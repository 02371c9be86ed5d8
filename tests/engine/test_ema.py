"""The moving average."""

import pytest
import torch
from torch import nn

from core.ema import EMA
from core.slots import EMA as Slot


def model() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"unet": nn.Linear(3, 2)})


def test_the_average_follows_the_formula_of_lvdm():
    modules = model()
    ema = EMA(Slot(decay=0.9), modules)
    expected = {n: p.detach().double().clone() for n, p in modules.named_parameters()}
    for n in range(1, 40):
        with torch.no_grad():
            for p in modules.parameters():
                p.add_(torch.randn_like(p))
        ema.update()
        d = min(0.9, (1 + n) / (10 + n))
        for name, p in modules.named_parameters():
            expected[name] -= (1 - d) * (expected[name] - p.detach().double())
    for name, value in expected.items():
        torch.testing.assert_close(ema.average[name].double(), value, rtol=1e-5, atol=1e-6)


def test_within_applied_the_modules_hold_the_average_and_afterwards_their_own_weights():
    modules = model()
    ema = EMA(Slot(decay=0.5, warmup=False), modules)
    with torch.no_grad():
        modules["unet"].weight.add_(1.0)
    ema.update()
    raw, average = modules["unet"].weight.detach().clone(), ema.average["unet.weight"].clone()
    assert not torch.equal(raw, average)
    with pytest.raises(RuntimeError), ema.applied():
        assert torch.equal(modules["unet"].weight, average)
        raise RuntimeError
    assert torch.equal(modules["unet"].weight, raw)
    assert torch.equal(ema.average["unet.weight"], average)

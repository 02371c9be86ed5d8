"""The host waits for the device once an update. That loss and gradients never do follows from test_flops: on the meta
device there is nothing to wait for, and torch refuses to read a value.
"""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from core.build import build
from core.distributed import Ranks
from core.loader import Skipped
from core.slots import EMA, Launch
from core.state import State
from core.stopping import NOTHING
from core.train import _Sums, _update
from tests.engine.running import short

FETCHES = {"item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__", "__index__", "equal"}


class Fetches(TorchFunctionMode):
    """Names of the calls that would bring values of a device to the host."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in FETCHES:
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_norm_clipping_step_and_average_take_one_fetch_together(sky, tmp_path, precision):
    recipe = short("lvdm-video-vae-tiny", sky, f"--precision {precision} --optim.max-grad-norm 0.1")
    recipe = recipe.but(optim=recipe.optim.but(ema=EMA()))
    here = Ranks(torch.device("cpu"), 0, 1, None)
    built = build(recipe, Launch(output_dir=tmp_path / "run"), here)
    before = [p.detach().clone() for p in built.parameters]
    for p in built.parameters:
        p.grad = torch.randn_like(p)
    sums = _Sums(torch.tensor(1.0), {"kl": torch.tensor(2.0)}, [])
    with Fetches() as fetches:
        _update(recipe, built, here, State(Skipped(0.0), step=1), sums, NOTHING)
    assert fetches.found == ["tolist"]
    assert all(not torch.equal(a, b) for a, b in zip(before, built.parameters, strict=True))

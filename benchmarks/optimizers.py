"""Seconds of an optimizer step and of the moving average, against a loop over tensors: those of four copies of the tiny
sky model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.measure import Row, alternate
from core.build import parameter_groups
from core.ema import EMA
from core.slots import EMA as EMASlot
from core.slots import AdamW
from registry import get

COPIES, ROUNDS = 4, 15


def rows() -> list[Row]:
    """A row a choice of `optim.kernels`, and one for the average."""
    modules = nn.ModuleDict({f"unet{i}": get("lvdm-short-sky-tiny").system.denoiser.build() for i in range(COPIES)})
    for p in modules.parameters():
        p.grad = torch.randn_like(p)
    naive = _step(modules, "loop")
    found = []
    for kernels in ("fused", "foreach"):
        this, limit = alternate(_step(modules, kernels), naive, ROUNDS)
        found.append(Row(f"AdamW, a step, {kernels} / a loop over tensors", this * 1e3, limit * 1e3, "ms", "<= 1"))
    this, limit = alternate(EMA(EMASlot(warmup=False), modules).update, _naive_average(modules), ROUNDS)
    return [*found, Row("EMA, an update / a loop over tensors", this * 1e3, limit * 1e3, "ms", "<= 1")]


def _step(modules: nn.ModuleDict, kernels: str) -> Callable[[], None]:
    slot = AdamW(lr=1e-6, kernels=kernels)  # type: ignore[arg-type]
    return slot.build(parameter_groups(modules, slot), fused=True).step  # type: ignore[return-value]


def _naive_average(modules: nn.ModuleDict) -> Callable[[], None]:
    """average = decay average + (1 - decay) weights, tensor by tensor, as it is often written."""
    average: dict[str, Tensor] = {name: p.detach().clone() for name, p in modules.named_parameters()}

    @torch.no_grad()
    def update() -> None:
        for name, p in modules.named_parameters():
            average[name] = 0.9999 * average[name] + (1 - 0.9999) * p

    return update

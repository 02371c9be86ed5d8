"""Precision: autocast over fp32 weights, and the loss scaler that fp16 needs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Where the forward pass of the trained networks runs. Weights, loss, schedules and norms stay fp32."""
    if precision == "fp32" or device.type == "meta":
        return nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Where a frozen network computes in its own dtype, whatever is around it."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


class Scaler:
    """Dynamic loss scale of fp16 (arXiv 1710.03740 §3.2); 1 and inert otherwise.

    Unlike torch's GradScaler it costs no pass over the gradients and no synchronisation of its own: the loop divides
    the gradient norm by `scale`, and one multiplication of the gradients does both the unscaling and the clipping.
    """

    GROWTH, BACKOFF, INTERVAL = 2.0, 0.5, 2000

    def __init__(self, precision: str) -> None:
        self.on = precision == "fp16"
        self.scale = 2.0**15 if self.on else 1.0
        self.good_steps = 0

    def update(self, finite: bool) -> bool:
        """Account for one update. Returns whether a non-finite gradient is explained by the scale (which is then
        lowered).
        """
        if not self.on:
            return False
        if finite:
            self.good_steps += 1
            if self.good_steps == self.INTERVAL:
                self.scale, self.good_steps = self.scale * self.GROWTH, 0
            return False
        self.good_steps = 0
        if self.scale <= 1.0:
            return False
        self.scale *= self.BACKOFF
        return True

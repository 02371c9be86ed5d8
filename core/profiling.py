"""A trace of a few updates, for chrome://tracing or Perfetto."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from core.distributed import Ranks


class Steps(Protocol):
    """What the loop tells after every update."""

    def step(self) -> None: ...


class _Off:
    def step(self) -> None:
        """Nothing is profiled."""


@contextmanager
def profiler(updates: int, folder: Path, here: Ranks) -> Iterator[Steps]:
    """Trace `updates` updates after three of warm-up into `profile.json` (rank 0). 0: nothing."""
    if not updates or not here.first:
        yield _Off()
        return
    from torch.profiler import ProfilerActivity, profile, schedule

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if here.device.type == "cuda" else [])
    with profile(
        activities=activities,
        schedule=schedule(wait=2, warmup=1, active=updates, repeat=1),
        on_trace_ready=lambda p: p.export_chrome_trace(str(folder / "profile.json")),
        record_shapes=True,
    ) as running:
        yield running

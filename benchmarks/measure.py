"""A row of the table, and timing that survives a noisy machine: alternate, repeat, take medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One comparison. `this` and `limit` in `unit`; `goal` is the ratio to stay within."""

    what: str
    this: float
    limit: float
    unit: str
    goal: str

    def __str__(self) -> str:
        numbers = (f"{value:.3g} {self.unit}" for value in (self.this, self.limit))
        return "".join(
            [f"{self.what:<52}", *(f"{n:>12}" for n in numbers), f"{self.this / self.limit:>8.3f}  {self.goal:>6}"]
        )


def alternate(ours: Callable[[], None], limit: Callable[[], None], rounds: int) -> tuple[float, float]:
    """Median seconds of both, taken in turns so that the machine's moods fall on both."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for call, kept in zip((ours, limit), times, strict=True):
            began = time.perf_counter()
            call()
            kept.append(time.perf_counter() - began)
    return statistics.median(times[0]), statistics.median(times[1])

"""Whether the process of a run still lives, judged from what the run's tags say of it. MLflow itself cannot know: after
kill -9 or a power cut a run says RUNNING for ever.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Literal, NamedTuple

from core import provenance

FRESH = 90.0
"""Seconds: a sign of life this young, three intervals of it, outweighs every other sign."""


class Verdict(NamedTuple):
    """alive, dead, or suspected (silent, and out of sight); with the reason."""

    state: Literal["alive", "dead", "suspected"]
    why: str


def judge(tags: Mapping[str, str], stale: float) -> Verdict:
    """The verdict on a run that says RUNNING; `stale` is the silence in seconds that makes one out of sight suspected.

    Same machine, boot and process namespace: the process table knows. Same machine, another boot: dead. Elsewhere, or
    in another container: only silence can be seen.
    """
    quiet = silence(tags)
    if tags.get("host") == socket.gethostname():
        if tags.get("process.boot") != provenance.boot_id():
            if quiet > FRESH:
                return Verdict("dead", "the machine was started again since")
        elif tags.get("process.namespace") == provenance.namespace():
            return _of_this_machine(tags)
    if quiet <= stale:
        return Verdict("alive", f"last sign of life {quiet:.0f} s ago, on {tags.get('host', 'an unknown host')}")
    return Verdict("suspected", f"silent for {_spoken(quiet)}, on {tags.get('host', 'an unknown host')}")


def _of_this_machine(tags: Mapping[str, str]) -> Verdict:
    pid = tags.get("pid", "")
    started = provenance.started(int(pid)) if pid.isdigit() else ""
    if started and started == tags.get("process.started"):
        return Verdict("alive", f"process {pid} runs")
    return Verdict("dead", f"process {pid} {'is another one now' if started else 'is gone'}")


def silence(tags: Mapping[str, str]) -> float:
    """Seconds since the last sign of life; a run that never gave one is silent for ever."""
    said = last_sign(tags)
    return max(0.0, time.time() - said.timestamp()) if said else float("inf")


def last_sign(tags: Mapping[str, str]) -> datetime | None:
    """When the run gave its last sign of life."""
    try:
        said = datetime.fromisoformat(tags["heartbeat"])
    except (KeyError, ValueError):
        return None
    return said if said.tzinfo else said.replace(tzinfo=UTC)


def _spoken(seconds: float) -> str:
    if seconds == float("inf"):
        return "ever"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"

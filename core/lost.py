"""Which ranks did not come to a collective, and which collective it was: one line when a partner dies or hangs.

A rank whose collective fails says so in the store, which needs no partner, and waits for the others to say the same.
Who stays silent is dead or hangs. In a run without faults this costs nothing.
"""

from __future__ import annotations

import os
import re
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from core.errors import UserError

GONE = re.compile("Connection (closed|reset)|Broken pipe|Timed out|timed out|Socket Timeout|unhandled system error")
"""What gloo and NCCL say when a partner is gone, as plain RuntimeErrors."""
LATE = re.compile("(?i)timed out|timeout")
AFTER_TIMEOUT, AFTER_CLOSING = 6.0, 2.0
"""Seconds in which the others notice the same: a closed connection breaks theirs at once, a timeout began with each."""
COLLECTIVE = re.compile("all_|reduce|broadcast|gather|scatter|barrier")
CORE = Path(__file__).parent


@contextmanager
def named_when_lost(
    rank: int, world: int, store: Store | None, timeout: float, update: Callable[[], int] = lambda: 0
) -> Iterator[None]:
    """Within: an error of a collective is a UserError that names ranks, collective and update."""
    try:
        yield
    except RuntimeError as error:
        if store is None or not (isinstance(error, dist.DistError) or GONE.search(str(error))):
            raise
        missing = _silent(store, rank, world, AFTER_TIMEOUT if LATE.search(str(error)) else AFTER_CLOSING)
        names = ", ".join(map(str, missing))
        who = f"rank{'s' if len(missing) > 1 else ''} {names}" if missing else "another rank"
        when = f" in update {update()}" if update() else ""
        raise UserError(
            f"rank {rank} of {world} lost {who}, which died, was killed or hangs (its own output may say why), in "
            f"{_place(error)}{when}; --timeout is {timeout:g} s: {str(error).strip().splitlines()[0]}"
        ) from error


def _silent(store: Store, rank: int, world: int, patience: float) -> list[int]:
    """The ranks that do not say within `patience` seconds that they have lost one too. [] where the store is gone."""
    silent = set(range(world)) - {rank}
    found: list[int] = []

    def ask() -> None:
        end = time.monotonic() + patience
        try:
            store.set(f"lost one {rank}", "")
            while silent and time.monotonic() < end:
                silent.difference_update([other for other in silent if store.check([f"lost one {other}"])])
                time.sleep(0.05)
        except RuntimeError:  # whoever held the store is gone with it
            return
        found.extend(sorted(silent))

    thread = threading.Thread(target=ask, daemon=True)  # a store in a process that hangs answers never
    thread.start()
    thread.join(patience + 1)
    return list(found)


def _place(error: BaseException) -> str:
    """The collective that failed and our function that asked for it, from the traceback."""
    codes = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    theirs = [code.co_name for code in codes if f"{os.sep}distributed{os.sep}" in code.co_filename]
    named = [name for name in theirs if COLLECTIVE.match(name)] or theirs
    ours = [code for code in codes if Path(code.co_filename).is_relative_to(CORE) and code.co_filename != __file__]
    asked = f", called by {ours[-1].co_qualname} ({Path(ours[-1].co_filename).name})" if ours else ""
    return (named[-1] if named else "a collective") + asked

"""From a plan to batches in memory: an ordinary DataLoader over keys, and the account of samples that could not be
read.
"""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from torch.utils.data import DataLoader

from core.errors import UserError
from core.positions import Key

WATCH = 2.0
"""Seconds from one look of a worker after its loop to the next."""


class _Keys:
    """A batch sampler that can be iterated once more by each DataLoader iterator (it is handed a factory, not an
    iterator).
    """

    def __init__(self, batches: Iterable[list[Key]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[Key]]:
        return iter(self.batches)


def batches(dataset: Any, keys: Iterable[list[Key]], *, workers: int, pin: bool) -> Iterator[dict[str, Any]]:
    """Batches (dicts of stacked tensors, with `id`, `place` and `bad`) for lists of keys, in order, whatever the number
    of workers.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=_Keys(keys),  # type: ignore[arg-type]
        collate_fn=dataset.collate,
        num_workers=workers,
        multiprocessing_context="forkserver" if workers else None,
        prefetch_factor=4 if workers else None,
        pin_memory=pin,
        generator=torch.Generator().manual_seed(0),
        worker_init_fn=functools.partial(_begin, os.getpid()),
    )
    try:
        yield from loader
    except UserError as error:  # from a worker process it comes wrapped in the worker's traceback
        raise UserError(str(error.args[0]).rstrip().splitlines()[-1].removeprefix("core.errors.UserError: ")) from None


def _begin(loop: int, worker: int) -> None:
    """A Ctrl-C reaches every process of the terminal; the loop still needs the batches of its last update. A worker
    ends with the loop, also with one that was killed: torch watches a worker's parent, which is the fork server, and
    that lives as long as its workers.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(loop,), daemon=True).start()


def _end_with(loop: int) -> None:
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(loop)
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(WATCH)
    os._exit(1)


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Tensors of a batch on `device`; the rest as it is."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


class Skipped:
    """Counts samples that could not be read, and stops the run when they are more than a set share."""

    def __init__(self, max_share: float, read: int = 0, skipped: int = 0) -> None:
        self.max_share, self.read, self.skipped = max_share, read, skipped
        self.names: dict[str, str] = {}

    def count(self, batch: dict[str, Any]) -> list[tuple[str, str]]:
        """Account for one batch; returns the (name, reason) pairs seen for the first time. Raises UserError above the
        share.
        """
        bad = batch.get("bad", [])
        self.read += len(batch["id"])
        self.skipped += len(bad)
        new = [(name, reason) for name, reason in bad if name not in self.names]
        self.names.update(new)
        tried = self.read + self.skipped
        # a single bad file among the first few samples is no verdict on a dataset
        if self.skipped > max(self.max_share * tried, 3):
            examples = "; ".join(f"{n} ({r})" for n, r in list(self.names.items())[:3])
            raise UserError(
                f"{self.skipped} of {tried} samples could not be read, more than data.max_bad_share = "
                f"{self.max_share}: {examples}"
            )
        return new

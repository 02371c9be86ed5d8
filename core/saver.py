"""Writes checkpoints while training goes on: the loop waits for the copy off the device, a thread does the rest.

Nothing is removed before the new checkpoint is whole and renamed into place, so the last good one outlives a full
disk, a kill and a power cut.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from core import manifest
from core.checkpoint import FORMAT, checkpoints, quiet, reason
from core.distributed import Ranks
from core.files import sync_folder

Saved = Callable[[Path, int, Any], None]
"""Told of a checkpoint: its folder, its step, what was said about it."""
MARGIN = 1.05
"""Free space that a checkpoint needs, as a multiple of its tensors' bytes."""


@dataclass(frozen=True)
class _Job:
    """One checkpoint on its way to the disk."""

    target: Path
    partial: Path
    state: dict[str, Tensor]
    numbers: dict[str, Any]
    recipe: str
    about: Any


class Saver:
    """Saves into `folder`, one checkpoint at a time, and keeps the newest `keep` (None: all). Every call is a
    collective. `saved` is told of each that is in place, on rank 0, in the thread.
    """

    def __init__(self, folder: Path, ranks: Ranks, keep: int | None, saved: Saved) -> None:
        self.folder, self.ranks, self.keep, self.saved = folder, ranks, keep, saved
        cuda = ranks.device.type == "cuda"
        self._stager = DefaultStager(StagingOptions(cuda, False, False, cuda))
        self._thread: threading.Thread | None = None
        self._failure: str | None = None

    def save(self, state: dict[str, Tensor], numbers: dict[str, Any], recipe: str, about: Any = None) -> None:
        """Copy `state` off the device, and let the thread write it, once the one before is done. `about` is handed to
        `saved`.
        """
        self.join()
        name = f"step-{numbers['step']:08d}"
        copy = self._stager.stage(state)
        job = _Job(self.folder / name, self.folder / f".partial-{name}", copy, numbers, recipe, about)  # type: ignore[arg-type]
        self._failure = None
        self._thread = threading.Thread(target=self._work, args=(job,), name="checkpoint", daemon=True)
        self._thread.start()

    def join(self, patience: float | None = None) -> None:
        """Wait (at most `patience` seconds) until what was handed over is on the disk, or has failed."""
        if self._thread is not None:
            self._thread.join(patience)

    def failure(self) -> str | None:
        """Why the last checkpoint could not be written, said once. After `join` it is the same on every rank."""
        said, self._failure = self._failure, None
        return said

    def _work(self, job: _Job) -> None:
        """The thread. Whatever one rank meets, all ranks learn, and none is left waiting for it."""
        found: Sequence[Any] = ()
        for stage in (self._make_room, self._write, self._hash, self._complete):
            met, value = None, None
            try:
                value = stage(job, found)
            except BaseException as error:  # noqa: BLE001  torch's CheckpointException is no Exception; all are reported
                met = reason(error)
            met_by_rank, found = zip(*self.ranks.collect((met, value)), strict=True)
            failures = sorted({text for text in met_by_rank if text})
            if failures:
                if self.ranks.first:
                    shutil.rmtree(job.partial, ignore_errors=True)
                self._failure = f"checkpoint {job.target} could not be written: {'; '.join(failures)}"
                return
        if self.ranks.first:
            self.saved(job.target, job.numbers["step"], job.about)

    def _make_room(self, job: _Job, found: Sequence[Any]) -> None:
        """Rank 0 clears what a kill left, and makes sure that the new checkpoint fits beside the old ones."""
        if not self.ranks.first:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".*step-*"):
            shutil.rmtree(left, ignore_errors=True)
        need = int(sum(t.numel() * t.element_size() for t in job.state.values()) * MARGIN)
        free = shutil.disk_usage(self.folder).free
        if free < need:
            raise OSError(f"it needs {need / 2**20:,.1f} MiB and the disk has {free / 2**20:,.1f} MiB free")
        job.partial.mkdir()

    def _write(self, job: _Job, found: Sequence[Any]) -> None:
        """Each rank its shards; rank 0 the numbers and the recipe."""
        if self.ranks.first:
            (job.partial / "state.json").write_text(json.dumps({"format": FORMAT} | job.numbers, indent=1))
            (job.partial / "recipe.json").write_text(job.recipe)
        writer = HuggingFaceStorageWriter(str(job.partial), save_distributed=True)
        with quiet():
            save_distributed(
                job.state,
                storage_writer=writer,
                process_group=self.ranks.background,
                no_dist=self.ranks.mesh is None,
            )

    def _hash(self, job: _Job, found: Sequence[Any]) -> dict[str, dict[str, Any]]:
        return manifest.digests(job.partial, self.ranks.rank, self.ranks.world)

    def _complete(self, job: _Job, found: Sequence[Any]) -> None:
        """The manifest, then the name, then the old ones go: each is renamed before it is removed, so that none is
        ever there in part.
        """
        if not self.ranks.first:
            return
        manifest.write(job.partial, {name: entry for part in found for name, entry in part.items()})
        if job.target.exists():
            self._remove(job.target)
        job.partial.replace(job.target)
        sync_folder(self.folder)
        older = [path for path in checkpoints(self.folder) if path.name <= job.target.name]
        for path in [] if self.keep is None else older[self.keep :]:
            self._remove(path)

    def _remove(self, path: Path) -> None:
        aside = path.with_name(f".old-{path.name}")
        path.replace(aside)
        shutil.rmtree(aside)

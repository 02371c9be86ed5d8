"""What a run tells: terminal, log, MLflow, samples and exports. Rank 0 writes; validation and sampling are done by all
ranks.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.build import Built
from core.distributed import Ranks, full
from core.journal import said
from core.media import enlarged, four_frames, sheet, tiled, to_uint8, write_gif, write_mp4
from core.mlflow_page import CELLS
from core.progress import Progress
from core.recipe_file import recipe_hash
from core.redact import redact
from core.slots import Launch, Recipe
from core.systems import System
from core.tracker import Tracker, open_run
from core.validate import evaluate, frechet, generate, reconstructions


class Report:
    """One object for everything that leaves the loop, so that the loop stays readable."""

    def __init__(self, recipe: Recipe, built: Built, here: Ranks, tracker: Tracker | None, run_id: str) -> None:
        self.recipe, self.here, self.tracker, self._run_id = recipe, here, tracker, run_id
        self.folder = built.folder
        self.bar = Progress(None, 0, 0)
        self.now = 0

    @classmethod
    def open(cls, recipe: Recipe, launch: Launch, built: Built, here: Ranks, argv: Sequence[str]) -> Report:
        """Open the run (rank 0), with all that is known before the first update."""
        tracker = None
        if here.first:
            tracker = open_run(
                recipe,
                store=launch.store,
                run_name=built.run_name,
                output_dir=built.folder,
                argv=argv,
                data={"training": built.dataset.describe(), "validation": built.held_out.describe()},
                device=_described(here),
            )
        try:
            return cls(recipe, built, here, tracker, here.agree(tracker.run_id if tracker else ""))
        except BaseException:  # another rank is gone
            if tracker is not None:
                tracker.close("FAILED")
            raise

    @property
    def run_id(self) -> str:
        """The MLflow id; empty as long as the store has not answered."""
        return self.tracker.run_id if self.tracker else self._run_id

    def begin(self, step: int, total: int) -> None:
        """The first lines: what runs, where, from which step."""
        self.now = step
        self.bar = Progress(self.folder / "run.log" if self.here.first else None, total, step)
        if self.tracker is not None:
            self.tracker.say = self.bar.line
        trained = "resumed at" if step else "from"
        self.bar.line(
            f"{self.recipe.name}: {trained} step {step} of {total}, {self.here.world} x {self.here.device.type}, "
            f"output in {self.folder}"
        )

    def step(self, step: int) -> None:
        """An update is done."""
        self.now = step
        self.bar.step(step)

    def metrics(self, values: dict[str, float], step: int | None = None) -> None:
        """Log numbers."""
        if self.tracker is not None:
            self.tracker.metrics(values, self.now if step is None else step)
        if "loss" in values:
            self.bar.metrics(self.now if step is None else step, values)

    def skipped(self, new: list[tuple[str, str]]) -> None:
        """Name the samples that could not be read."""
        for name, reason in new:
            self.bar.line(f"skipped {name}: {reason}")

    def _averaged(self, built: Built) -> AbstractContextManager[None]:
        return built.ema.applied() if built.ema else nullcontext()

    def validate(self, system: System, built: Built) -> dict[str, float]:
        """The held-out loss, under the averaged weights."""
        system.mode(training=False)
        with self._averaged(built):
            values = evaluate(system, built.held_out, self.recipe, self.here)
        system.mode(training=True)
        self.metrics(values)
        self.bar.line(f"step {self.now}  " + "  ".join(f"{k} {v:.4f}" for k, v in values.items()))
        return values

    def sample(self, system: System, built: Built, final: bool = False) -> dict[str, float]:
        """Samples and reconstructions as files and in MLflow; at the end of the run the Fréchet distance too."""
        slot = self.recipe.validation
        count = max(slot.num_samples, slot.metric_clips if final else 0)
        system.mode(training=False)
        with self._averaged(built):
            made = generate(system, self.recipe, slot.sampler, count, self.here) if count else None
            rebuilt = reconstructions(system, built.held_out, self.recipe, self.here)
        system.mode(training=True)
        for name, clips in (("samples", made), ("reconstructions", rebuilt)):
            if clips is not None and self.here.first:
                self._show(name, clips if name == "reconstructions" else clips[: slot.num_samples])
        if made is None or not final or not slot.metric_clips:
            return {}
        values = self.here.agree(frechet(made, built.dataset, built.held_out, self.recipe) if self.here.first else None)
        self.metrics(values)
        self.bar.line("  ".join(f"{k.removeprefix('val/')} {v:.3f}" for k, v in values.items()))
        return dict(values)

    def _show(self, name: str, clips: Tensor) -> None:
        folder = self.folder / "samples" / f"step-{self.now:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        frames = to_uint8(clips)
        page = sheet(frames)
        page.save(folder / f"{name}.png")
        moving = enlarged(tiled(frames))
        write_mp4(folder / f"{name}.mp4", moving, self.recipe.validation.fps)
        write_gif(folder / f"{name}.gif", moving, self.recipe.validation.fps)
        if self.tracker is not None:
            self._series(name, frames, folder)
            self.tracker.artifact(folder / f"{name}.mp4", f"samples/step-{self.now:08d}")

    def _series(self, name: str, frames: np.ndarray, folder: Path) -> None:
        """Four frames of each clip (of a reconstruction: two, below two of the original) as a series of its own: in
        MLflow's grid of pictures two runs stand side by side, noise by noise.
        """
        assert self.tracker is not None
        rows = 2 if name == "reconstructions" else 1
        for cell in range(min(len(frames) // rows, CELLS)):
            path = folder / "cells" / f"{name}-{cell}.png"
            path.parent.mkdir(exist_ok=True)
            four_frames(frames[rows * cell : rows * (cell + 1)]).save(path)
            self.tracker.picture(path, f"{name}/{cell}", self.now)

    def saved(self, path: Path, step: int) -> None:
        """A checkpoint is complete on the disk: it becomes a LoggedModel with the newest metrics."""
        if self.tracker is None:
            return
        newest = self.tracker.journal.latest
        self.tracker.append(
            "checkpoint",
            path=str(path.relative_to(self.folder)),
            step=step,
            name=f"{path.name}-{self.recipe.name}".replace(".", "-"),  # the page cuts names at the end
            output_dir=str(self.folder.absolute()),
            recipe_hash=recipe_hash(self.recipe),
            files=_manifest(path),
            metrics=[
                {"name": k, "value": said(p.value), "step": p.step, "time": p.time, "dataset": self._dataset(k)}
                for k, p in newest.items()
                if not k.startswith("system/")
            ],
        )

    def _dataset(self, metric: str) -> tuple[str, str]:
        """Name and digest of the dataset that a metric is of."""
        assert self.tracker is not None
        context = "validation" if metric.startswith("val/") else "training"
        sets = {each["context"]: each for each in self.tracker.journal.last["data"]["sets"]}
        return sets[context]["name"], sets[context]["digest"]

    def export(self, system: System, built: Built) -> Path:
        """The trained networks as diffusers folders, averaged where there is an average; a collective."""
        folder = self.folder / "export"
        with self._averaged(built):  # to the end of the writing: these are views of what is swapped back
            weights = {
                name: {k: full(t.detach()) for k, t in m.state_dict().items()} for name, m in system.trained.items()
            }
            if self.here.first:
                system.export(folder, weights)
        return folder

    def close(self, status: str, error: BaseException | None = None) -> None:
        """End the run as FINISHED, FAILED (with the traceback as an artifact) or KILLED."""
        if error is not None and self.here.first:
            self._failed(error)
        self.bar.note(f"{status.lower()} at step {self.now}")
        self.bar.close()
        if self.tracker is not None:
            self.tracker.artifact(self.folder / "run.log")
            self.tracker.close(status)

    def _failed(self, error: BaseException) -> None:
        text = redact("".join(traceback.format_exception(error)))
        self.bar.note(text)
        if self.tracker is not None and not isinstance(error, KeyboardInterrupt):
            path = self.folder / "traceback.txt"
            path.write_text(text)
            self.tracker.artifact(path)
            self.tracker.tags({"error": "".join(traceback.format_exception_only(error)).strip()})


def _described(here: Ranks) -> str:
    """`2 x cpu`, `8 x cuda (NVIDIA H200)`."""
    name = f" ({torch.cuda.get_device_name(here.device)})" if here.device.type == "cuda" else ""
    return f"{here.world} x {here.device.type}{name}"


def _manifest(checkpoint: Path) -> Any:
    """Sizes of a checkpoint's files, or the hashes that were written with it."""
    path = checkpoint / "manifest.json"
    if path.is_file():
        return json.loads(path.read_text())
    return {file.name: {"bytes": file.stat().st_size} for file in sorted(checkpoint.iterdir())}

"""What a run tells: terminal, log, MLflow, samples and exports. Rank 0 writes; validation and sampling are done by all
ranks.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core import manifest
from core.build import Built, frozen_at_hand
from core.distributed import Ranks, full, is_spread
from core.flops import Utilisation
from core.journal import said
from core.media import enlarged, four_frames, overview, tiled, to_uint8, write_gif, write_mp4
from core.mlflow_page import CELLS
from core.models.partly import exported
from core.progress import Progress
from core.pushing import Pusher
from core.recipe_file import FILE_NAME, dump, recipe_hash
from core.redact import redact
from core.slots import Launch, Recipe
from core.stopping import Stop
from core.tracker import Tracker, open_run
from core.validate import evaluate, frechet, generate, metric, prompts_of, reconstructions


class Report:
    """One object for everything that leaves the loop, so that the loop stays readable."""

    def __init__(
        self, recipe: Recipe, built: Built, here: Ranks, tracker: Tracker | None, run_id: str, stop: Stop
    ) -> None:
        self.recipe, self.here, self.tracker, self._run_id = recipe, here, tracker, run_id
        self.folder, self.notes = built.start.folder, built.start.notes
        self.bar = Progress(None, 0, 0)
        self.now = 0
        self.table = list(built.dataset.lines()) if recipe.data.many_shapes else []
        """What is in which bucket, and what was left out."""
        self.speed = Utilisation(recipe, here.device, lambda line: self.bar.line(line))
        self._stop = stop
        self._skipped: Counter[str] = Counter()
        self._total = 0
        self.hub: Pusher | None = None
        self._hub_wait = 0.0

    def _asked(self) -> bool:
        """Whether some rank was asked to stop; a collective, between batches."""
        return self.here.any(bool(self._stop.signal))

    @classmethod
    def open(cls, recipe: Recipe, launch: Launch, built: Built, here: Ranks, argv: Sequence[str], stop: Stop) -> Report:
        """Open the run (rank 0), with all that is known before the first update."""
        tracker = None
        if here.first:
            tracker = open_run(
                recipe,
                store=launch.store,
                run_name=built.start.run_name,
                output_dir=built.start.folder,
                argv=argv,
                data={"training": built.dataset.describe(), "validation": built.held_out.describe()},
                device=_described(here),
            )
        try:
            report = cls(recipe, built, here, tracker, here.agree(tracker.run_id if tracker else ""), stop)
        except BaseException:  # another rank is gone
            if tracker is not None:
                tracker.close("FAILED")
            raise
        report._push(launch)
        return report

    def _push(self, launch: Launch) -> None:
        """Rank 0 uploads from now on, if that was asked for."""
        if self.here.first and launch.push_to_hub != "none":
            self._hub_wait = launch.hub_wait
            self.hub = Pusher(launch, self.folder, lambda line: self.bar.line(line), self._pushed)

    def _pushed(self, **facts: str) -> None:
        if self.tracker is not None:
            self.tracker.append("hub", **facts)
            self.tracker.tags({"hub": facts["address"]} if "address" in facts else {"hub.error": facts["why"]})

    @property
    def run_id(self) -> str:
        """The MLflow id; empty as long as the store has not answered."""
        return self.tracker.run_id if self.tracker else self._run_id

    def begin(self, step: int, total: int) -> None:
        """The first lines: what runs, where, from which step."""
        self.now, self._total = step, total
        self.bar = Progress(self.folder / "run.log" if self.here.first else None, total, step)
        for note in self.notes:
            self.bar.line(note)
        if self.tracker is not None:
            self.tracker.say = self.bar.line
        trained = "resumed at" if step else "from"
        self.bar.line(
            f"{self.recipe.name}: {trained} step {step} of {total}, {self.here.world} x {self.here.device.type}, "
            f"output in {self.folder}"
        )
        for each in self.tracker.journal.last["data"]["sets"] if self.tracker is not None else ():
            facts = (f"{v:,} {k}" if k == "samples" else f"{k} {v}" for k, v in each["profile"].items())
            self.bar.line(f"{each['context']} data: {', '.join(facts)}")
        for line in self.table if self.here.first else ():
            self.bar.line(line)

    def step(self, step: int, failure: str | None) -> None:
        """An update is done; `failure` says why the last checkpoint was not written, if so."""
        self.now = step
        self.bar.step(step)
        if failure is not None:
            self.bar.line(f"{failure}; training goes on, the checkpoints before it stay")

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
            self._skipped[reason.partition(":")[0]] += 1

    def _averaged(self, built: Built) -> AbstractContextManager[None]:
        return built.ema.applied() if built.ema else nullcontext()

    def validate(self, built: Built) -> dict[str, float]:
        """The held-out loss, under the averaged weights. Raises Leave when the run is to end."""
        system = built.system
        system.mode(training=False)
        with self._averaged(built):
            values = evaluate(system, built.held_out, self.recipe, self.here, self._asked)
        system.mode(training=True)
        self.metrics(values)
        self.bar.line(f"step {self.now}  " + "  ".join(f"{k} {v:.4f}" for k, v in values.items()))
        return values

    def sample(self, built: Built, final: bool = False) -> dict[str, float]:
        """Samples and reconstructions as files and in MLflow; at the end of the run the Fréchet distance too. Raises
        Leave when the run is to end.
        """
        system, slot = built.system, self.recipe.validation
        if built.cached and not slot.generates:  # nothing here needs the frozen networks
            return {}
        count = max(slot.num_samples, slot.metric_clips if final else 0)
        system.mode(training=False)
        with self._averaged(built), frozen_at_hand(self.recipe, built, self.here):
            prompts = prompts_of(self.recipe, built.held_out, count, self.here)
            made = (
                generate(system, self.recipe, slot.sampler, count, self.here, asked=self._asked, prompts=prompts)
                if count
                else None
            )
            rebuilt = reconstructions(system, built.held_out, self.recipe, self.here)
        system.mode(training=True)
        for name, clips in (("samples", made), ("reconstructions", rebuilt)):
            if clips is not None and self.here.first:
                self._show(name, clips if name == "reconstructions" else clips[: slot.num_samples])
        if made is not None and any(prompts) and self.here.first:
            self._say(prompts[: slot.num_samples])
        if made is None or not final or not slot.metric_clips:
            return {}
        values = self.here.agree(self._measured(made, prompts, built) if self.here.first else None)
        self.metrics(values)
        self.bar.line("  ".join(f"{k.removeprefix('val/')} {v:.3f}" for k, v in values.items()))
        return dict(values)

    def _measured(self, made: Tensor, prompts: Sequence[str], built: Built) -> dict[str, float]:
        """What generated clips are worth, each number beside its trivial baselines."""
        return frechet(made, built.dataset, built.held_out, self.recipe) | metric(
            made, prompts, built.held_out, self.recipe
        )

    def _show(self, name: str, clips: Tensor) -> None:
        folder = self.folder / "samples" / f"step-{self.now:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        frames = to_uint8(clips)
        overview(frames).save(folder / f"{name}.png")
        kind = "png"
        if frames.shape[1] > 1:
            moving, kind = enlarged(tiled(frames)), "mp4"
            write_mp4(folder / f"{name}.mp4", moving, self.recipe.validation.fps)
            write_gif(folder / f"{name}.gif", moving, self.recipe.validation.fps)
        if self.tracker is not None:
            self._series(name, frames, folder)
            self.tracker.artifact(folder / f"{name}.{kind}", f"samples/step-{self.now:08d}")

    def _say(self, prompts: Sequence[str]) -> None:
        """The prompts beside their samples, one a line."""
        path = self.folder / "samples" / f"step-{self.now:08d}" / "samples.txt"
        path.write_text("".join(f"{' '.join(prompt.split())}\n" for prompt in prompts), encoding="utf-8")
        if self.tracker is not None:
            self.tracker.artifact(path, f"samples/{path.parent.name}")

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

    def _dataset(self, metric: str) -> tuple[str, str]:
        """Name and digest of the dataset that a metric is of."""
        assert self.tracker is not None
        context = "validation" if metric.startswith("val/") else "training"
        sets = {each["context"]: each for each in self.tracker.journal.last["data"]["sets"]}
        return sets[context]["name"], sets[context]["digest"]

    def export(self, built: Built) -> Path:
        """The trained networks as diffusers folders, averaged where there is an average; a collective. Rank 0 alone
        gathers them, tensor by tensor, on the CPU.
        """
        folder, system = self.folder / "export", built.system
        # to the end of the writing: these may be views of what is swapped back
        with self._averaged(built), frozen_at_hand(self.recipe, built, self.here):
            networks = {name: exported(module) for name, module in system.trained.items()}
            networks |= {name: module.state_dict() for name, module in system.frozen.items() if is_spread(module)}
            weights: dict[str, dict[str, Tensor]] = {name: {} for name in networks}
            for name, tensors in networks.items():
                for key, tensor in tensors.items():
                    whole = full(tensor.detach())
                    if self.here.first:
                        weights[name][key] = whole.cpu()
            if self.here.first:
                system.export(folder, weights)
                (folder / FILE_NAME).write_text(dump(self.recipe))  # `sample` opens the folder wherever it goes
        if self.hub is not None:
            self.hub.exported(folder)
        return folder

    def newest(self) -> dict[str, Any]:
        """The newest point of every metric, as of now."""
        return dict(self.tracker.journal.latest) if self.tracker else {}

    def saved(self, path: Path, step: int, newest: dict[str, Any]) -> None:
        """A checkpoint is whole on the disk: it becomes a LoggedModel with the metrics that were the newest when it was
        handed over. The thread that wrote it calls this.
        """
        self.bar.note(f"saved {path}")
        if self.hub is not None:
            self.hub.saved(path, last=step == self._total)
        if self.tracker is None:
            return
        self.tracker.append(
            "checkpoint",
            path=str(path.relative_to(self.folder)),
            step=step,
            name=f"{path.name}-{self.recipe.name}".replace(".", "-"),  # the page cuts names at the end
            output_dir=str(self.folder.absolute()),
            recipe_hash=recipe_hash(self.recipe),
            files=manifest.read(path),
            metrics=[
                {"name": k, "value": said(p.value), "step": p.step, "time": p.time, "dataset": self._dataset(k)}
                for k, p in newest.items()
                if not k.startswith("system/")
            ],
        )

    def close(self, status: str, error: BaseException | None = None) -> None:
        """End the run as FINISHED, FAILED (with the traceback as an artifact) or KILLED."""
        if error is not None and self.here.first:
            self._failed(error)
        if self.hub is not None:
            self.hub.close(self._hub_wait if status == "FINISHED" else 0.0, lambda: bool(self._stop.signal))
        if self._skipped:
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in self._skipped.most_common())
            self.bar.line(f"samples that rank 0 could not read: {kinds}")
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

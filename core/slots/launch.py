"""The launch: where and how a recipe runs. No part of the recipe, so it is neither diffed nor hashed."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from core.slots.slot import Slot


class Launch(Slot):
    """Flags of `run` that do not change what is trained."""

    output_dir: Path | None = None
    """Everything the run writes. Default: runs/<recipe>/<run name>."""
    run_name: str | None = None
    """Name of the run. Default: date and time."""
    resume: str | None = None
    """Go on from a run id or an output directory."""
    init_from: str | None = None
    """Start the trained networks from these weights: a folder, a checkpoint file, a hub id or run:<id>."""
    overwrite: bool = False
    """Empty an output directory that is in use (a run's files only) and start afresh."""
    nproc: int = 1
    """Processes on this machine (torchrun)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one."""
    store: str | None = None
    """MLflow tracking URI. Default: $MLFLOW_TRACKING_URI, else sqlite:///runs/mlflow.db."""
    dry_run: bool = False
    """Build on the meta device and print modules, parameters, memory and steps; needs neither weights nor data."""
    debug: bool = False
    """Show tracebacks."""

    def check(self) -> None:
        if self.nproc < 1:
            self.refuse("nproc", "must be at least 1")
        if self.resume and self.init_from:
            self.refuse("resume", "a resumed run has its own weights: leave out --init-from")
        if self.resume and self.overwrite:
            self.refuse("resume", "--overwrite would empty the run that is to be resumed")

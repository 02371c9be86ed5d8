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
    """Go on from a run id or an output directory; auto: from the newest whole checkpoint in --output-dir if there is
    one, else start there (the line for a job that is queued again).
    """
    allow: tuple[str, ...] = ()
    """Fields or slots of the recipe in which a resumed run may differ from its checkpoint, e.g. optim.lr."""
    init_from: str | None = None
    """Start the trained networks from these weights: a folder, a checkpoint file, a hub id or run:<id>."""
    overwrite: bool = False
    """Empty an output directory that is in use (a run's files only) and start afresh."""
    nproc: int = 1
    """Processes on this machine (torchrun)."""
    max_restarts: int = 0
    """With --nproc: times that dead processes are started again, from the newest checkpoint."""
    grace: float = 120.0
    """Seconds after SIGTERM or Ctrl-C for the update and the checkpoint to be finished; then the run leaves at once."""
    timeout: float = 600.0
    """Seconds that a rank waits for another in a collective before it gives up."""
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
        for name in ("grace", "timeout"):
            if getattr(self, name) <= 0:
                self.refuse(name, "must be positive")
        if self.max_restarts < 0:
            self.refuse("max_restarts", "must not be negative")
        if self.resume and self.resume != "auto" and self.init_from:
            self.refuse("resume", "a resumed run has its own weights: leave out --init-from")
        if self.resume and self.overwrite:
            self.refuse("resume", "--overwrite would empty the run that is to be resumed")

"""The launch: where and how a recipe runs. No part of the recipe, so it is neither diffed nor hashed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from core.slots.slot import Slot

REPO = r"(\w[\w.-]*/)?\w[\w.-]*"
"""A repository on the hub, as far as its form goes."""


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
    cache: Path | None = None
    """Train from this cache of latents and states of captions, which `data cache` made; encoders are not loaded."""
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
    push_to_hub: Literal["none", "last", "all"] = "none"
    """Upload weights to the Hugging Face hub in the background. last: the newest checkpoint's in the place of the one
    before; all: those of every checkpoint, each in a folder. The token is the environment's HF_TOKEN.
    """
    hub_repo: str | None = None
    """Repository on the hub, NAMESPACE/NAME; it is made if it is not there."""
    hub_private: bool = False
    """The repository is private; nothing goes to one that is public."""
    hub_wait: float = 600.0
    """Seconds that the end of the run waits for uploads."""
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
        if self.hub_wait < 0:
            self.refuse("hub_wait", "must not be negative")
        if self.push_to_hub != "none" and self.hub_repo is None:
            self.refuse("push_to_hub", "say where to: --hub-repo NAMESPACE/NAME")
        if self.hub_repo is not None and self.push_to_hub == "none":
            self.refuse("hub_repo", "say what goes there: --push-to-hub last, or all")
        if self.hub_repo is not None and not re.fullmatch(REPO, self.hub_repo):
            self.refuse("hub_repo", "expected NAMESPACE/NAME, of letters, digits, dots, dashes and underscores")
        if self.max_restarts < 0:
            self.refuse("max_restarts", "must not be negative")
        if self.resume and self.resume != "auto" and self.init_from:
            self.refuse("resume", "a resumed run has its own weights: leave out --init-from")
        if self.resume and self.overwrite:
            self.refuse("resume", "--overwrite would empty the run that is to be resumed")

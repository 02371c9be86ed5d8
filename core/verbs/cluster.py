"""What a job is, whatever cluster it runs on: its name, its processes and the command of each machine."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from core.errors import UserError
from core.recipe_file import delta_flags
from core.redact import without_password
from core.slots import Launch, Recipe

if TYPE_CHECKING:
    from core.verbs.launch import ClusterFlags

SHUTDOWN = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
"""torchrun's seconds between SIGTERM and SIGKILL for its processes; 30 unless it is set."""
NEW_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""1: a store of addresses for each start. One that is kept holds those of the dead after a restart."""


@dataclass(frozen=True)
class Job:
    """A run as a cluster's job."""

    name: str
    nodes: int
    processes: int
    """On each machine."""
    output_dir: Path
    words: tuple[str, ...]
    """After `python -m registry`; the same at every start."""
    max_restarts: int
    patience: int
    """Seconds that torchrun leaves the processes after SIGTERM."""

    @classmethod
    def of(cls, recipe: Recipe, registered: Recipe, where: Launch, flags: ClusterFlags, processes: int) -> Job:
        """The job of `recipe`, which is `registered` with overrides. Raises UserError for a store with a password."""
        if where.store and without_password(where.store) != where.store:
            raise UserError(
                "--store: the job would hold the password; leave user and password out, and set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD for the job"
            )
        out = flags.home / (where.output_dir or Path("runs") / recipe.name / str(where.run_name))
        once = where.but(output_dir=out, resume="auto", max_restarts=0)
        words = ("run", recipe.name, *delta_flags(recipe, registered), *delta_flags(once, Launch()))
        name = flags.job_name or _as_job_name(where.run_name or recipe.name)
        return cls(name, flags.nodes, processes, out, words, where.max_restarts, round(where.grace) + 10)

    def torchrun(self, python: str) -> list[str]:
        """The command of each machine, but for where they meet and for `words`."""
        return [
            *(python, "-m", "torch.distributed.run"),
            *(f"--nnodes={self.nodes}", f"--nproc-per-node={self.processes}", f"--max-restarts={self.max_restarts}"),
            "--rdzv-backend=c10d",
        ]

    @property
    def variables(self) -> dict[str, str]:
        """What torchrun reads in the environment."""
        return {SHUTDOWN: str(self.patience), NEW_STORE: "1"}

    @property
    def program(self) -> list[str]:
        """What torchrun starts; the two dashes keep it from reading our flags as its own."""
        return ["-m", "--", "registry", *self.words]


def _as_job_name(name: str) -> str:
    """A name of lower-case letters, digits and dashes, a letter first, as Kubernetes has them for services."""
    whole = name.lower() if name[:1].isalpha() and name.isascii() else f"run-{name.lower()}"
    return re.sub(r"[^a-z0-9]+", "-", whole)[:50].strip("-")


def seconds(time: str) -> int:
    """A time limit as SLURM writes it: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]].
    0 for what is none.
    """
    match = re.fullmatch(r"(?:(\d{1,4})-)?(\d{1,6})(?::(\d\d))?(?::(\d\d))?", time)
    if match is None:
        return 0
    days, first, second, third = (int(part or 0) for part in match.groups())
    if match[1] is not None or match[4] is not None:
        return days * 86400 + first * 3600 + second * 60 + third
    return first * 60 + second

"""`launch`: the SLURM script or the Kubernetes manifest of a run on several machines, printed or handed in."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from core.cli import parse
from core.errors import UserError
from core.slots import Launch, Recipe
from core.slots.slot import Slot
from core.verbs.cluster import Job, seconds

NAME = r"[\w][\w.@:+-]*"
"""Names that a cluster's administrator gives. They stand in lines that no shell reads, so nothing is quoted there."""


class ClusterFlags(Slot):
    """Flags of `launch`, beside the recipe's and those of `run`."""

    slurm: bool = False
    """Print an sbatch script."""
    k8s: bool = False
    """Print the manifest of a PyTorchJob (kubeflow.org/v1)."""
    submit: Literal["no", "sbatch", "submitit"] = "no"
    """Hand the script to SLURM instead: by the command sbatch, or by the library submitit (pip install '.[slurm]')."""
    nodes: int = 1
    """Machines."""
    gpus: int = 8
    """GPUs of a machine, with a process each; 0: processes on its CPU."""
    processes: int | None = None
    """Processes on a machine. None: one for each GPU, or one."""
    cpus: int = 8
    """CPU cores for each process."""
    memory: str | None = None
    """Main memory of a machine, as 200G. None: the cluster's default."""
    time: str | None = None
    """Time limit, as SLURM writes it: minutes, 12:00:00, 2-00 (days-hours). None: the cluster's default."""
    warn: int = 300
    """SLURM: seconds before the time limit at which the run is told to save, stop and be queued again."""
    partition: str | None = None
    """SLURM: the partition."""
    account: str | None = None
    """SLURM: the account that pays."""
    image: str | None = None
    """Kubernetes: the container image, with this project in it."""
    volume: str | None = None
    """Kubernetes: the persistent volume claim that all machines share."""
    mount: Path = Path("/workspace")
    """Kubernetes: where the volume is mounted; the output directory must be in it."""
    namespace: str | None = None
    """Kubernetes: the namespace. None: that of kubectl."""
    secret: str | None = None
    """Kubernetes: a secret whose entries become environment variables (MLFLOW_TRACKING_PASSWORD, HF_TOKEN)."""
    job_name: str | None = None
    """Name of the job. None: the run's, else the recipe's."""
    port: int | None = None
    """Port of the first machine, where the others find it. None: 29500; with SLURM from the number of the job."""
    workdir: Path | None = None
    """Folder that relative paths start from. None: with SLURM the present one, in Kubernetes the volume."""
    venv: Path | None = None
    """Virtual environment to activate. None: with SLURM the Python that prints this, in Kubernetes the image's."""
    setup: tuple[str, ...] = ()
    """Lines of shell that come first, as 'module load cuda' 'export NCCL_SOCKET_IFNAME=ib0'."""

    @property
    def home(self) -> Path:
        """The folder that relative paths start from."""
        return (self.mount if self.k8s else Path.cwd()) / (self.workdir or "")

    def check(self) -> None:
        for name in ("nodes", "processes", "cpus", "warn"):
            value = getattr(self, name)
            if value is not None and value < 1:
                self.refuse(name, "must be at least 1")
        if self.gpus < 0:
            self.refuse("gpus", "must not be negative")
        if self.port is not None and not 1024 <= self.port < 65536:
            self.refuse("port", "must be between 1024 and 65535")
        if self.time is not None and seconds(self.time) == 0:
            self.refuse("time", "expected minutes, hours:minutes:seconds or days-hours, and more than none")
        if self.memory is not None and not re.fullmatch(r"[1-9]\d*[MGT]", self.memory):
            self.refuse("memory", "expected a number and M, G or T, as 200G")
        for name in ("partition", "account", "namespace", "volume", "secret"):
            value = getattr(self, name)
            if value is not None and not re.fullmatch(f"{NAME}(,{NAME})*" if name == "partition" else NAME, value):
                self.refuse(name, "expected a name of letters, digits, dots, dashes and underscores")
        if self.job_name is not None and not re.fullmatch(r"[a-z]([a-z0-9-]{0,48}[a-z0-9])?", self.job_name):
            self.refuse("job_name", "expected at most 50 lower-case letters, digits and dashes, a letter first")


OF_SLURM, OF_K8S = ("partition", "account", "submit"), ("image", "volume", "namespace", "secret")
"""Flags that mean nothing to the other kind of cluster."""


def launch(words: Sequence[str], recipe: Recipe) -> int:
    """Print the job of `recipe` with the flags `words`, or hand it in. Raises UserError for what could not run."""
    registered = recipe
    recipe, where, flags = parse(words, recipe, Launch(), ClusterFlags())
    job = checked(recipe, registered, where, flags)
    if flags.k8s:
        from core.verbs.kubernetes import manifest

        print(manifest(job, flags), end="")
        return 0
    from core.verbs.slurm import script

    text = script(job, flags)
    if flags.submit == "no":
        print(text, end="")
    else:
        print((by_sbatch if flags.submit == "sbatch" else by_submitit)(text, job))
    return 0


def checked(recipe: Recipe, registered: Recipe, where: Launch, flags: ClusterFlags) -> Job:
    """The job, or a UserError: recipe and flags do not go together, or not with several machines."""
    if flags.slurm == flags.k8s:
        raise UserError("launch: say for what, --slurm or --k8s")
    _refuse_the_others_flags(flags)
    _refuse_flags_of_one_machine(where)
    processes = flags.processes or max(flags.gpus, 1)
    if flags.gpus and processes != flags.gpus:
        flags.refuse("processes", f"there is one for each GPU, {flags.gpus}; --gpus 0 is for processes on the CPU")
    if flags.slurm and flags.warn < where.grace + 60:
        flags.refuse("warn", f"must be a minute more than --grace {where.grace:.0f}, in which the run saves")
    job = Job.of(recipe, registered, where, flags, processes)
    if flags.k8s and not (flags.image and flags.volume):
        raise UserError(
            "launch --k8s needs --image, with this project in it, and --volume, a claim for what is written"
        )
    if flags.k8s and not job.output_dir.is_relative_to(flags.mount):
        raise UserError(
            f"--output-dir {job.output_dir} is not on the volume at {flags.mount}: it would go with the pod"
        )

    from core.build import check_batch
    from core.preflight import preflight

    world = flags.nodes * processes
    replicate, shard, _ = recipe.parallel.mesh(world, processes)
    check_batch(recipe, replicate * shard)
    preflight(recipe, where, here=False)
    return job


def _refuse_the_others_flags(flags: ClusterFlags) -> None:
    plain, kind = ClusterFlags(), "--k8s" if flags.k8s else "--slurm"
    for name in OF_SLURM if flags.k8s else OF_K8S:
        if getattr(flags, name) != getattr(plain, name):
            raise UserError(f"--{name.replace('_', '-')} does not go with {kind}")


def _refuse_flags_of_one_machine(where: Launch) -> None:
    """Raise UserError for flags of `run` that a job which is started again and again cannot have."""
    if where.nproc != 1:
        raise UserError("launch --nproc: processes follow from --nodes and --gpus (or --processes)")
    if where.resume not in (None, "auto"):
        raise UserError("launch --resume: a job goes on in its --output-dir by itself; name that")
    for name in ("overwrite", "dry_run"):
        if getattr(where, name):
            raise UserError(f"launch --{name.replace('_', '-')}: not for a job that is started again; try it with run")
    if not (where.output_dir or where.run_name):
        raise UserError(
            "launch needs --output-dir, a folder that all machines see: a job that is queued again goes on there"
        )


def by_sbatch(text: str, job: Job) -> str:
    """Hand the script to sbatch. Returns what it says: the number of the job."""
    if shutil.which("sbatch") is None:
        raise UserError(
            "--submit sbatch: there is no sbatch here; leave --submit out and take the script to the cluster"
        )
    done = subprocess.run(["sbatch"], input=text, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"sbatch refused the script: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout.strip()


def by_submitit(text: str, job: Job) -> str:
    """Hand the script in through submitit, which keeps it in `submitted` beside the output directory."""
    try:
        import submitit
    except ImportError:
        raise UserError(
            "--submit submitit: submitit is not installed; pip install '.[slurm]', or --submit sbatch"
        ) from None

    class Script(submitit.SlurmExecutor):
        """Hands in the script as it is, not a pickled function."""

        def _make_submission_file_text(self, command: str, uid: str) -> str:
            return text

    folder = job.output_dir.parent / "submitted"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        handed = Script(folder)._submit_command("")
    except (RuntimeError, OSError, submitit.core.utils.FailedJobError) as error:
        raise UserError(f"--submit submitit: {error}") from None
    return f"Submitted batch job {handed.job_id}; the script is {handed.paths.submission_file}"

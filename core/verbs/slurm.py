"""The sbatch script of a job. sbatch(1), srun(1), scancel(1), scontrol(1); torchrun's rendezvous is c10d on the first
machine.

Before the time limit SLURM signals the script, which has it signal the job's steps (a SIGTERM to srun itself would end
them at once); the processes finish the update and save, and the script queues the job again. On pre-emption SLURM
signals the processes itself and queues the job again by itself.
"""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING

from core.verbs.cluster import Job

if TYPE_CHECKING:
    from core.verbs.launch import ClusterFlags


def script(job: Job, flags: ClusterFlags) -> str:
    """The whole script, to be given to sbatch."""
    options = {
        "job-name": job.name,
        "nodes": job.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": flags.gpus or None,
        "cpus-per-task": flags.cpus * job.processes,
        "mem": flags.memory,
        "time": flags.time,
        "partition": flags.partition,
        "account": flags.account,
        "signal": f"B:USR1@{flags.warn}",
        "output": "%x-%j.log",
        "open-mode": "append",
    }
    head = [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None]
    return "\n".join(["#!/bin/bash", *head, "#SBATCH --requeue", "", *_setup(flags), *_body(job, flags)]) + "\n"


def _setup(flags: ClusterFlags) -> list[str]:
    """Folder and environment, in this order, and stop where one is not there."""
    lines = [f"cd -- {shlex.quote(str(flags.home))} || exit 1", *flags.setup]
    if flags.venv:
        lines.append(f"source {shlex.quote(str(flags.venv / 'bin' / 'activate'))} || exit 1")
    return lines


def _body(job: Job, flags: ClusterFlags) -> list[str]:
    port = "$((20000 + SLURM_JOB_ID % 10000))" if flags.port is None else str(flags.port)
    command = [
        f"srun --kill-on-bad-exit=1 --cpus-per-task={flags.cpus * job.processes}",
        shlex.join(job.torchrun("python" if flags.venv or flags.setup else sys.executable)),
        '--rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" --rdzv-endpoint="$first:$port"',
        f"{shlex.join(job.program)} &",
    ]
    return [
        *(f"export {name}={value}" for name, value in job.variables.items()),
        'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        f"port={port}",
        "",
        " \\\n    ".join(command),
        "step=$! asked=",
        "",
        "# near the time limit: save, stop, queue again, go on",
        """trap 'asked=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1""",
        'wait "$step"; code=$?',
        'if [ -n "$asked" ]; then',
        '    wait "$step"; code=$?  # the signal cut the first wait short',
        '    [ "$code" -eq 0 ] || exec scontrol requeue "$SLURM_JOB_ID"',
        "fi",
        'exit "$code"',
    ]

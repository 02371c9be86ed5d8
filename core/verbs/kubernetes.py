"""The manifest of a PyTorchJob (kubeflow.org/v1, the Kubeflow training operator): one pod a machine, torchrun in each.

All pods are workers: with an elastic policy the operator needs no master, gives each pod a name in the DNS, and starts
a pod again that fails. The rendezvous is c10d on the first one.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import yaml

from core.verbs.cluster import Job, seconds

if TYPE_CHECKING:
    from core.verbs.launch import ClusterFlags

PORT = 29500
RETRIES = 100
"""Times that a pod is started again before the job has failed."""


def manifest(job: Job, flags: ClusterFlags) -> str:
    """The manifest as YAML, to be given to `kubectl apply -f -`."""
    port = flags.port or PORT
    policy: dict[str, Any] = {"cleanPodPolicy": "Running", "backoffLimit": RETRIES}
    if flags.time:
        policy["activeDeadlineSeconds"] = seconds(flags.time)
    whole = {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": job.name} | ({"namespace": flags.namespace} if flags.namespace else {}),
        "spec": {
            "runPolicy": policy,
            "nprocPerNode": str(job.processes),
            "elasticPolicy": {
                "rdzvBackend": "c10d",
                "rdzvHost": f"{job.name}-worker-0",
                "rdzvPort": port,
                "rdzvId": job.name,
                "minReplicas": job.nodes,
                "maxReplicas": job.nodes,
                "maxRestarts": job.max_restarts,
            },
            "pytorchReplicaSpecs": {
                "Worker": {
                    "replicas": job.nodes,
                    "restartPolicy": "OnFailure",
                    "template": {"spec": _pod(job, flags, port)},
                }
            },
        },
    }
    return yaml.safe_dump(whole, sort_keys=False, width=1000)


def _pod(job: Job, flags: ClusterFlags, port: int) -> dict[str, Any]:
    size = {"cpu": str(flags.cpus * job.processes)}
    size |= {"memory": f"{flags.memory}i"} if flags.memory else {}
    size |= {"nvidia.com/gpu": str(flags.gpus)} if flags.gpus else {}
    container: dict[str, Any] = {
        "name": "pytorch",  # the operator knows the container by this name
        "image": flags.image,
        "command": _command(job, flags, port),
        "workingDir": str(flags.home),
        "env": [{"name": name, "value": value} for name, value in job.variables.items()],
        "ports": [{"name": "pytorchjob-port", "containerPort": port}],
        "resources": {"requests": dict(size), "limits": size},
        # workers of a data loader and NCCL need more shared memory than the 64 MB of a container
        "volumeMounts": [
            {"name": "shared", "mountPath": str(flags.mount)},
            {"name": "memory", "mountPath": "/dev/shm"},
        ],
    }
    if flags.secret:
        container["envFrom"] = [{"secretRef": {"name": flags.secret}}]
    return {
        "terminationGracePeriodSeconds": job.patience + 20,
        "containers": [container],
        "volumes": [
            {"name": "shared", "persistentVolumeClaim": {"claimName": flags.volume}},
            {"name": "memory", "emptyDir": {"medium": "Memory"}},
        ],
    }


def _command(job: Job, flags: ClusterFlags, port: int) -> list[str]:
    """The words of a pod's process; through a shell, which torchrun replaces, where there is something to set up."""
    meet = [f"--rdzv-id={job.name}", f"--rdzv-endpoint={job.name}-worker-0:{port}"]
    words = [*job.torchrun("python"), *meet, *job.program]
    setup = [*flags.setup]
    if flags.venv:
        setup.append(f"source {shlex.quote(str(flags.venv / 'bin' / 'activate'))} || exit 1")
    return ["bash", "-c", "\n".join([*setup, f"exec {shlex.join(words)}"])] if setup else words

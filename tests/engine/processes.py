"""Real processes that cost a second, not ten: forked from a server that has imported everything."""

import multiprocessing
import os
import socket
import sys
from pathlib import Path

from core.slots import Launch, Recipe

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["core.train", "registry", "mlflow", "mlflow.tracking", "data.frames"])


def start(recipe: Recipe, said: Path, threads: int = 1, rank: int = 0, world: int = 1, port: int = 0, **launch):
    """Start one process of a run; its stderr is appended to `said`."""
    process = SERVER.Process(target=_train, args=(recipe, said, threads, rank, world, port, launch))
    process.start()
    return process


def _train(recipe: Recipe, said: Path, threads: int, rank: int, world: int, port: int, launch: dict) -> None:
    import torch

    from core.train import train

    with said.open("a") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    if world > 1:  # what torchrun puts into the environment
        here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in here.items()})
    torch.set_num_threads(threads)
    result = train(recipe, Launch(device="cpu", **launch))
    sys.exit(128 + result.asked.signal if result.asked.signal else 0)


def run_ranks(recipe: Recipe, world: int, out: Path, store: str, timeout: float = 200.0, **launch) -> Path:
    """Train on `world` gloo processes to the end; returns `out`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said = out.with_suffix(".stderr")
    ranks = [
        start(recipe, said, rank=rank, world=world, port=port, output_dir=out, store=store, **launch)
        for rank in range(world)
    ]
    for process in ranks:
        process.join(timeout)
        process.kill()
    assert [process.exitcode for process in ranks] == [0] * world, said.read_text()[-3000:]
    return out

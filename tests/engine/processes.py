"""Real processes that cost a second, not ten: forked from a server that has imported everything."""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from core.slots import Launch, Recipe
from tests.tracking.servers import free_port

SERVER = multiprocessing.get_context("forkserver")


def start(
    recipe: Recipe, said: Path, threads: int = 1, rank: int = 0, world: int = 1, port: int = 0, local: int = 0, **launch
):
    """Start one process of a run, as on a machine with `local` of them; its stderr is appended to `said`."""
    process = SERVER.Process(target=_train, args=(recipe, said, threads, rank, world, port, local, launch))
    process.start()
    return process


def _train(recipe: Recipe, said: Path, threads: int, rank: int, world: int, port: int, local: int, launch: dict):
    from core.train import train

    begin(said, threads, rank, world, port, local)
    result = train(recipe, Launch(device="cpu", **launch))
    sys.exit(128 + result.asked.signal if result.asked.signal else 0)


def begin(said: Path, threads: int, rank: int = 0, world: int = 1, port: int = 0, local: int = 0) -> None:
    """Threads and output of a process, and what torchrun puts into its environment."""
    import torch

    with said.open("a") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    if world > 1:
        here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        here["LOCAL_WORLD_SIZE"] = local or world
        os.environ.update({name: str(value) for name, value in here.items()})
    torch.set_num_threads(threads)


def start_words(words: Sequence[str], said: Path, rank: int = 0, world: int = 1, port: int = 0):
    """Start one process of `python -m registry WORDS`; its stderr is appended to `said`."""
    process = SERVER.Process(target=_do, args=(list(words), said, rank, world, port))
    process.start()
    return process


def _do(words: list[str], said: Path, rank: int, world: int, port: int) -> None:
    from registry import main

    begin(said, 1, rank, world, port)
    sys.exit(main(words))


def command(*words: str, cwd: Path, env: Mapping[str, str] | None = None, timeout: float = 240.0):
    """`python -m registry WORDS` in `cwd`, to its end: exit code and what it printed, as of `subprocess.run`."""
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder) / name for name in ("stdout", "stderr")]
        process = SERVER.Process(target=_in_folder, args=(words, cwd, dict(env or {}), said))
        process.start()
        process.join(timeout)
        process.kill()
        process.join()
        return subprocess.CompletedProcess(words, process.exitcode, *(path.read_text() for path in said))


def _in_folder(words: Sequence[str], cwd: Path, env: dict[str, str], said: Sequence[Path]) -> None:
    for path, stream in zip(said, (sys.stdout, sys.stderr), strict=True):
        with path.open("w") as file:
            os.dup2(file.fileno(), stream.fileno())
    os.chdir(cwd)
    os.environ.update(env)
    from registry import main

    code = main(list(words))
    sys.stdout.flush()
    sys.exit(code)


def run_ranks(recipe: Recipe, world: int, out: Path, store: str, timeout: float = 200.0, **launch) -> Path:
    """Train on `world` gloo processes to the end; returns `out`. `local` of them are on a machine; 0: all."""
    port, said = free_port(), out.with_suffix(".stderr")
    ranks = [
        start(recipe, said, rank=rank, world=world, port=port, output_dir=out, store=store, **launch)
        for rank in range(world)
    ]
    for process in ranks:
        process.join(timeout)
        process.kill()
    assert [process.exitcode for process in ranks] == [0] * world, said.read_text()[-3000:]
    return out

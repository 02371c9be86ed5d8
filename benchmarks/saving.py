"""Seconds that the loop waits for a checkpoint, and that a restart takes far into a run and at its beginning."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.measure import Row, alternate
from core import checkpoint, manifest
from core.distributed import Ranks
from core.saver import Saver

TENSORS, ELEMENTS = 100, 2**20
"""400 MB in fp32."""
FAR = 100_000
ROUNDS = 5
RECIPE = (
    "lvdm-video-vae-tiny --global-batch 2 --batch-size 1 --num-workers 0 --loop.log-every 1 --checkpoint.every 0 "
    "--validation.every 0 --validation.num-batches 1 --validation.num-samples 0 "
    "--optim.schedule.name constant --optim.schedule.warmup-steps 0"
)

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def rows() -> list[Row]:
    """The stall against a blocking write of the same state; restarts in processes of their own, in turns."""
    stall, blocking = _save_times()
    far, start = _restart_times()
    return [
        Row("save of 400 MB, wait of the loop / blocking write", stall, blocking, "s", "<= 0.3"),
        Row(f"start to first update, at step {FAR:,} / at 0", far, start, "s", "<= 1.1"),
    ]


def _save_times() -> tuple[float, float]:
    """Seconds within `save`, and seconds until the same is written. The state changes in between, as in training."""
    state = {f"weights.{i}": torch.randn(ELEMENTS) for i in range(TENSORS)}
    with tempfile.TemporaryDirectory(dir=".") as folder:  # on a disk; /tmp may be memory
        saver = Saver(Path(folder), Ranks(torch.device("cpu"), 0, 1, None), 1, lambda path, step, about: None)
        steps = iter(range(1000))

        def ours() -> None:
            saver.save(state, {"step": next(steps)}, "{}")

        def whole() -> None:
            saver.join()
            ours()
            saver.join()

        stalls, writes = [], []
        whole()
        for _ in range(ROUNDS):
            stalls.append(_seconds(ours))
            saver.join()
            writes.append(_seconds(whole))
    return statistics.median(stalls), statistics.median(writes)


def _seconds(call: Callable[[], None]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _restart_times() -> tuple[float, float]:
    """Seconds from the start of a process to its first update: of a run that goes on at step 100,000, and of one that
    goes on at step 1.
    """
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        for name, step in (("near", 1), ("far", FAR)):
            subprocess.run(_command(base / name, 1), check=True, capture_output=True, env=ENVIRONMENT)
            _move(base / name, step)
        return alternate(lambda: _first_update(base / "far", FAR), lambda: _first_update(base / "near", 1), ROUNDS)


def _command(out: Path, steps: int) -> list[str]:
    words = [*RECIPE.split(), "--max-steps", str(steps), "--output-dir", str(out), "--store", f"sqlite:///{out}.db"]
    return [sys.executable, "-m", "registry", "run", *words, "--resume", "auto", "--device", "cpu"]


def _first_update(out: Path, step: int) -> None:
    """Start the run at `out`, wait for its first update, and kill it, so that the next start is the same."""
    line, log = f"step {step + 1}/", out / "run.log"
    before = log.read_text().count(line)
    process = subprocess.Popen(_command(out, 2 * FAR), stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    while log.read_text().count(line) == before:
        if process.poll() is not None:
            raise SystemExit(f"the run at {out} ended before its first update")
        time.sleep(0.01)
    process.kill()
    process.wait()


def _move(out: Path, step: int) -> None:
    """Make the checkpoint of `out` that of a later step, at an epoch far on."""
    [found] = checkpoint.checkpoints(out / "checkpoints")
    state = json.loads((found / "state.json").read_text())
    (found / "state.json").write_text(json.dumps(state | {"step": step, "epoch": step // 100}))
    manifest.write(found, manifest.digests(found))
    found.rename(found.with_name(f"step-{step:08d}"))

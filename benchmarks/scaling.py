"""Seconds an update on two gloo ranks, replicated and sharded, against one: each rank has the same micro-batch and one
thread, so what is above 1 is what ranks cost each other.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.measure import Row
from core.journal import FILE_NAME, read

UPDATES, WARM, MICRO = 24, 4, 4
KINDS = {
    "one": (1, ""),
    "2 ranks, replicated / 1 rank": (2, "--parallel.shard 1"),
    "2 ranks, sharded / 1 rank": (2, "--parallel.shard 2"),
}
RECIPE = (
    f"lvdm-short-sky-tiny --max-steps {UPDATES} --batch-size {MICRO} --loop.log-every 1 --loop.mfu False "
    "--validation.every 0 --validation.sample-every 0 --validation.num-samples 0 --validation.metric-clips 0 "
    "--validation.num-batches 1 --checkpoint.every 0 --device cpu"
)


def rows() -> list[Row]:
    """On one machine the ranks also share its memory and caches: a cluster's network is not in these figures."""
    seconds = {what: _update(ranks, more) for what, (ranks, more) in KINDS.items()}
    limit = seconds.pop("one")
    return [Row(f"an update, {what}", this, limit, "s", "") for what, this in seconds.items()]


def _update(ranks: int, more: str) -> float:
    """Median seconds of an update of a run of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        words = [*RECIPE.split(), *more.split(), "--global-batch", str(MICRO * ranks), "--nproc", str(ranks)]
        command = [sys.executable, "-m", "registry", "run", *words, "--output-dir", str(out)]
        command += ["--store", f"sqlite:///{folder}/mlflow.db"]
        subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        lines = [event["values"] for event, _ in read(out / FILE_NAME) if event["event"] == "metrics"]
        return statistics.median([line["time/step_s"] for line in lines if "time/step_s" in line][WARM:])

"""Seconds an update on two gloo ranks, replicated and sharded, against two processes that train beside each other
without a word: each has the same micro-batch and one thread, so what is above 1 is what talking costs.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from benchmarks.measure import Row
from core.journal import FILE_NAME, read

UPDATES, WARM, MICRO = 24, 4, 4
KINDS = {
    "2 ranks, replicated / 2 apart": "--parallel.shard 1",
    "2 ranks, sharded / 2 apart": "--parallel.shard 2",
}
RECIPE = (
    f"lvdm-short-sky-tiny --max-steps {UPDATES} --batch-size {MICRO} --loop.log-every 1 --loop.mfu False "
    "--validation.every 0 --validation.sample-every 0 --validation.num-samples 0 --validation.metric-clips 0 "
    "--validation.num-batches 1 --checkpoint.every 0 --device cpu"
)


def rows() -> list[Row]:
    """On one machine the ranks also share its memory and caches: a cluster's network is not in these figures."""
    with tempfile.TemporaryDirectory() as folder:
        apart = [_run(Path(folder) / name, 1, "") for name in ("first", "second")]
        limit = max(map(_update, apart))
    found = []
    for what, more in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            found.append(Row(f"an update, {what}", _update(_run(Path(folder) / "both", 2, more)), limit, "s", ""))
    return found


class _Run(NamedTuple):
    process: subprocess.Popen[bytes]
    out: Path


def _run(out: Path, ranks: int, more: str) -> _Run:
    """A run that has been started."""
    words = [*RECIPE.split(), *more.split(), "--global-batch", str(MICRO * ranks), "--nproc", str(ranks)]
    command = [sys.executable, "-m", "registry", "run", *words, "--output-dir", str(out)]
    command += ["--store", f"sqlite:///{out}.db"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return _Run(subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **quiet), out)


def _update(run: _Run) -> float:
    """Median seconds of an update of a run, at its end."""
    if code := run.process.wait():
        raise RuntimeError(
            f"a run of the benchmark ended with exit code {code}: {' '.join(map(str, run.process.args))}"
        )
    lines = [event["values"] for event, _ in read(run.out / FILE_NAME) if event["event"] == "metrics"]
    return statistics.median([line["time/step_s"] for line in lines if "time/step_s" in line][WARM:])

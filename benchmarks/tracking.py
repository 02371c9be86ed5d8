"""What a log interval costs the training thread, with a store that takes everything and with one that never answers."""

from __future__ import annotations

import contextlib
import io
import socket
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.measure import Row
from core import tracker as tracker_module
from core.recipe_file import dump
from core.tracker import open_run
from registry import get

STEPS, ALLOWED = 2000, 50.0
NUMBERS = ("loss", "grad_norm", "lr", "time/step_s", "time/data_share", "samples_per_s", "memory_gb", "skipped_samples")


def rows() -> list[Row]:
    """Microseconds a call of `Tracker.metrics` with eight numbers: the middle one, and the slowest of a hundred."""
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as deaf:
        stores = {
            "sqlite": f"sqlite:///{folder}/mlflow.db",
            "a deaf server": f"http://127.0.0.1:{deaf.getsockname()[1]}",
        }
        found = []
        for name, store in stores.items():
            times = sorted(_times(Path(folder) / name.replace(" ", "-"), store))
            middle, slow = statistics.median(times), times[int(0.99 * len(times))]
            found.append(Row(f"metrics of a step, {name} / 50 us", middle, ALLOWED, "us", "<= 1"))
            found.append(Row(f"   the slowest of 100, {name} / 50 us", slow, ALLOWED, "us", ""))
        return found


def _times(out: Path, store: str) -> list[float]:
    recipe = get("lvdm-short-sky-tiny")
    out.mkdir()
    (out / "recipe.json").write_text(dump(recipe))
    tracker_module.OPEN_WAIT = tracker_module.EXIT_WAIT = 2.0
    times = []
    with contextlib.redirect_stderr(io.StringIO()):  # what is said of the server that does not answer
        tracker = open_run(recipe, store=store, run_name="bench", output_dir=out, argv=(), data={}, device="1 x cpu")
        for step in range(STEPS):
            values = dict.fromkeys(NUMBERS, 1.0 / (step + 1))
            began = time.perf_counter()
            tracker.metrics(values, step)
            times.append((time.perf_counter() - began) * 1e6)
            time.sleep(0.001)
        tracker.close("FINISHED")
    return times

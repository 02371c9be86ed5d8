"""Seconds an update of the engine, against the bare forward, backward and step of the same system on the same batch."""

from __future__ import annotations

import contextlib
import io
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.measure import Row
from core.build import load_frozen
from core.draw import Draw
from core.journal import FILE_NAME, read
from core.loader import batches, to_device
from core.slots import Launch, Recipe
from core.train import train
from core.validate import fixed_keys
from registry import get

UPDATES, ROUNDS = 24, 4
WARM = 4


def rows() -> list[Row]:
    """The tiny sky model, logging every update; engine and bare loop in turns."""
    recipe = get(f"lvdm-short-sky-tiny --max-steps {UPDATES} --loop.log-every 1")
    recipe = recipe.but(
        validation=recipe.validation.but(every=0, sample_every=0, num_samples=0, metric_clips=0, num_batches=1)
    )
    engine, bare = [], []
    for _ in range(ROUNDS):
        engine += _engine(recipe)
        bare += _bare(recipe)
    return [
        Row("engine, seconds an update / bare loop", statistics.median(engine), statistics.median(bare), "s", "<= 1.03")
    ]


def _engine(recipe: Recipe) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        with contextlib.redirect_stderr(io.StringIO()):  # the run's own lines
            train(recipe, Launch(output_dir=out, store=f"sqlite:///{folder}/mlflow.db"))
        lines = [event["values"] for event, _ in read(out / FILE_NAME) if event["event"] == "metrics"]
    return [line["time/step_s"] for line in lines if "time/step_s" in line][WARM:]


def _bare(recipe: Recipe) -> list[float]:
    """What nobody can do without: read, encode, noise, forward, backward, clip, step, average."""
    torch.manual_seed(recipe.loop.seed)
    system = recipe.system.build()
    load_frozen(recipe, system)
    system.mode(training=True)
    parameters = list(system.trained.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
    average = [p.detach().clone() for p in parameters]
    dataset, size, times = recipe.data.build(), recipe.loop.global_batch, []
    stream = batches(dataset, [fixed_keys(dataset, size)] * UPDATES, workers=0, pin=False)
    for step in range(UPDATES):
        began = time.perf_counter()
        batch = to_device(next(stream), torch.device("cpu"))
        loss, _ = system.loss(batch, Draw.training(0, step, batch["place"], size))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 0.005)
        times.append(time.perf_counter() - began)
    return times[WARM:]

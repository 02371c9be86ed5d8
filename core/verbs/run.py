"""`run`: train a recipe; with --dry-run, print what the run will be."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from core.slots import Launch, Recipe

if TYPE_CHECKING:
    from core.train import Result


def run(recipe: Recipe, launch: Launch, argv: Sequence[str] = ()) -> int:
    """Train `recipe`. `argv` are the words of the command line after the program's name. Returns the exit code."""
    if launch.dry_run:
        from core.plan import plan, render

        print(render(recipe, plan(recipe)))
        return 0
    if launch.nproc > 1 and "WORLD_SIZE" not in os.environ:
        return spawn(recipe, launch, argv)
    from core.train import train

    result = train(recipe, launch, argv)
    if int(os.environ.get("RANK", "0")) == 0:
        _say(result, launch.store)
    return 128 + result.signal if result.signal else 0


def _say(result: Result, given: str | None) -> None:
    """The last words of a run: where everything is."""
    from core.checkpoint import newest
    from core.redact import without_password
    from core.tracking import store_uri

    out, store = result.output_dir, store_uri(given)
    clip = next(iter(sorted(out.glob("samples/*/*.mp4"), reverse=True)), out / "samples")
    run = result.run_id or "still to be made"
    print(f"{'stopped' if result.signal else 'finished'} at step {result.step}, MLflow run {run}")
    print(f"  clip        {clip}")
    print(f"  checkpoint  {newest(out / 'checkpoints')}")
    if result.signal:
        print(f"  go on with  python -m registry resume {out}")
    else:
        print(f"  weights     {out / 'export'}")
    where = "" if store == store_uri() else f" --store {without_password(store)}"
    print(f"  MLflow      {without_password(store)}; see it with: python -m registry ui{where}")


def spawn(recipe: Recipe, launch: Launch, argv: Sequence[str]) -> int:
    """Start the same command on `nproc` processes of this machine through torchrun."""
    from core.preflight import preflight

    preflight(recipe)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={launch.nproc}",
        "-m",
        "--",
        "registry",
        *argv,
    ]  # torchrun would read our --nproc as its own
    return subprocess.call(command)

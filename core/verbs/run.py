"""`run`: train a recipe; with --dry-run, print what the run will be."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
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
    return 128 + result.asked.signal if result.asked.signal else 0


def _say(result: Result, given: str | None) -> None:
    """The last words of a run: where everything is."""
    from core.checkpoint import checkpoints
    from core.redact import without_password
    from core.tracking import store_uri

    out, store, stopped = result.output_dir, store_uri(given), result.asked.leave
    clip = next(iter(sorted(out.glob("samples/*/*.mp4"), reverse=True)), None)
    shown = clip or next(iter(sorted(out.glob("samples/*/*.png"), reverse=True)), None)
    run = result.run_id or "still to be made"
    print(f"{'stopped' if stopped else 'finished'} at step {result.step}, MLflow run {run}")
    if shown:
        print(f"  {'clip   ' if clip else 'picture'}     {shown}")
    print(f"  checkpoint  {next(iter(checkpoints(out / 'checkpoints')), None)}")
    if stopped:
        print(f"  go on with  python -m registry resume {out}")
    else:
        print(f"  weights     {out / 'export'}")
    where = "" if store == store_uri() else f" --store {without_password(store)}"
    print(f"  MLflow      {without_password(store)}; see it with: python -m registry ui{where}")


def spawn(recipe: Recipe, launch: Launch, argv: Sequence[str]) -> int:
    """Start the same command on `nproc` processes of this machine. Returns the exit code."""
    from core.preflight import preflight

    preflight(recipe, launch)
    return torchrun(launch.nproc, argv, launch.max_restarts)


def torchrun(nproc: int, argv: Sequence[str], max_restarts: int = 0) -> int:
    """Run `python -m registry` with the words `argv` on `nproc` processes of this machine through torchrun. Returns
    128 + the signal that ended it, else torchrun's code.
    """
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={nproc}",
        f"--max-restarts={max_restarts}",
        "-m",
        "--",
        "registry",
        *argv,
    ]  # torchrun would read our --nproc as its own
    # a session of its own: a Ctrl-C reaches it once, through us
    return _hand_signals_to(subprocess.Popen(command, start_new_session=True))


def _hand_signals_to(child: subprocess.Popen[bytes]) -> int:
    """Wait for `child`, handing on SIGTERM and SIGINT; a second SIGINT kills it with all its descendants."""
    got: list[int] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        again = number == signal.SIGINT and signal.SIGINT in got
        got.append(number)
        for pid in descendants(child.pid) if again else ():
            os.kill(pid, signal.SIGKILL)
        child.send_signal(signal.SIGKILL if again else number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 + got[0] if got else code


def descendants(pid: int) -> list[int]:
    """Process ids of all children and their children (proc(5))."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    direct = [int(word) for word in children.read_text().split()] if children.exists() else []
    return [*direct, *(deeper for child in direct for deeper in descendants(child))]

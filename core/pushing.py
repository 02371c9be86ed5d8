"""Checkpoints to the hub while training goes on. Each goes through a process of its own (`weights push`), so that
neither memory, nor the global generator, nor the device of the run is touched, and a line that hangs can be cut.

Whatever happens here, the run goes on: a push that fails is one line and an event in the journal.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from core.hub import REFUSED
from core.redact import redact
from core.slots import Launch

FOLDER = "hub"
"""Folder of the output directory for what is on its way."""
MAKING, PUSHING = 120.0, 4 * 3600.0
"""Seconds after which a repository, or a push, is given up."""
ROOT = Path(__file__).resolve().parents[1]
OF_THE_RUN = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "ROLE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)

Say = Callable[[str], None]
Note = Callable[..., None]


class Job(NamedTuple):
    """A checkpoint or an export, and its folder in the repository; empty: the root."""

    name: str
    what: Path
    inside: str


class Pusher:
    """The background of `--push-to-hub`, on rank 0. `say` takes a line for the person, `note` the facts of an event."""

    def __init__(self, launch: Launch, folder: Path, say: Say, note: Note) -> None:
        assert launch.hub_repo is not None
        self.launch, self.repo, self.folder = launch, launch.hub_repo, folder / FOLDER
        self._say, self._note = say, note
        self._queue: list[Job] = []
        self._left: list[str] = []
        self._changed = threading.Condition()
        self._ending = self._ended = self._refused = False
        self._child: subprocess.Popen[str] | None = None
        shutil.rmtree(self.folder, ignore_errors=True)  # of a process that was killed
        self._thread = threading.Thread(target=self._work, name="hub", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------------------------------ from the run

    def saved(self, checkpoint: Path, last: bool) -> None:
        """A checkpoint is whole; `last`: the export that comes after it has the same weights."""
        if self.launch.push_to_hub == "all":
            self._add(Job(checkpoint.name, self._held(checkpoint), checkpoint.name))
        elif not last:
            self._add(Job(checkpoint.name, self._held(checkpoint), ""))

    def exported(self, export: Path) -> None:
        """The run's export is written."""
        self._add(Job(export.name, export, ""))

    def close(self, patience: float, asked: Callable[[], bool]) -> None:
        """Wait for what is left at most `patience` seconds, and not when the run is asked to stop; then say what is not
        there.
        """
        with self._changed:
            self._ending = True
            self._changed.notify()
        end = time.monotonic() + patience
        while self._thread.is_alive() and time.monotonic() < end and not asked():
            self._thread.join(0.1)
        with self._changed:
            self._ended = True
            self._left += [job.name for job in self._queue]
            self._queue.clear()
            if self._child is not None:
                self._child.kill()
        self._thread.join()
        if self._left:
            self._failed(", ".join(self._left), "the run ended before", status="left")
        shutil.rmtree(self.folder, ignore_errors=True)

    def _add(self, job: Job) -> None:
        """A newer one at the same place makes those that still wait there needless."""
        with self._changed:
            for old in [waiting for waiting in self._queue if waiting.inside == job.inside]:
                self._queue.remove(old)
                self._drop(old)
            if self._refused:
                self._drop(job)
            else:
                self._queue.append(job)
                self._changed.notify()

    def _held(self, checkpoint: Path) -> Path:
        """The checkpoint under a second name (hard links), so that it outlives `checkpoint.keep`."""
        held = self.folder / checkpoint.name
        try:
            shutil.copytree(checkpoint, held, copy_function=os.link)
        except OSError:  # a file system without links: then it may be gone when its turn comes
            shutil.rmtree(held, ignore_errors=True)
            return checkpoint
        return held

    def _drop(self, job: Job) -> None:
        if job.what.parent == self.folder:
            shutil.rmtree(job.what, ignore_errors=True)

    # -------------------------------------------------------------------------------------------------- the thread

    def _work(self) -> None:
        if not self._prepared():
            return
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._ending)
                if not self._queue:
                    return
                job = self._queue.pop(0)
            self._push(job)
            self._drop(job)

    def _prepared(self) -> bool:
        """Make the repository at once: a wrong token or name is said at the start, not after the first checkpoint."""
        code, said = self._run(MAKING, "core.hub", self.repo, "private" if self.launch.hub_private else "public")
        if code == 0 or self._ended:
            return not self._ended
        self._note(status="failed", repo=self.repo, what="", why=said)
        if code != REFUSED:
            self._say(f"{self.repo} cannot be made on the hub now ({said}); each checkpoint tries again")
            return True
        self._say(f"nothing will be pushed ({said}); when that is mended: {self._later()}")
        with self._changed:
            self._refused = True
            self._queue.clear()
        return False

    def _push(self, job: Job) -> None:
        words = ["weights", "push", str(job.what), "--repo", self.repo]
        words += ["--inside", job.inside] if job.inside else []
        words += ["--private"] if self.launch.hub_private else []
        code, said = self._run(PUSHING, "registry", *words)
        if code == 0:
            self._note(status="pushed", repo=self.repo, what=job.name, address=said)
            self._say(f"pushed {job.name} to {said}")
        elif self._ended:
            self._left.insert(0, job.name)
        else:
            self._failed(job.name, said)

    def _failed(self, name: str, why: str, status: str = "failed") -> None:
        self._note(status=status, repo=self.repo, what=name, why=why)
        self._say(f"{name} is not on the hub ({why}); later: {self._later()}")

    def _later(self) -> str:
        """The command that does by hand what was not done here."""
        every = " --every" * (self.launch.push_to_hub == "all")
        private = " --private" * self.launch.hub_private
        return f"python -m registry weights push {self.folder.parent} --repo {self.repo}{every}{private}"

    def _run(self, limit: float, module: str, *words: str) -> tuple[int, str]:
        """A process with this code, off the device. Its exit code and last line."""
        with self._changed:
            if self._ended:
                return 1, "the run has ended"
            self._child = subprocess.Popen(
                [sys.executable, "-m", module, *words],
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,  # a Ctrl-C is the run's
            )
        try:
            out, err = self._child.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.communicate()
            return 1, f"not done after {limit:,.0f} s"
        code = self._child.returncode
        lines = (out if code == 0 else err).split("\n")
        said = next((line for line in reversed(lines) if line.strip()), f"exit code {code}")
        return code, redact(said.removeprefix("error: "))


def _environment() -> dict[str, Any]:
    """That of the run, without its place among the ranks and without the device."""
    own = {name: value for name, value in os.environ.items() if name not in OF_THE_RUN and "TORCHELASTIC" not in name}
    paths = [str(ROOT), *filter(None, [own.get("PYTHONPATH")])]
    return own | {
        "PYTHONPATH": os.pathsep.join(paths),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }

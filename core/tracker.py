"""What the training loop talks to: a journal that is written at once, and two threads that do everything slow.

One thread brings the journal to the disk once a second and notes what the machine does. The other sends the journal to
MLflow, batch by batch, from wherever the last process got to. It may take an hour to come back from a call; the loop
never notices, and the end of the run waits for it at most EXIT_WAIT seconds.
"""

from __future__ import annotations

import re
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from core import provenance
from core.errors import UserError
from core.journal import FILE_NAME, InUse, Journal
from core.redact import redact, without_password
from core.replica import Abandoned, Replica
from core.run_facts import run_facts, write_facts
from core.slots import Recipe
from core.slots.slot import flatten
from core.system_metrics import sampler
from core.tracking import check_uri, first_line, is_outage, refused, store_of

SYNC_EVERY, SYSTEM_EVERY, HEARTBEAT = 1.0, 10.0, 30.0
"""Seconds between writes to the disk, between measurements of the machine, between signs of life in MLflow."""
LINGER = 1.0
"""Seconds between looks at the journal, so that metrics travel together."""
OPEN_WAIT, EXIT_WAIT, LOCK_WAIT = 10.0, 10.0, 5.0
"""Seconds that the start of a run waits for an answer of the store, that its end waits for what is left to send, and
that a resumed run waits for the one before it to let the journal go."""
LONGEST_PAUSE = 30.0
"""Seconds between tries while the store does not answer; the first is one second."""

DATED = re.compile(r"\d{8}-\d{6}-\d{4}")
"""A run name that nobody chose; on MLflow's page the recipe stands before it."""


def to_stderr(line: str) -> None:
    """A line for the person, where no progress bar is up yet."""
    print(line, file=sys.stderr, flush=True)


class Tracker:
    """One run: what it says goes into its journal, and from there into MLflow."""

    def __init__(self, journal: Journal, replica: Replica, device: str) -> None:
        self.journal, self.replica, self.folder = journal, replica, journal.path.parent
        self.say: Callable[[str], None] = to_stderr
        self._ending = threading.Event()
        self._answered = threading.Event()
        self._refusal: UserError | None = None
        self._told = self._full = False
        self._measure: Callable[[], dict[str, float]] = sampler(self.folder, device)
        self._keeper = threading.Thread(target=self._keep, name="journal", daemon=True)
        self._shipper = threading.Thread(target=self._ship, name="mlflow", daemon=True)

    @property
    def run_id(self) -> str:
        """The id in MLflow; empty as long as the store has not answered."""
        return self.replica.run_id

    def start(self) -> None:
        """Start the threads and wait for the store, at most OPEN_WAIT seconds. Raises UserError for a wrong one."""
        self._keeper.start()
        self._shipper.start()
        local = self.replica.uri.startswith("sqlite")  # a new file is migrated for seconds, and cannot hang
        answered = self._answered.wait(6 * OPEN_WAIT if local else OPEN_WAIT)
        if self._refusal is not None:
            self._stop()
            raise self._refusal
        if not answered:
            self._complain("it does not answer")

    # ------------------------------------------------------------------------------------------------ from the loop

    def metrics(self, values: dict[str, float], step: int) -> None:
        """Note numbers at a step."""
        self._note(lambda: self.journal.metrics(values, step))

    def tags(self, values: dict[str, str]) -> None:
        """Set tags of the run."""
        self.append("tags", values=values)

    def picture(self, path: Path, key: str, step: int) -> None:
        """Note a picture that was written into the output directory, as one of a series."""
        self._note(lambda: self.journal.picture(self._relative(path), key, step))

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Note a file or folder that was written into the output directory; `folder` is where MLflow shows it."""
        self.append("artifact", path=self._relative(path), folder=folder)

    def append(self, kind: str, **facts: Any) -> None:
        """Note an event."""
        self._note(lambda: self.journal.append(kind, **facts))

    def close(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED, and wait at most EXIT_WAIT seconds for MLflow to have it all."""
        self.append("state", status=status)
        self._ending.set()
        self._shipper.join(EXIT_WAIT)
        self.replica.abandoned.set()
        if left := self.replica.left():
            self.say(
                f"MLflow at {redact(self.replica.uri)} lacks {left:,} lines of this run's journal; when it answers: "
                f"python -m registry sync {self.folder}"
            )
        if self.replica.skipped:
            self.say(f"MLflow did not take {len(self.replica.skipped)} items, first {self.replica.skipped[0]}")
        self._stop()

    def _stop(self) -> None:
        self._ending.set()
        self.replica.abandoned.set()
        self._keeper.join()
        self._note(self.journal.close)

    def _relative(self, path: Path) -> str:
        return str(path.relative_to(self.folder) if path.is_relative_to(self.folder) else path.absolute())

    def _note(self, write: Callable[[], None]) -> None:
        """A full disk must not end a run by way of its journal: the checkpoint will say so, or someone makes room."""
        try:
            write()
            self._full = False
        except OSError as error:
            if not self._full:
                self.say(f"the journal cannot be written ({error.strerror or error}); training goes on without it")
            self._full = True

    # ------------------------------------------------------------------------------------------------- the threads

    def _keep(self) -> None:
        measured = time.monotonic()
        while not self._ending.wait(SYNC_EVERY):
            self._note(self.journal.sync)
            if time.monotonic() - measured >= SYSTEM_EVERY:
                measured = time.monotonic()
                self._note_machine()

    def _note_machine(self) -> None:
        """The machine's numbers, at steps of their own that a resumed run continues."""
        try:
            values = self._measure()
        except Exception as error:  # noqa: BLE001  a driver that fails is no reason to lose the journal's thread
            self.say(f"the machine cannot be measured any more ({first_line(error)})")
            self._measure = dict
            return
        newest = max((self.journal.latest[k].step for k in values if k in self.journal.latest), default=-1)
        self.metrics(values, newest + 1)

    def _ship(self) -> None:
        """Send until the end. A failure is followed by a pause; at the end there is one more try and no pause."""
        pause, beat = 1.0, 0.0
        while not self.replica.abandoned.is_set():
            ending = self._ending.is_set()
            try:
                beat = self._send(beat)
                pause = 1.0
            except Abandoned:
                return
            except UserError as error:
                self._refuse(error)
            except Exception as error:  # noqa: BLE001  whatever the store does, training goes on
                if self._answered.is_set() or is_outage(self.replica.uri, error):
                    self._complain(first_line(error))
                else:
                    self._refuse(refused(self.replica.uri, error))
                pause = min(2 * pause, LONGEST_PAUSE)
            if ending:
                return
            self._ending.wait(pause if self._told else LINGER)

    def _send(self, beat: float) -> float:
        """Everything that is there, and a sign of life. Returns when the last one was given."""
        if not self.replica.connected:
            self.replica.connect()
            self._answered.set()
        while self.replica.ship() and not self.replica.abandoned.is_set():
            continue
        if time.monotonic() - beat >= HEARTBEAT and not self._ending.is_set():
            self.replica.beat()
            beat = time.monotonic()
        if self._told:
            self._told = False
            self.say(f"MLflow at {redact(self.replica.uri)} answers again and has everything")
        return beat

    def _refuse(self, error: UserError) -> None:
        """At the start this ends the run; later it is one more thing that is wrong with the store."""
        if self._answered.is_set():
            self._complain(str(error))
        else:
            self._refusal = error
            self.replica.abandoned.set()
            self._answered.set()

    def _complain(self, why: str) -> None:
        if not self._told:
            self._told = True
            self._answered.set()
            self.say(
                f"MLflow at {redact(self.replica.uri)} does not take this run's data ({why}); training goes on, "
                f"everything is in {self.journal.path}"
            )


def open_run(
    recipe: Recipe,
    *,
    store: str | None,
    run_name: str,
    output_dir: Path,
    argv: Sequence[str],
    data: dict[str, dict[str, str | int]],
    device: str,
) -> Tracker:
    """Begin a run with all that is known before the first step, or go on in the one that `output_dir` holds.

    `data` describes the datasets by context (`training`, `validation`). A store that does not answer is no error: the
    journal has everything. Raises UserError for a store that cannot be one, and for a run that another process writes.
    """
    facts = run_facts(output_dir)
    uri = check_uri(store_of(facts, store))
    try:
        journal = Journal(output_dir / FILE_NAME, LOCK_WAIT)
    except InUse as error:
        raise UserError(f"{output_dir}: {error}; it cannot go on twice at a time") from None
    try:
        _begin(journal, recipe, facts, uri, run_name, argv)
        _describe(journal, recipe, output_dir, data, device)
    except BaseException:
        journal.close()
        raise
    tracker = Tracker(journal, Replica(output_dir, uri), device)
    tracker.start()
    return tracker


def _begin(
    journal: Journal, recipe: Recipe, facts: dict[str, Any], uri: str, run_name: str, argv: Sequence[str]
) -> None:
    """Who the run is. The uid is on the disk before there is a run in MLflow, so that no kill leaves one behind."""
    begun = journal.last.get("run", {})
    uid = facts.get("uid") or begun.get("uid") or uuid.uuid4().hex
    _note_facts(journal.path.parent, facts, uri, uid, run_name)
    if not begun:
        title = f"{recipe.name} {run_name}" if DATED.fullmatch(run_name) else run_name
        command = provenance.command_line(argv)
        journal.append("run", uid=uid, name=title, experiment=recipe.tracking.experiment, command=command)
    else:
        journal.append("tags", values={"resumed.command": provenance.command_line(argv)})


def _note_facts(folder: Path, facts: dict[str, Any], uri: str, uid: str, run_name: str) -> None:
    """Write run.json; the id of a run in another store is left out."""
    store = without_password(uri)
    same = facts.get("store") == store
    known = {"run_id": facts["run_id"]} if same and facts.get("run_id") else {}
    write_facts(folder, {"uid": uid, "store": store, "needs_password": uri != store, "run_name": run_name} | known)


def _describe(
    journal: Journal, recipe: Recipe, output_dir: Path, data: dict[str, dict[str, str | int]], device: str
) -> None:
    """Everything that is known before the first step, for a run that begins or goes on."""
    about, patch = provenance.code()
    own = dict(tag.split("=", 1) for tag in recipe.tracking.tags)
    journal.append(
        "tags", values=provenance.tags(recipe, output_dir, journal.last["run"]["command"], device) | about | own
    )
    journal.append("state", status="RUNNING")  # after its process: RUNNING under that of before reads as dead
    journal.append("params", values={k: str(v) for k, v in flatten(recipe).items()})
    journal.append("data", sets=[_dataset(recipe, context, described) for context, described in data.items()])
    for path in [output_dir / "recipe.json", *provenance.write_files(output_dir, patch)]:
        folder = None if path.parent == output_dir else provenance.FOLDER
        journal.append("artifact", path=str(path.relative_to(output_dir)), folder=folder)


def _dataset(recipe: Recipe, context: str, described: dict[str, str | int]) -> dict[str, Any]:
    slot = recipe.data if context == "training" else recipe.validation_data
    return {
        "context": context,
        "name": f"{type(slot).__name__} {context}",
        "digest": str(described.get("fingerprint", ""))[:36],
        "source": {k: str(v) for k, v in flatten(slot).items()},
        "profile": described,
    }

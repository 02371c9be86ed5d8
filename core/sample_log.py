"""Samples and scores that were made after a run was trained, in the run's MLflow page too.

A folder within the run's own is noted in its journal like all that a run says, so that `sync` brings it to
a store that was down. One elsewhere, or of a run that is being trained now and writes its journal itself, is sent as it
is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from core.journal import FILE_NAME, Journal
from core.redact import redact
from core.replica import Replica
from core.run_facts import run_facts
from core.tracking import client, first_line, store_of

WAIT = 10.0
"""Seconds in which a server must answer. A sqlite file may take longer, for it may have to be migrated, and cannot
hang.
"""


def log_to_run(run: Path, out: Path, store: str | None, place: str | None = None) -> str | None:
    """Log the folder `out` to the MLflow run of `run` as the artifacts `place`, samples/<its name> by default. Returns
    what the person is to know where that failed.
    """
    place = place or f"samples/{out.name}"
    within = out.resolve().is_relative_to(run.resolve()) and _noted(run, out, place)
    try:
        if within:
            return _send_journal(run, store)
        run_id = run_facts(run).get("run_id")
        if not run_id:
            return f"{run} is not in MLflow yet, so neither is {out}: python -m registry sync {run}"
        _send_folder(run, run_id, out, store, place)
    except Exception as error:  # noqa: BLE001  whatever the store does, the samples are there
        later = f"python -m registry sync {run}" if within else _by_hand(run, out, place)
        return f"all is in {out}, but MLflow did not take them ({first_line(error)}); later: {later}"
    return None


def _noted(run: Path, out: Path, place: str) -> bool:
    """Note the folder in the run's journal. Whether that could be done."""
    if not (run / FILE_NAME).is_file():
        return False
    where = str(out.resolve().relative_to(run.resolve()))
    try:
        with closing(Journal(run / FILE_NAME)) as journal:
            journal.append("artifact", path=where, folder=place)
    except OSError:  # InUse among them
        return False
    return True


def _send_journal(run: Path, store: str | None) -> str | None:
    replica = Replica(run, store_of(run_facts(run), store))
    _answers(replica.uri, replica.connect)
    replica.settle()
    while replica.ship():
        continue
    if left := replica.left():
        return f"MLflow lacks {left:,} lines of the run's journal, these among them: python -m registry sync {run}"
    return None


def _send_folder(run: Path, run_id: str, out: Path, store: str | None, place: str) -> None:
    uri = store_of(run_facts(run), store)
    _answers(uri, lambda: client(uri).get_run(run_id))
    client(uri).log_artifacts(run_id, str(out), place)


def _answers(uri: str, ask: Callable[[], object]) -> None:
    """Ask the store something. Raises what it raises, and TimeoutError for a server that says nothing."""
    failed: list[Exception] = []

    def asking() -> None:
        try:
            ask()
        except Exception as error:  # noqa: BLE001  handed to whoever waits
            failed.append(error)

    thread = threading.Thread(target=asking, daemon=True)
    thread.start()
    thread.join(None if uri.startswith("sqlite") else WAIT)
    if failed:
        raise failed[0]
    if thread.is_alive():
        raise TimeoutError(f"{redact(uri)} does not answer")


def _by_hand(run: Path, out: Path, place: str) -> str:
    """MLflow's own command for a folder."""
    facts = run_facts(run)
    return (
        f"MLFLOW_TRACKING_URI={facts.get('store', '…')} mlflow artifacts log-artifacts --run-id {facts['run_id']} "
        f"--local-dir {out} --artifact-path {place}"
    )

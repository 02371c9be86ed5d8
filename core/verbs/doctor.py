"""`doctor`: what this machine has, which runs say RUNNING and are dead, and what MLflow lacks. `--fix` mends."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import UserError
from core.health import NO_STORE, findings
from core.journal import FILE_NAME, InUse, Journal, in_use, read
from core.liveness import Verdict, judge, last_sign
from core.run_facts import run_facts
from core.tracking import client, first_line, store_uri
from core.verbs.flags import DoctorFlags
from core.verbs.printing import columns
from core.verbs.sync import RUNS, journals, replica_of, send

if TYPE_CHECKING:
    from mlflow import MlflowClient

CLOSED = "KILLED"
"""A process that is gone without a word was killed: one that failed would have said so."""


@dataclass(frozen=True)
class Patient:
    """A run that says RUNNING, with the verdict on its process."""

    run: Any
    verdict: Verdict

    @property
    def label(self) -> str:
        """Name and id as a person finds them on the page."""
        return f"{self.run.info.run_name} ({self.run.info.run_id})"

    @property
    def folder(self) -> Path | None:
        """The output directory, if it is on this machine and holds this run."""
        folder = Path(self.run.data.tags.get("output_dir", "/nowhere"))
        own = run_facts(folder).get("uid") == self.run.data.tags["uid"] and (folder / FILE_NAME).is_file()
        return folder if own else None


def doctor(flags: DoctorFlags) -> int:
    """Print the report, mend what `--fix` allows. Returns 0 when nothing is left to do, else 1."""
    found = list(findings(flags.store))
    print("\n".join(columns([("ok" if f.ok else "!!", f.name, f.text) for f in found])))
    healthy = all(f.ok for f in found) & _unsent(flags)
    if found[-1] != NO_STORE and found[-1].ok:
        healthy &= _runs(flags)  # after the journals: a run that never reached MLflow is among them now
    return int(not healthy)


def _runs(flags: DoctorFlags) -> bool:
    """The runs that say RUNNING. Whether all of them are alive, or closed now."""
    mlflow = client(store_uri(flags.store))
    patients = list(running(mlflow, flags.stale_minutes * 60))
    print(f"\n{len(patients)} runs say RUNNING")
    good = True
    for patient in patients:
        state, why = patient.verdict
        print(f"  {state:<10}{patient.label}: {why}")
        if state == "alive":
            continue
        if flags.fix and (state == "dead" or flags.suspected):
            print(f"            {close(mlflow, patient, flags.store)}")
        else:
            good = False
            print(f"            close it: python -m registry doctor --fix{' --suspected' * (state == 'suspected')}")
    return good


def running(mlflow: MlflowClient, stale: float) -> Iterator[Patient]:
    """This project's runs that say RUNNING; other people's runs in the same store have no uid and are not touched."""
    experiments = [e.experiment_id for e in mlflow.search_experiments()]
    token: str | None = None
    while True:
        page = mlflow.search_runs(experiments, "attributes.status = 'RUNNING'", page_token=token)
        yield from (Patient(run, judge(run.data.tags, stale)) for run in page if "uid" in run.data.tags)
        token = page.token
        if not token:
            return


def close(mlflow: MlflowClient, patient: Patient, store: str | None) -> str:
    """Close a run as KILLED at its last sign of life, through its journal where that is here. Returns what was done."""
    said = {"closed.by": f"doctor on {socket.gethostname()}", "closed.why": patient.verdict.why}
    folder = patient.folder
    if folder is None:
        for key, value in said.items():
            mlflow.set_tag(patient.run.info.run_id, key, value)
        sign = last_sign(patient.run.data.tags)
        mlflow.set_terminated(patient.run.info.run_id, CLOSED, int(sign.timestamp() * 1000) if sign else None)
        return f"closed as {CLOSED}; its files are not here"
    try:
        journal = Journal(folder / FILE_NAME)
    except InUse:
        return "left alone: a process holds its journal"
    end = max(event["time"] for event, _ in read(folder / FILE_NAME))
    journal.append("tags", values=said)
    journal.append("state", status=CLOSED, time=end)
    journal.close()
    sent = send(replica_of(folder, store))
    return f"closed as {CLOSED}, {sent:,} lines of its journal sent; go on with: python -m registry resume {folder}"


def _unsent(flags: DoctorFlags) -> bool:
    """Journals under ./runs of which a store lacks something. Whether there is none."""
    good = True
    for folder in journals(RUNS):
        if in_use(folder / FILE_NAME):
            continue
        try:
            replica = replica_of(folder, flags.store)
            left = replica.left()
            if left and flags.fix:
                print(f"\n{folder}: {send(replica):,} lines sent to MLflow")
            elif left:
                print(f"\n{folder}: MLflow lacks {left:,} lines; python -m registry sync {folder}")
            good &= not left or flags.fix
        except UserError as error:
            good = False
            print(f"\n{folder}: {error}")
        except Exception as error:  # noqa: BLE001  the store can fail in any way
            good = False
            print(f"\n{folder}: not sent ({first_line(error)})")
    return good

"""`sync`: send to MLflow what it lacks of the journals of runs. Doing it twice changes nothing."""

from __future__ import annotations

import time
from pathlib import Path

from core.errors import UserError
from core.journal import FILE_NAME, in_use, read
from core.redact import redact
from core.replica import Replica
from core.run_facts import run_facts
from core.tracking import fetch_output_dir, first_line, store_of

RUNS = Path("runs")


def sync(where: str | None, store: str | None) -> int:
    """Send the journal of one run, or of all under ./runs. Returns 0 when MLflow has everything, else 1."""
    folders = [find(where, store)] if where else journals(RUNS)
    if not folders:
        raise UserError(f"there is no run under ./{RUNS}: name an output directory or a run id")
    done = [_tell(folder, store) for folder in folders]
    return int(not all(done))


def find(where: str, store: str | None) -> Path:
    """The output directory named by a path or a run id. Raises UserError if it has no journal."""
    folder = Path(where).expanduser()
    if not folder.is_dir():
        folder = fetch_output_dir(where.removeprefix("run:"), store)
    if not (folder / FILE_NAME).is_file():
        raise UserError(f"{folder} holds no run: there is no {FILE_NAME} in it")
    return folder


def journals(root: Path) -> list[Path]:
    """The output directories below `root`."""
    return sorted(path.parent for path in root.rglob(FILE_NAME)) if root.is_dir() else []


def replica_of(folder: Path, store: str | None) -> Replica:
    """The run of a folder in the store that was given, or in its own."""
    return Replica(folder, store_of(run_facts(folder), store))


def _tell(folder: Path, store: str | None) -> bool:
    """Send one run and say so. Whether MLflow has all of it."""
    if in_use(folder / FILE_NAME):
        print(f"{folder}: is being trained; its own process sends")
        return True
    began = time.monotonic()
    replica = replica_of(folder, store)
    try:
        sent = send(replica)
    except UserError as error:
        print(f"{folder}: {error}")
        return False
    except Exception as error:  # noqa: BLE001  the store can fail in any way, and the next run may have another one
        rest = f"{replica.left():,} lines are left"
        print(f"{folder}: MLflow at {redact(replica.uri)} does not take it ({first_line(error)}); {rest}")
        return False
    print(f"{folder}: {_what(sent)} in {time.monotonic() - began:.1f} s, MLflow run {replica.run_id}")
    for skipped in replica.skipped:
        print(f"  left out  {skipped}")
    if left := replica.left():
        print(f"  not taken yet: {left:,} lines; try again when the store takes them")
    if last_state(folder) == "RUNNING":
        print("  its last state is RUNNING; if its process is gone: python -m registry doctor --fix")
    return not left


def _what(sent: int) -> str:
    return f"{sent:,} lines sent" if sent else "nothing was missing"


def send(replica: Replica) -> int:
    """Send everything. Returns the number of events; raises what the store raises."""
    sent = 0
    if replica.left() or not replica.noted_run:
        replica.connect()
        replica.settle()
        while more := replica.ship():
            sent += more
    else:
        replica.run_id = replica.noted_run
    return sent


def last_state(folder: Path) -> str:
    """What the journal says last of the run's state."""
    states = [event["status"] for event, _ in read(folder / FILE_NAME) if event["event"] == "state"]
    return str(states[-1]) if states else ""

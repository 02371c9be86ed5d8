"""`ui`: MLflow's own web page over the store of the runs."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

from core.errors import UserError
from core.mlflow_page import TAG, address
from core.redact import redact
from core.tracking import DEFAULT_STORE, client, mind_manners
from core.verbs.flags import UiFlags


def serve(flags: UiFlags) -> int:
    """Run `mlflow server` until it is stopped; returns its exit code. Raises UserError where it cannot start."""
    uri = flags.store or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_STORE
    _need_store(uri)
    _need_port(flags.host, flags.port)
    if importlib.util.find_spec("mlflow") is None:
        raise UserError("mlflow is not installed in this environment, and `ui` is its web page: pip install mlflow")
    shown = "127.0.0.1" if flags.host == "0.0.0.0" else f"[{flags.host}]" if ":" in flags.host else flags.host
    server = f"http://{shown}:{flags.port}"
    print(f"MLflow at {server}  (store: {redact(uri)}; stop with Ctrl-C)", flush=True)
    for name, table, charts in _pages(uri, server):
        print(f"  {name}\n    runs with what differs  {table}\n    samples side by side    {charts}", flush=True)
    # One process serves one reader; four workers and MLflow's job runner take five times as long to start and stop.
    where = ["--workers", "1", "--backend-store-uri", uri, "--host", flags.host, "--port", str(flags.port)]
    return _run([sys.executable, "-m", "mlflow", "server", *where])


def _need_store(uri: str) -> None:
    if uri.startswith(("http://", "https://")):
        raise UserError(f"the store {uri} is a server already: open that address in a browser")
    file = _local_path(uri)
    if file is not None and not file.exists():
        raise UserError(f"the store {uri} does not exist: it is made by the first run; --store names another")


def _local_path(uri: str) -> Path | None:
    """Where a sqlite or file store lies; None for a database server."""
    scheme, found, rest = uri.partition("://")
    if scheme == "sqlite":
        return Path(rest.removeprefix("/"))
    return (Path(rest) if scheme == "file" else None) if found else Path(uri.removeprefix("file:"))


def _need_port(host: str, port: int) -> None:
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        why = error.strerror or str(error)
        raise UserError(f"cannot listen on {host} port {port} ({why}): choose another with --port {port + 1}") from None


def _pages(uri: str, server: str) -> list[tuple[str, str, str]]:
    """The experiments that have a view of ours: name, address of the table, address of the charts."""
    found = [e for e in client(uri).search_experiments() if TAG in e.tags]
    return [(e.name, *(address(server, e.experiment_id, charts) for charts in (False, True))) for e in found]


def _run(command: list[str]) -> int:
    mind_manners()
    process = subprocess.Popen(command, env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"})
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        return 0

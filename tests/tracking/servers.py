"""Real MLflow servers, and the three ways in which one fails: dead, deaf and slow."""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

AUTH = """[mlflow]
default_permission = READ
database_uri = sqlite:///{folder}/auth.db
admin_username = admin
admin_password = {password}
auth_cache_ttl_seconds = 60
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def end_with_parent() -> None:
    """In a child that is about to start: be asked to end when the test's process is gone, even by kill -9."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


@contextmanager
def server(folder: Path, template: Path, port: int = 0, password: str = "") -> Iterator[str]:
    """`mlflow server` over a copy of a migrated store; with `password`, behind basic auth. Yields its address."""
    port = port or free_port()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "mlflow.db").exists():
        shutil.copy(template, folder / "mlflow.db")
    env = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "art")]
    if password:
        (folder / "auth.ini").write_text(AUTH.format(folder=folder, password=password))
        env |= {"MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"), "MLFLOW_FLASK_SERVER_SECRET_KEY": "of this test"}
        command += ["--app-name", "basic-auth"]
    with (folder / "log").open("w") as log:
        alone = {"start_new_session": True, "preexec_fn": end_with_parent}
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log, **alone)
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, 15)
            process.wait(60)


def wait_for(url: str, process: subprocess.Popen) -> None:
    """Until the page answers. Raises OSError when the process has ended, or after four minutes."""
    end = time.monotonic() + 240
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > end:
                raise
            time.sleep(0.1)


@contextmanager
def deaf() -> Iterator[str]:
    """A server that takes connections and never says anything."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@contextmanager
def slow(address: str, seconds: float, port: int = 0) -> Iterator[str]:
    """The server at `address` behind a line that holds back every answer; behind `port`, if one is given."""
    near, (host, far) = port, address.removeprefix("http://").split(":")
    with socket.create_server(("127.0.0.1", near), backlog=64) as listening:
        threading.Thread(target=_forward, args=(listening, (host, int(far)), seconds), daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def _forward(listening: socket.socket, to: tuple[str, int], seconds: float) -> None:
    while True:
        try:
            near, _ = listening.accept()
        except OSError:  # closed: the test is over
            return
        try:
            far = socket.create_connection(to)
        except OSError:
            near.close()
            continue
        for pair in ((near, far, 0.0), (far, near, seconds)):
            threading.Thread(target=_pump, args=pair, daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket, seconds: float) -> None:
    try:
        while data := source.recv(65536):
            time.sleep(seconds)
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:  # the other direction has closed both
        source.close()
        sink.close()

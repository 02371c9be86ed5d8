"""The MLflow store: which one, how it is opened, and what a run in it says. Training never waits for it
(`core/tracker.py`); the verbs that name a run do.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from core.errors import UserError, did_you_mean
from core.redact import redact, without_password

if TYPE_CHECKING:
    from mlflow import MlflowClient

DEFAULT_STORE = "sqlite:///runs/mlflow.db"
SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql", "databricks")
MANNERS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # MLflow reports its use to its makers unless told not to
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # 7 with growing pauses: one call to a dead server took 247 s
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # two lines of emoji at every end of a run
}
"""MLflow's settings for our processes; what the user has set in the environment stays."""


def mind_manners() -> None:
    """Put MLflow's settings into the environment. Call before the first `import mlflow`."""
    for name, value in MANNERS.items():
        os.environ.setdefault(name, value)


def store_uri(given: str | None = None) -> str:
    """The tracking URI: what was given, else $MLFLOW_TRACKING_URI, else a sqlite file under ./runs."""
    uri = given or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_STORE
    if uri == DEFAULT_STORE:
        Path("runs").mkdir(exist_ok=True)
        return f"sqlite:///{Path('runs/mlflow.db').absolute()}"
    return uri


def store_of(facts: Mapping[str, Any], given: str | None = None) -> str:
    """The store of a run that goes on: what was given, else the one noted in its run.json, which holds no password.

    Raises UserError when that store needs a password and the environment has none.
    """
    noted, current = facts.get("store"), os.environ.get("MLFLOW_TRACKING_URI", "")
    if given or not noted:
        return store_uri(given)
    if without_password(current) == noted:
        return current
    if facts.get("needs_password") and "MLFLOW_TRACKING_PASSWORD" not in os.environ:
        raise UserError(
            f"the run is in the MLflow store {noted}, whose password is not kept in run.json: set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or the whole MLFLOW_TRACKING_URI, or give --store"
        )
    return str(noted)


def check_uri(uri: str) -> str:
    """The URI, if it can be one of a store. Raises UserError for one that never can."""
    scheme, found, rest = uri.partition("://")
    kind = scheme.partition("+")[0].lower()
    if uri.partition("://")[0] == "databricks":
        return uri
    if not found or kind == "file":
        raise UserError(
            f"MLflow store {redact(uri)}: MLflow writes no folders any more; take sqlite:///<folder>/mlflow.db, or "
            "http://<host>:<port> of a server"
        )
    if kind not in SCHEMES:
        raise UserError(
            f"MLflow store {redact(uri)}: unknown scheme {scheme!r}{did_you_mean(kind, SCHEMES)}; "
            f"known are {', '.join(SCHEMES)}"
        )
    if kind.startswith("http"):
        _check_address(uri)
    elif not rest.strip("/"):
        raise UserError(f"MLflow store {redact(uri)}: it names no database")
    return uri


def _check_address(uri: str) -> None:
    try:
        parts = urlsplit(uri)
        missing = "" if parts.hostname else "it names no host"
        _ = parts.port
    except ValueError as error:
        missing = str(error)
    if missing:
        raise UserError(f"MLflow store {redact(uri)}: {missing}; expected http://<host>:<port>")


def client(uri: str) -> MlflowClient:
    """A client of the store. Raises UserError when it cannot be opened."""
    check_uri(uri)
    mind_manners()
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    for noisy in ("mlflow.store.db.utils", "alembic", "mlflow.utils.requests_utils"):  # migrations, a line each
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        return MlflowClient(tracking_uri=uri)
    except (MlflowException, OSError, ImportError) as error:
        if is_outage(uri, error):
            raise
        raise refused(uri, error) from None


def refused(uri: str, error: BaseException) -> UserError:
    """What a store says when waiting does not help."""
    if _status(error) == 404:
        return UserError(f"MLflow store {redact(uri)}: no MLflow server is there (it answers 404)")
    hint = ""
    if getattr(error, "error_code", "") in ("UNAUTHENTICATED", "PERMISSION_DENIED") or _status(error) in (401, 403):
        hint = "; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    return UserError(f"MLflow store {redact(uri)}: {first_line(error)}{hint}")


def first_line(error: BaseException) -> str:
    """What an error says, in one line without secrets."""
    lines = redact(str(error)).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def is_outage(uri: str, error: BaseException) -> bool:
    """Whether the store is down, so that waiting helps; otherwise it is wrong, and the user must mend something."""
    if "locked" in str(error):  # a sqlite file that another process writes
        return True
    if uri.startswith("http"):
        status = _status(error)
        return status >= 500 or status in (408, 429) if status else isinstance(error, OSError)
    return not uri.startswith("sqlite") and "OperationalError" in f"{type(error).__name__} {error}"


def _status(error: BaseException) -> int:
    """The HTTP status that an error of MLflow stands for; 0 for another error."""
    ask = getattr(error, "get_http_status_code", None)
    return int(ask()) if ask else 0


# ------------------------------------------------------------------------------------------------------ what runs say


def fetch_run(run_id: str, store: str | None = None) -> Any:
    """The MLflow run. Raises UserError when the store does not have it."""
    uri = store_uri(store)
    mlflow = client(uri)
    from mlflow.exceptions import MlflowException

    try:
        return mlflow.get_run(run_id)
    except MlflowException as error:
        if is_outage(uri, error):
            raise refused(uri, error) from None
        raise UserError(
            f"run:{run_id}: the MLflow store {redact(uri)} has no such run (another store: --store or "
            "MLFLOW_TRACKING_URI)"
        ) from None


def fetch_output_dir(run_id: str, store: str | None = None) -> Path:
    """The output directory that a run noted. Raises UserError when it is not on this machine."""
    folder = Path(fetch_run(run_id, store).data.tags.get("output_dir", ""))
    if not folder.name or not folder.is_dir():
        raise UserError(f"run:{run_id}: its output directory {str(folder)!r} is not on this machine")
    return folder


def fetch_recipe_json(run_id: str, store: str | None = None) -> str:
    """The text of a run's recipe.json."""
    fetch_run(run_id, store)
    from mlflow.exceptions import MlflowException

    try:
        return Path(client(store_uri(store)).download_artifacts(run_id, "recipe.json")).read_text()
    except (MlflowException, OSError):
        raise UserError(f"run:{run_id} has no recipe.json among its artifacts") from None

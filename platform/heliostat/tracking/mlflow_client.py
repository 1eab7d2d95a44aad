"""EDGE to MLflow, first of three files: how its client is opened, and what its failures mean.

A fresh sqlite database is created under a lock, because several processes that open it at once break its migrations.
"""

import contextlib
import fcntl
import logging
import os
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from heliostat.errors import TrackerLostError, TrackingError
from heliostat.tracking.secrets import without_secrets

_OPENING = threading.Lock()
_OPENED: set[str] = set()
_TOO_MANY_REQUESTS = 429
_SERVER_ERRORS = 500


def open_client(uri: str) -> Any:
    """MLflow's client for a URI; its stores are shared within the process. Makes no request to a server."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    with _OPENING, contextlib.ExitStack() as stack:
        if not _OPENED:  # once, for the filters of warnings are shared between threads
            stack.enter_context(warnings.catch_warnings())  # MLflow 3 warns about its own dependencies when it is first used
            warnings.simplefilter("ignore")
        import mlflow

        if os.environ.get("HELIOSTAT_DEBUG") != "1":
            logging.getLogger("alembic").setLevel(logging.WARNING)  # it tells of every table that it creates
            logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # tracebacks of what `one_line` says
        client = mlflow.MlflowClient(tracking_uri=uri)
        if not _OPENED and uri.startswith("sqlite"):
            client.search_experiments(max_results=1)  # the first query sets up its tables' classes, with warnings
        _OPENED.add(uri)
        return client


@contextmanager
def one_line(uri: str) -> Iterator[None]:
    """Turn what MLflow, its database and its artifact stores raise into one line.

    Raises TrackerLostError where the same request may succeed later (no answer, a status of 500 and more, a locked database),
    else TrackingError.
    """
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except TrackingError:
        raise
    except (MlflowException, SQLAlchemyError, OSError, ValueError) as error:  # ValueError: a URI that is none
        text = " ".join(str(error).partition("[SQL:")[0].split())  # the statement holds every value that was to be written
        no_answer = re.search(r"Max retries exceeded.*Caused by (\w+)", text)
        reason = without_secrets(f"no answer ({no_answer[1]})" if no_answer else text[:300])
        message = f"MLflow at {without_secrets(uri)} failed: {reason}; set tracking.uri to a working store, or to none"
        if _may_pass(error):
            raise TrackerLostError(message, reason) from error
        raise TrackingError(message) from error


def _may_pass(error: Exception) -> bool:
    """Whether the same request may succeed later. MlflowException and HTTPError carry a status, the others concern files."""
    response = getattr(error, "response", None)
    status = getattr(error, "get_http_status_code", lambda: getattr(response, "status_code", _SERVER_ERRORS))()
    return int(status) >= _SERVER_ERRORS or int(status) == _TOO_MANY_REQUESTS


@contextmanager
def short_patience() -> Iterator[None]:
    """Let the first requests fail within 8 s where nobody answers; what the user's environment sets stays."""
    hasty = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "4"}
    added = {name: value for name, value in hasty.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


@contextmanager
def alone_with_database(uri: str) -> Iterator[None]:
    """Keep other processes out while a sqlite file may be created or upgraded; nothing for servers."""
    path = re.fullmatch(r"sqlite:///([^?]+)(?:\?.*)?", uri)
    if path is None:
        yield
        return
    file = Path(path[1])
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_name(f"{file.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield

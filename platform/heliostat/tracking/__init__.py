"""EDGE to MLflow: experiment runs, logged models, the registry; and what happens when the server is lost.

config.py          the section `tracking` of a recipe
run.py             what a tracker and its runs promise, and the ones that keep nothing
delivery.py        entries to a server, in order, whether it answers or not
spool.py           entries that wait, on disk
secrets.py         what is never recorded
system_metrics.py  samples of the machine
mlflow_run.py      runs in MLflow
mlflow_client.py, mlflow_sender.py, mlflow_models.py    with mlflow_run.py the only files that know MLflow
"""

import os
import shlex
import shutil
import sys
from pathlib import Path

from heliostat.errors import TrackingError
from heliostat.storage import LocalStore, Store
from heliostat.tracking.config import TrackingConfig
from heliostat.tracking.mlflow_client import short_patience
from heliostat.tracking.mlflow_run import MlflowRun, MlflowTracker, delivery_to
from heliostat.tracking.run import Link, Notify, NullRun, NullTracker, Run, Tracker
from heliostat.tracking.secrets import without_secrets

__all__ = [
    "Link",
    "MlflowRun",
    "MlflowTracker",
    "Notify",
    "NullRun",
    "NullTracker",
    "Run",
    "Tracker",
    "TrackingConfig",
    "open_tracker",
    "program",
    "ui_command",
    "without_secrets",
]


def open_tracker(config: TrackingConfig, store: Store, notify: Notify = print) -> Tracker:
    """The tracker of a recipe, ready to use; what earlier processes left is sent.

    Raises TrackingError when it cannot be reached.
    """
    if config.uri == "none":
        return NullTracker()
    uri, artifacts = config.uri, ""
    if uri == "auto":
        if not isinstance(store, LocalStore):
            raise TrackingError(
                f"tracking.uri=auto is a file beside a local store, and the store is {store.uri}; give the URI of an MLflow "
                "server, sqlite:////absolute/path.db, or none"
            )
        database = store.path("mlflow.db")
        database.parent.mkdir(parents=True, exist_ok=True)
        uri = f"sqlite:///{database}"
        artifacts = (database.parent / "mlflow-files").as_uri()
    tracker = MlflowTracker(
        uri,
        config.experiment,
        artifacts,
        str(_spool_folder(config, store)),
        spool_bytes=config.spool_bytes,
        retry_every_seconds=config.retry_every_seconds,
        system_metrics_every_seconds=config.system_metrics_every_seconds if config.system_metrics else 0.0,
    )
    with short_patience():
        tracker.prepare()
    delivery_to(tracker).send_abandoned(notify)
    return tracker


def _spool_folder(config: TrackingConfig, store: Store) -> Path:
    if config.spool != "auto":
        return Path(config.spool).expanduser().absolute()
    if isinstance(store, LocalStore):
        return store.path("mlflow-spool")
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "heliostat" / "mlflow-spool"


def ui_command(uri: str) -> str:
    """The command that opens the MLflow UI on what a tracker recorded."""
    if not uri:
        return "(tracking is off)"
    if not uri.startswith("sqlite"):
        return f"open {without_secrets(uri)}"
    return f"{program('mlflow')} ui --backend-store-uri {shlex.quote(uri)} --port 5000"


def program(name: str) -> str:
    """How a shell here calls a program that is installed beside this Python: by its name where that finds it."""
    script = Path(sys.executable).with_name(name)
    near = os.path.relpath(script)
    return name if shutil.which(name) == str(script) else shlex.quote(str(script) if near.startswith("..") else near)

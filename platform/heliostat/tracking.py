"""EDGE to MLflow: the only file that imports it.

A `Tracker` opens runs; a `Run` receives metrics, files and tags. `NullTracker` keeps nothing. Workers never create the
database: the driver opens the run and hands its id on, and the workers `attach` to it.
"""

import contextlib
import logging
import os
import re
import shlex
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import Field

from heliostat.config import StrictModel, flatten
from heliostat.errors import TrackingError
from heliostat.storage import LocalStore, Store

_IMPORTING = threading.Lock()
_PARAM_LIMIT = 6000  # characters; MLflow 3 refuses values past 8,000


class TrackingConfig(StrictModel):
    """Where runs are recorded."""

    uri: str = "auto"
    """MLflow tracking URI; "auto" is a sqlite file in the local store, "none" records nothing."""
    experiment: str = Field(default="heliostat", min_length=1)
    """MLflow experiment name."""


class Run(Protocol):
    """One open run."""

    @property
    def id(self) -> str:
        """Identity to `attach` to; empty when nothing is recorded."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record numbers at a step, in one request."""

    def log_file(self, path: Path, folder: str = "") -> None:
        """Keep one local file with the run."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set or overwrite tags."""

    def finish(self, status: str) -> None:
        """Close with FINISHED, FAILED or KILLED."""


class Tracker(Protocol):
    """Opens runs. Instances can be pickled and used in workers."""

    @property
    def uri(self) -> str:
        """The tracking URI, empty when nothing is recorded."""

    def start(self, name: str, *, config: Mapping[str, Any], tags: Mapping[str, str], resume_id: str = "") -> Run:
        """Open a run, or reopen `resume_id` when it exists."""

    def attach(self, run_id: str) -> Run:
        """The open run with this id."""


class NullRun:
    """Keeps nothing."""

    id = ""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Nothing is kept."""

    def log_file(self, path: Path, folder: str = "") -> None:
        """Nothing is kept."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Nothing is kept."""

    def finish(self, status: str) -> None:
        """Nothing is kept."""


class NullTracker:
    """Keeps nothing: `tracking.uri=none`."""

    uri = ""

    def start(self, name: str, *, config: Mapping[str, Any], tags: Mapping[str, str], resume_id: str = "") -> Run:
        return NullRun()

    def attach(self, run_id: str) -> Run:
        return NullRun()


def _client(uri: str) -> Any:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    with _IMPORTING, contextlib.ExitStack() as stack:
        if "mlflow" not in sys.modules:  # once, for the filters of warnings are shared between threads
            stack.enter_context(warnings.catch_warnings())  # MLflow 3.17 warns about its own dependencies while it is imported
            warnings.simplefilter("ignore")
        import mlflow

        for name in ("mlflow.store.db.utils", "alembic"):  # they tell of every table they create
            logging.getLogger(name).setLevel(logging.WARNING)
    return mlflow.MlflowClient(tracking_uri=uri)


@dataclass(frozen=True)
class MlflowRun:
    """A run in MLflow."""

    uri: str
    id: str

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        entities = [Metric(name, float(value), now, step) for name, value in metrics.items()]
        with _one_line(self.uri):
            _client(self.uri).log_batch(self.id, metrics=entities)

    def log_file(self, path: Path, folder: str = "") -> None:
        with _one_line(self.uri):
            _client(self.uri).log_artifact(self.id, str(path), folder or None)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        with _one_line(self.uri):
            _client(self.uri).log_batch(self.id, tags=[RunTag(key, value) for key, value in tags.items()])

    def finish(self, status: str) -> None:
        with _one_line(self.uri):
            _client(self.uri).set_terminated(self.id, status)


@dataclass(frozen=True)
class MlflowTracker:
    """Runs in one experiment of an MLflow store or server. `prepare` must have run once, in one process."""

    uri: str
    experiment: str
    artifact_location: str

    def prepare(self) -> None:
        """Create or upgrade the database and the experiment, before any worker opens it (a fresh sqlite races)."""
        from mlflow.exceptions import MlflowException

        with _one_line(self.uri):
            client = _client(self.uri)
            if client.get_experiment_by_name(self.experiment) is None:
                try:
                    client.create_experiment(self.experiment, artifact_location=self.artifact_location or None)
                except MlflowException:
                    if client.get_experiment_by_name(self.experiment) is None:
                        raise

    def start(self, name: str, *, config: Mapping[str, Any], tags: Mapping[str, str], resume_id: str = "") -> Run:
        from mlflow.entities import Param, RunTag
        from mlflow.exceptions import MlflowException

        with _one_line(self.uri):
            client = _client(self.uri)
            if resume_id:
                try:
                    client.update_run(resume_id, status="RUNNING")
                    return MlflowRun(self.uri, resume_id)
                except MlflowException:
                    client.get_experiment_by_name(self.experiment)  # the store answers: the run itself is gone, so start anew
            experiment = client.get_experiment_by_name(self.experiment)
            run = client.create_run(experiment.experiment_id, run_name=name)
            params = [Param(key, str(value)[:_PARAM_LIMIT]) for key, value in flatten(config).items()]
            for start in range(0, len(params), 100):  # MLflow takes at most 100 parameters a request
                client.log_batch(run.info.run_id, params=params[start : start + 100])
            client.log_batch(run.info.run_id, tags=[RunTag(key, value) for key, value in tags.items()])
            return MlflowRun(self.uri, run.info.run_id)

    def attach(self, run_id: str) -> Run:
        return MlflowRun(self.uri, run_id) if run_id else NullRun()


@contextmanager
def _one_line(uri: str) -> Iterator[None]:
    """Turn what MLflow and its database raise into a TrackingError of one line."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        text = " ".join(str(error).split())
        no_answer = re.search(r"Max retries exceeded.*Caused by (\w+)", text)
        reason = f"no answer ({no_answer[1]})" if no_answer else text[:300]
        message = f"MLflow at {uri} failed: {reason}; set tracking.uri to a working store, or to none"
        raise TrackingError(_without_password(message)) from error


@contextmanager
def _short_patience() -> Iterator[None]:
    """Let the first requests fail within 8 s where nobody answers; what the user's environment sets stays."""
    hasty = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "4"}
    added = {name: value for name, value in hasty.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _without_password(text: str) -> str:
    """Text whose URIs show no user and password."""
    return re.sub(r"//[^/@\s]+@", "//***@", text)


def open_tracker(config: TrackingConfig, store: Store) -> Tracker:
    """The tracker of a recipe, ready to use. Raises TrackingError when it cannot be reached."""
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
    tracker = MlflowTracker(uri, config.experiment, artifacts)
    with _short_patience():
        tracker.prepare()
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    return tracker


def ui_command(uri: str) -> str:
    """The command that opens the MLflow UI on what a tracker recorded."""
    if not uri:
        return "(tracking is off)"
    if not uri.startswith("sqlite"):
        return f"open {_without_password(uri)}"
    return f"{program('mlflow')} ui --backend-store-uri {shlex.quote(uri)} --port 5000"


def shown_uri(uri: str) -> str:
    """A tracking URI as it may be printed: without user and password."""
    return _without_password(uri)


def program(name: str) -> str:
    """How a shell here calls a program that is installed beside this Python: by its name where that finds it."""
    script = Path(sys.executable).with_name(name)
    near = os.path.relpath(script)
    return name if shutil.which(name) == str(script) else shlex.quote(str(script) if near.startswith("..") else near)

"""Runs in MLflow, and the tracker that opens them. The driver opens a run and hands its id on; the workers attach to it."""

import base64
import hashlib
import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from heliostat.config import flatten
from heliostat.tracking.delivery import Delivery
from heliostat.tracking.mlflow_client import alone_with_database, one_line, open_client
from heliostat.tracking.mlflow_sender import Sender
from heliostat.tracking.run import Link, Notify, NullRun, Run, Sample
from heliostat.tracking.secrets import plain_texts, without_secrets
from heliostat.tracking.spool import Entry, SpoolFolder
from heliostat.tracking.system_metrics import watching

_PARAM_LIMIT = 6000  # characters; MLflow 3 refuses values past 8,000
_TAG_LIMIT = 6000
_GONE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "INVALID_STATE")  # of a run that is not there, or was deleted


@dataclass(frozen=True)
class MlflowTracker:
    """Runs in one experiment of an MLflow store or server. `prepare` must have run once before a run is started."""

    uri: str
    experiment: str
    artifact_location: str
    spool_folder: str
    spool_bytes: int = 64 * 2**20
    retry_every_seconds: float = 30.0
    system_metrics_every_seconds: float = 0.0
    """0 records no system metrics."""

    def prepare(self) -> None:
        """Create or upgrade the database and the experiment. Raises TrackingError when MLflow does not answer."""
        from mlflow.exceptions import MlflowException

        with one_line(self.uri), alone_with_database(self.uri):
            client = open_client(self.uri)
            if client.get_experiment_by_name(self.experiment) is None:
                try:
                    client.create_experiment(self.experiment, artifact_location=self.artifact_location or None)
                except MlflowException:  # another process may have made it on a server
                    if client.get_experiment_by_name(self.experiment) is None:
                        raise

    def start(
        self,
        name: str,
        *,
        config: Mapping[str, Any],
        tags: Mapping[str, str],
        resume_id: str = "",
        notify: Notify = print,
    ) -> Run:
        """Open a run, or reopen `resume_id`; a run that was deleted is replaced by a new one.

        Raises TrackingError when MLflow does not answer, or refuses the run for another reason.
        """
        from mlflow.entities import Param, RunTag
        from mlflow.exceptions import MlflowException

        delivery = delivery_to(self)
        delivery.send_abandoned(notify)
        with one_line(self.uri):
            client = open_client(self.uri)
            if resume_id:
                try:
                    client.update_run(resume_id, status="RUNNING")
                    return MlflowRun(resume_id, delivery, notify, self.system_metrics_every_seconds)
                except MlflowException as error:
                    if error.error_code not in _GONE:
                        raise
                    notify(f"the run {resume_id} is not in MLflow any more; its metrics go on in a new one")
            experiment = client.get_experiment_by_name(self.experiment)
            run_id: str = client.create_run(experiment.experiment_id, run_name=name).info.run_id
            params = [Param(key, value[:_PARAM_LIMIT]) for key, value in plain_texts(flatten(config)).items()]
            for start in range(0, len(params), 100):  # MLflow takes at most 100 parameters a request
                client.log_batch(run_id, params=params[start : start + 100])
            client.log_batch(run_id, tags=[RunTag(key, value) for key, value in plain_texts(tags).items()])
            return MlflowRun(run_id, delivery, notify, self.system_metrics_every_seconds)

    def attach(self, run_id: str, notify: Notify = print) -> Run:
        """The open run with this id; nothing is asked of MLflow before something is recorded."""
        if not run_id:
            return NullRun()
        delivery = delivery_to(self)
        delivery.send_abandoned(notify)
        return MlflowRun(run_id, delivery, notify, self.system_metrics_every_seconds)


@cache
def delivery_to(tracker: MlflowTracker) -> Delivery:
    """The one way from this process to a tracker's MLflow, shared by all of its runs: an outage is noticed and said once."""
    where = without_secrets(tracker.uri)
    key = hashlib.sha256(where.encode()).hexdigest()[:12]
    sender = Sender(tracker.uri, tracker.experiment)
    return Delivery(
        sender,
        sender.probe,
        SpoolFolder(Path(tracker.spool_folder), key, tracker.spool_bytes),
        where=f"MLflow at {where}",
        retry_every_seconds=tracker.retry_every_seconds,
    )


@dataclass(frozen=True)
class MlflowRun:
    """A run in MLflow. Nothing but the driver's `finish` waits for a server that is lost."""

    id: str
    delivery: Delivery
    notify: Notify
    system_metrics_every_seconds: float

    def _send(self, call: str, **arguments: Any) -> None:
        self.delivery.send(Entry(self.id, call, arguments, int(time.time() * 1000)), self.notify)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record numbers at a step; a (metric, step) that the run has already keeps its first value."""
        self._send("log_metrics", values={name: float(value) for name, value in metrics.items()}, step=int(step))

    def log_file(self, path: Path, folder: str = "") -> None:
        """Keep one local file with the run."""
        self.log_bytes(f"{folder}/{path.name}" if folder else path.name, path.read_bytes())

    def log_bytes(self, name: str, data: bytes) -> None:
        """Keep a file of this content with the run."""
        self._send("log_bytes", name=name, data=base64.b64encode(data).decode())

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set or overwrite tags."""
        self._send("set_tags", tags={key: value[:_TAG_LIMIT] for key, value in plain_texts(tags).items()})

    def log_inputs(self, inputs: Mapping[str, Link]) -> None:
        """What the run works from, by role."""
        self._send("log_inputs", inputs={role: _plain(link) for role, link in inputs.items()})

    def log_model(self, model: Link, *, step: int, tags: Mapping[str, str], metrics: Mapping[str, float]) -> None:
        """A model that the run made, by reference."""
        self._send("log_model", model=_plain(model), step=step, tags=plain_texts(tags), metrics=dict(metrics))

    def register_model(
        self, model: Link, name: str, *, aliases: Iterable[str], tags: Mapping[str, str], description: str
    ) -> None:
        """A version of the registered model that points at the logged model."""
        texts = plain_texts(tags)
        self._send(
            "register_model",
            model=_plain(model),
            name=name,
            aliases=list(aliases),
            tags=texts,
            description=without_secrets(description)[:_TAG_LIMIT],
        )

    def watch_system(self, also: Sample = dict) -> AbstractContextManager[None]:
        """Record what this machine does until the context ends."""
        if not self.system_metrics_every_seconds:
            return nullcontext()
        return watching(lambda values: self._send("log_system", values={**values, **also()}), self.system_metrics_every_seconds)

    def finish(self, status: str) -> None:
        """Close with FINISHED, FAILED or KILLED, and say what could not be sent."""
        self._send("finish", status=status)
        self.delivery.settle(self.notify)


def _plain(link: Link) -> dict[str, str]:
    return plain_texts(asdict(link))

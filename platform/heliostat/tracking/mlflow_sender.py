"""EDGE to MLflow, second of three files: what each entry of a run means in MLflow's requests.

Every entry can be sent twice without harm: metrics by (name, step), tags and files overwrite, models and versions are looked up
by their tags before they are made.
"""

import base64
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from heliostat.errors import TrackerLostError, TrackingError
from heliostat.tracking import mlflow_models
from heliostat.tracking.mlflow_client import one_line, open_client
from heliostat.tracking.spool import Entry

_METRICS_PER_REQUEST = 1000  # MLflow's limit


@dataclass
class _Logged:
    """Which steps of a run's metrics are in MLflow. `steps` is read only for metrics that step back, as after a restart."""

    last: dict[str, int]
    steps: dict[str, set[int]] = field(default_factory=dict)


class Sender:
    """Applies entries to one MLflow."""

    def __init__(self, uri: str, experiment: str) -> None:
        self._uri, self._experiment = uri, experiment
        self._logged: dict[str, _Logged] = {}

    def __call__(self, entry: Entry) -> None:
        """Send one entry. Raises TrackerLostError when MLflow does not answer, TrackingError when it refuses."""
        calls = {
            "log_metrics": self._log_metrics,
            "log_system": self._log_system,
            "log_bytes": self._log_bytes,
            "set_tags": self._set_tags,
            "finish": self._finish,
            "log_inputs": self._log_inputs,
            "log_model": self._log_model,
            "register_model": self._register_model,
        }
        if entry.call not in calls:
            raise TrackingError(f"a waiting record cannot be read ({entry.call})")
        try:
            with one_line(self._uri):
                calls[entry.call](open_client(self._uri), entry)
        except TrackerLostError:
            self._logged.pop(entry.run_id, None)  # what was under way may have arrived: ask again before the next one
            raise

    def probe(self) -> None:
        """Ask for the experiment: whether MLflow answers at all. Raises TrackerLostError when it does not."""
        with one_line(self._uri):
            open_client(self._uri).get_experiment_by_name(self._experiment)

    def _of_run(self, client: Any, run_id: str) -> _Logged:
        if run_id not in self._logged:
            metrics = client.get_run(run_id).data._metric_objs  # the newest point of each metric, with its step
            self._logged[run_id] = _Logged({metric.key: metric.step for metric in metrics})
        return self._logged[run_id]

    def _is_new(self, client: Any, run_id: str, name: str, step: int) -> bool:
        logged = self._of_run(client, run_id)
        if step > logged.last.get(name, -1):
            return True
        if name not in logged.steps:
            logged.steps[name] = {point.step for point in client.get_metric_history(run_id, name)}
        return step not in logged.steps[name]

    def _log_metrics(self, client: Any, entry: Entry) -> None:
        values, step = entry.arguments["values"], entry.arguments["step"]
        new = {name: value for name, value in values.items() if self._is_new(client, entry.run_id, name, step)}
        self._log_batches(client, entry, new, step)

    def _log_system(self, client: Any, entry: Entry) -> None:
        """Samples have no step of their own: they are counted on, over restarts."""
        last = self._of_run(client, entry.run_id).last
        step = max((last[name] for name in last if name.startswith("system/")), default=-1) + 1
        self._log_batches(client, entry, entry.arguments["values"], step)

    def _log_batches(self, client: Any, entry: Entry, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        points = [Metric(name, float(value), entry.time_ms, step) for name, value in values.items()]
        for start in range(0, len(points), _METRICS_PER_REQUEST):
            client.log_batch(entry.run_id, metrics=points[start : start + _METRICS_PER_REQUEST])
        logged = self._of_run(client, entry.run_id)
        for name in values:
            logged.last[name] = max(step, logged.last.get(name, -1))
            if name in logged.steps:
                logged.steps[name].add(step)

    def _log_bytes(self, client: Any, entry: Entry) -> None:
        name = PurePosixPath(entry.arguments["name"])
        with tempfile.TemporaryDirectory(prefix="heliostat-file-") as folder:
            path = Path(folder) / name.name
            path.write_bytes(base64.b64decode(entry.arguments["data"]))
            client.log_artifact(entry.run_id, str(path), None if str(name.parent) == "." else str(name.parent))

    def _set_tags(self, client: Any, entry: Entry) -> None:
        from mlflow.entities import RunTag

        client.log_batch(entry.run_id, tags=[RunTag(key, value) for key, value in entry.arguments["tags"].items()])

    def _finish(self, client: Any, entry: Entry) -> None:
        client.set_terminated(entry.run_id, entry.arguments["status"], entry.time_ms)

    def _log_inputs(self, client: Any, entry: Entry) -> None:
        mlflow_models.log_inputs(client, self._experiment, entry.run_id, entry.arguments["inputs"])

    def _log_model(self, client: Any, entry: Entry) -> None:
        mlflow_models.log_model(client, self._experiment, entry.run_id, **entry.arguments)

    def _register_model(self, client: Any, entry: Entry) -> None:
        mlflow_models.register_model(client, self._experiment, entry.run_id, **entry.arguments)

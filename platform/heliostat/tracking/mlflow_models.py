"""EDGE to MLflow, third of three files: logged models, model versions, datasets.

Weights stay in the artifact store: a logged model is a pointer with tags. Models are found by `heliostat.artifact` and
`heliostat.fingerprint`, so that the same call twice makes one model, and a student finds its teacher.
"""

import json
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_DIGEST_CHARACTERS = 36  # MLflow's limit
_MODEL_TYPE = "vision backbone"


def _experiment_id(client: Any, experiment: str) -> str:
    return str(client.get_experiment_by_name(experiment).experiment_id)


def _identity(link: Mapping[str, str]) -> dict[str, str]:
    return {"heliostat.artifact": link["ref"], "heliostat.fingerprint": link["fingerprint"], "heliostat.files": link["uri"]}


def _find(client: Any, experiment_id: str, link: Mapping[str, str]) -> Any:
    """The logged model of an artifact, or None."""
    tags = {key: value for key, value in _identity(link).items() if key != "heliostat.files"}
    condition = " AND ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    found = client.search_logged_models([experiment_id], filter_string=condition, max_results=1)
    return found[0] if found else None


def _create(client: Any, experiment_id: str, run_id: str | None, link: Mapping[str, str], tags: Mapping[str, str]) -> Any:
    from mlflow.models.model import MLMODEL_FILE_NAME
    from mlflow.models.utils import get_external_mlflow_model_spec

    name = re.sub(r"[/:.%\"'@]", "-", link["ref"].removeprefix("model/"))
    model = client.create_logged_model(
        experiment_id,
        name=name,
        source_run_id=run_id,
        tags={**tags, **_identity(link), "mlflow.model.isExternal": "true"},
        model_type=_MODEL_TYPE,
    )
    with tempfile.TemporaryDirectory(prefix="heliostat-model-") as folder:  # the registry takes no model without this file
        get_external_mlflow_model_spec(model).save(str(Path(folder) / MLMODEL_FILE_NAME))
        client.log_model_artifacts(model_id=model.model_id, local_dir=folder)
    return client.finalize_logged_model(model.model_id, "READY")


def log_model(
    client: Any,
    experiment: str,
    run_id: str,
    *,
    model: Mapping[str, str],
    step: int,
    tags: Mapping[str, str],
    metrics: Mapping[str, float],
) -> None:
    """A pointer to a model that the run made, as an output of the run, with its metrics."""
    from mlflow.entities import LoggedModelOutput, Metric

    experiment_id = _experiment_id(client, experiment)
    found = _find(client, experiment_id, model)
    if found is None:
        found = _create(client, experiment_id, run_id, model, tags)
    else:
        client.set_logged_model_tags(found.model_id, dict(tags))
    run = client.get_run(run_id)
    if found.model_id not in {output.model_id for output in run.outputs.model_outputs}:
        client.log_outputs(run_id, [LoggedModelOutput(found.model_id, step)])
    # A point of a model is a point of its run too. With the time and value that the run has for this step it is the same point;
    # else with the model's own time, so that sending it twice makes one.
    known = {metric.key: metric for metric in run.data._metric_objs if metric.step == step}
    points = [
        Metric(
            name,
            known[name].value if name in known else float(value),
            known[name].timestamp if name in known else found.creation_timestamp,
            step,
            model_id=found.model_id,
        )
        for name, value in metrics.items()
    ]
    if points:
        client.log_batch(run_id, metrics=points)


def log_inputs(client: Any, experiment: str, run_id: str, inputs: Mapping[str, Mapping[str, str]]) -> None:
    """Models and datasets that a run works from. A model that MLflow does not know gets a pointer without a run."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelInput

    experiment_id = _experiment_id(client, experiment)
    models, datasets = [], []
    for role, link in inputs.items():
        if link["ref"].startswith("model/"):
            known = _find(client, experiment_id, link) or _create(client, experiment_id, None, link, {})
            models.append(LoggedModelInput(known.model_id))
            continue
        source = json.dumps({"uri": link["uri"]})
        dataset = Dataset(link["ref"], link["fingerprint"][:_DIGEST_CHARACTERS], "heliostat", source)
        datasets.append(DatasetInput(dataset, [InputTag("mlflow.data.context", role)]))
    has = {model.model_id for model in client.get_run(run_id).inputs.model_inputs}
    models = [model for model in models if model.model_id not in has]
    if models or datasets:
        client.log_inputs(run_id, datasets=datasets or None, models=models or None)


@contextmanager
def _quiet_database() -> Iterator[None]:
    """MLflow 3.17's registry uses what SQLAlchemy 2.1 calls deprecated, and says so to the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


@_quiet_database()
def register_model(
    client: Any,
    experiment: str,
    run_id: str,
    *,
    model: Mapping[str, str],
    name: str,
    aliases: Sequence[str],
    tags: Mapping[str, str],
    description: str,
) -> None:
    """A version of a registered model that points at the logged model; aliases move to it."""
    from mlflow.exceptions import MlflowException

    experiment_id = _experiment_id(client, experiment)
    logged = _find(client, experiment_id, model) or _create(client, experiment_id, None, model, tags)
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    identity = {key: value for key, value in _identity(model).items() if key != "heliostat.files"}
    found = client.search_model_versions(f"name = '{name}'")  # a server does not tell their model_id, so tags do
    versions = [one for one in found if identity.items() <= one.tags.items()]
    if versions:
        version = versions[0]
    else:
        version = client.create_model_version(
            name,
            source=logged.artifact_location,  # `models:/<id>` is looked up by the process's global URI in MLflow 3.17
            run_id=logged.source_run_id or run_id,
            model_id=logged.model_id,
            tags={**tags, **_identity(model)},
            description=description,
            await_creation_for=0,  # there are no files to wait for
        )
    for alias in aliases:
        client.set_registered_model_alias(name, alias, version.version)

"""What a training stage leaves about itself: costs that survive restarts, in the record, the run and the card."""

import importlib.metadata
import io
import json
from pathlib import Path
from typing import Any

import pytest
import small_chain
import torch
from tiny_training import SETTINGS, Stop

from heliostat.artifacts import Artifact, ArtifactRef
from heliostat.costs import read_attempts
from heliostat.runtime.training_record import noted, recording
from heliostat.runtime.verbs import run_stage
from heliostat.storage import LocalStore, Store
from heliostat.tracking import NullRun, Run
from heliostat.training import loop
from heliostat.training.world import World

SECTION = SETTINGS | {"data": "raw/tiny@1"}


def pretrain(folder: Path, **sections: Any) -> Artifact:
    return run_stage(small_chain.context(folder, io.StringIO(), pretrain=SECTION, **sections), "pretrain")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small_chain.images(tmp_path)
    return tmp_path


def client_of(folder: Path) -> Any:
    import mlflow

    return mlflow.MlflowClient(tracking_uri=f"sqlite:///{folder}/store/mlflow.db")


def test_a_run_that_is_stopped_and_goes_on_adds_up_and_tells_what_it_did_twice(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loop._keep_teacher

    def stop_before_the_checkpoint(trainer: Any, step: int) -> None:
        if step == 6:
            raise Stop
        real(trainer, step)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_keep_teacher", stop_before_the_checkpoint)
        with pytest.raises(Stop):
            pretrain(folder)
    files = LocalStore(folder / "store" / "model" / "tiny@1")
    (first,) = read_attempts(files)
    assert (first.first_step, first.last_step, first.num_workers) == (2, 6, 1)
    record = pretrain(folder).record
    assert record.costs["cost/worker_hours"] * 3600 > first.seconds
    assert record.costs["cost/wasted_worker_hours"] * 3600 == pytest.approx(2 * first.seconds_per_step)
    assert record.costs["cost/gpu_hours"] == 0
    assert not list(files.list("_work/"))
    assert not [name for name in record.metrics if name.startswith("cost/")], "metrics are the same for the same settings"


def test_students_that_are_trained_together_share_what_it_costs(folder: Path) -> None:
    pretrain(folder)
    students = dict.fromkeys(("one", "two"), small_chain.STUDENT)
    plain = {key: value for key, value in SECTION.items() if key != "student"}
    context = small_chain.context(folder, io.StringIO(), distill=plain | {"students": students})
    run_stage(context, "distill")
    one, two = (context.artifacts.load(ArtifactRef("model", f"tiny-{name}", "1")).record.costs for name in students)
    assert one == two
    assert one["cost/worker_hours"] > 0


def test_costs_environment_and_inputs_are_in_the_run_and_no_machine_is_in_the_record(folder: Path) -> None:
    small = {"tracking": {"system_metrics_every_seconds": 0.2}, "costs": {"dollars_per_core_hour": 3600.0}}
    record = pretrain(folder, **small).record
    client = client_of(folder)
    (run,) = client.search_runs([client.get_experiment_by_name("heliostat").experiment_id])
    assert {name: value for name, value in run.data.metrics.items() if name.startswith("cost/")} == pytest.approx(record.costs)
    assert record.costs["cost/dollars"] == pytest.approx(record.costs["cost/worker_hours"] * 3600)
    assert "system/cpu_utilization_percentage" in run.data.metrics
    assert [one.dataset.name for one in run.inputs.dataset_inputs] == ["raw/tiny@1"]
    place = folder / "store" / "mlflow-files" / run.info.run_id / "artifacts"
    environment = json.loads((place / "environment.json").read_text())
    assert environment["packages"]["torch"] == importlib.metadata.version("torch")
    assert environment["packages"].keys() >= {"ray", "torch", "deepspeed", "mlflow", "numpy"}
    assert environment["python"].startswith("3.")
    assert environment["host"] not in record.model_dump_json()
    assert "model/tiny@1" in (place / "lineage.html").read_text()
    for step in (2, 4, 6, 8):
        assert len([one for one in client.get_metric_history(run.info.run_id, "train/loss") if one.step == step]) == 1


class Tags(NullRun):
    """Keeps its tags."""

    def __init__(self) -> None:
        self.tags: dict[str, str] = {}

    def set_tags(self, tags: Any) -> None:
        self.tags |= tags


def test_an_evaluation_point_is_noted_in_its_run_by_reference(tmp_path: Path) -> None:
    runs: dict[str, Run] = {"a": Tags(), "b": Tags()}
    seen: list[tuple[str, int, str]] = []

    def evaluate(model: str, step: int, files: Store) -> None:
        seen.append((model, step, files.uri))

    files = LocalStore(tmp_path / "teacher" / "step-00000010")
    noted(evaluate, runs)("b", 10, files)
    assert seen == [("b", 10, files.uri)]
    assert runs["a"].tags == {}
    assert runs["b"].tags == {"heliostat.teacher_step": "10", "heliostat.teacher_files": files.uri}


def test_an_evaluation_of_an_earlier_step_is_no_step_of_this_attempt(tmp_path: Path) -> None:
    from tiny_training import job, settings

    work = job(tmp_path, settings())
    with recording(work, World(), {"": NullRun()}, print) as report:
        report({"online/rankme": 3.0}, 50)  # left over from the attempt before
        report({"train/loss": 1.0, "train/step": 42.0}, 42)
    (attempt,) = read_attempts(work.files)
    assert (attempt.first_step, attempt.last_step) == (42, 42)


def test_other_ranks_count_nothing(tmp_path: Path) -> None:
    from tiny_training import job, settings

    work = job(tmp_path, settings())
    with recording(work, World(1, 2, torch.device("cpu")), {}, print) as report:
        report({"train/loss": 1.0}, 2)
    assert read_attempts(work.files) == []

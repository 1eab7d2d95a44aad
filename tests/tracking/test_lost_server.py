"""A real MLflow server that is killed and started again while runs go on: everything is there, in order, once."""

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow_server import MlflowServer

import heliostat
from heliostat.errors import TrackingError
from heliostat.storage import open_store
from heliostat.tracking import Link, Tracker, TrackingConfig, open_tracker

SOURCE_ROOT = str(Path(heliostat.__file__).parents[1])
SECRET = "s3cr3t-pass"
DATA = Link("curated/a@1", "d" * 64, "s3://bucket/curated/a@1")
TEACHER = Link("model/a@1", "a" * 64, f"s3://key:{SECRET}@bucket/model/a@1")
STUDENT = Link("model/a-student@1", "b" * 64, "s3://bucket/model/a-student@1")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """Started once; the test that kills it starts it again."""
    server = MlflowServer(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def tracker(server: MlflowServer, tmp_path: Path) -> Tracker:
    return open_tracker(tracking(server, tmp_path), open_store(str(tmp_path / "store")))


def tracking(server: MlflowServer, folder: Path) -> TrackingConfig:
    uri = server.uri.replace("//", f"//someone:{SECRET}@")
    return TrackingConfig(uri=uri, spool=str(folder / "spool"), retry_every_seconds=0.5)


def client(server: MlflowServer) -> Any:
    import mlflow

    return mlflow.MlflowClient(tracking_uri=server.uri)


def points(server: MlflowServer, run_id: str, name: str) -> list[tuple[int, float]]:
    """In the order in which the server has them by time."""
    found = sorted(client(server).get_metric_history(run_id, name), key=lambda point: (point.timestamp, point.step))
    return [(point.step, point.value) for point in found]


def test_a_run_goes_on_while_its_server_is_dead_and_everything_is_there_afterwards(
    server: MlflowServer, tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # a dead port is noticed at once, not after a second's pause
    said: list[str] = []
    run = tracker.start("model/a@1", config={"data": f"https://h/x?token={SECRET}"}, tags={}, notify=said.append)
    for step in range(20):
        run.log_metrics({"train/loss": 100.0 - step, "train/lr": 0.1}, step)
    server.kill()
    for step in range(20, 60):
        run.log_metrics({"train/loss": 100.0 - step, "train/lr": 0.1}, step)
    run.set_tags({"heliostat.note": f"s3://key:{SECRET}@bucket"})
    run.log_bytes("figures/pca.png", b"picture")
    run.log_inputs({"data": DATA})
    run.log_model(TEACHER, step=59, tags={}, metrics={"train/loss": 41.0})
    (file,) = (tmp_path / "spool").iterdir()
    assert SECRET not in file.read_text() + file.name
    assert len(said) == 1
    server.start()
    deadline = time.monotonic() + 120
    while (tmp_path / "spool").exists() and list((tmp_path / "spool").iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    for step in range(60, 70):
        run.log_metrics({"train/loss": 100.0 - step, "train/lr": 0.1}, step)
    run.finish("FINISHED")
    assert points(server, run.id, "train/loss") == [(step, 100.0 - step) for step in range(70)]
    assert len(points(server, run.id, "train/lr")) == 70
    found = client(server).get_run(run.id)
    assert (found.info.status, found.data.tags["heliostat.note"]) == ("FINISHED", "s3://***@bucket")
    assert [one.path for one in client(server).list_artifacts(run.id, "figures")] == ["figures/pca.png"]
    assert [one.dataset.name for one in found.inputs.dataset_inputs] == ["curated/a@1"]
    assert len(found.outputs.model_outputs) == 1
    assert len(said) == 2
    assert "is lost (" in said[0]
    assert "is back after " in said[1]
    assert SECRET not in "".join(said) + str(found.to_dictionary())


def test_a_killed_process_leaves_its_records_to_the_next_one(
    server: MlflowServer, tracker: Tracker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tracker.start("model/b@1", config={}, tags={})
    run.log_metrics({"train/loss": 5.0}, 0)
    program = (
        "import pickle, sys, time\ntracker = pickle.loads(bytes.fromhex(sys.argv[1]))\n"
        "run = tracker.attach(sys.argv[2])\n"
        "run.log_metrics({'train/loss': 4.0}, 10)\nprint('ready', flush=True)\nsys.stdin.readline()\n"
        "for step in (20, 30):\n    run.log_metrics({'train/loss': 4.0 - step / 10}, step)\n"
        "print('written', flush=True)\ntime.sleep(60)\n"
    )
    environment = os.environ | {"PYTHONPATH": SOURCE_ROOT, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    command = [sys.executable, "-W", "ignore", "-c", program, pickle.dumps(tracker).hex(), run.id]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
        server.kill()
        worker.stdin.write("go\n")
        worker.stdin.flush()
        lines = [worker.stdout.readline(), worker.stdout.readline()]
        assert "is lost (" in lines[0]
        assert lines[1] == "written\n"
        worker.send_signal(signal.SIGKILL)
        worker.wait()
    server.start()
    assert points(server, run.id, "train/loss") == [(0, 5.0), (10, 4.0)]
    again = open_tracker(tracking(server, tmp_path), open_store(str(tmp_path / "store")))
    assert "2 records that an earlier process could not send are there now" in capsys.readouterr().out
    resumed = again.start("model/b@1", config={}, tags={}, resume_id=run.id)
    for step in (20, 30, 40):  # what a run that goes on from the checkpoint of step 10 records once more
        resumed.log_metrics({"train/loss": 4.0 - step / 10}, step)
    assert points(server, run.id, "train/loss") == [(0, 5.0), (10, 4.0), (20, 2.0), (30, 1.0), (40, 0.0)]
    resumed.finish("FINISHED")


def test_links_between_teacher_student_data_and_registry_are_mlflows_own(server: MlflowServer, tracker: Tracker) -> None:
    first, second = (tracker.start(name, config={}, tags={}) for name in ("teacher", "student"))
    for _ in range(2):  # a stage that goes on says all of it again
        first.log_inputs({"data": DATA})
        first.log_metrics({"train/loss": 1.5}, 8)
        first.log_model(TEACHER, step=8, tags={"heliostat.stage": "pretrain"}, metrics={"train/loss": 1.5, "cost/dollars": 2.0})
        second.log_inputs({"teacher": TEACHER, "data": DATA})
        second.log_model(STUDENT, step=8, tags={"heliostat.input.teacher": TEACHER.ref}, metrics={})
        second.register_model(
            STUDENT, "a", aliases=["published", "best"], tags={"heliostat.input.teacher": TEACHER.ref}, description="# a card"
        )
    mlflow = client(server)
    experiment = mlflow.get_experiment_by_name("heliostat").experiment_id
    models = {model.tags["heliostat.artifact"]: model for model in mlflow.search_logged_models([experiment])}
    teacher, student = models[TEACHER.ref], models[STUDENT.ref]
    of_teacher, of_student = mlflow.get_run(first.id), mlflow.get_run(second.id)
    assert [one.model_id for one in of_student.inputs.model_inputs] == [teacher.model_id]
    assert [one.model_id for one in of_student.outputs.model_outputs] == [student.model_id]
    assert [one.dataset.digest for one in of_teacher.inputs.dataset_inputs] == [DATA.fingerprint[:36]]
    assert student.source_run_id == second.id
    assert student.tags["heliostat.files"] == STUDENT.uri
    assert points(server, first.id, "train/loss") == [(8, 1.5)]
    assert points(server, first.id, "cost/dollars") == [(8, 2.0)]
    assert {metric.key for metric in teacher.metrics or []} == {"train/loss", "cost/dollars"}
    (version,) = mlflow.search_model_versions("name = 'a'")
    assert version.run_id == second.id
    assert student.model_id in version.source
    for alias in ("best", "published"):
        assert mlflow.get_model_version_by_alias("a", alias).version == version.version
    assert mlflow.get_registered_model("a").latest_versions[0].version == version.version
    assert version.tags["heliostat.input.teacher"] == TEACHER.ref


def test_a_server_that_is_lost_between_two_stages_refuses_the_second_in_one_line(
    server: MlflowServer, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    server.kill()
    with pytest.raises(TrackingError, match=r"^MLflow at http://\*\*\*@127.0.0.1:\d+ failed: no answer \(.*; set tracking.uri"):
        tracker.start("late", config={}, tags={})

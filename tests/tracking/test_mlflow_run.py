"""What trackers record can be read back; what cannot be reached is one line."""

import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import heliostat
from heliostat.errors import TrackerLostError, TrackingError
from heliostat.storage import open_store
from heliostat.tracking import (
    MlflowTracker,
    NullRun,
    NullTracker,
    Tracker,
    TrackingConfig,
    open_tracker,
    ui_command,
)
from heliostat.tracking.mlflow_client import one_line

SOURCE_ROOT = str(Path(heliostat.__file__).parents[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tracking") / "store"


@pytest.fixture(scope="module")
def tracker(folder: Path) -> Tracker:
    """One database for the module: creating it takes seconds."""
    return open_tracker(TrackingConfig(), open_store(str(folder)))


def recorded(tracker: Tracker, run_id: str) -> Any:
    """The run as MLflow's own client sees it."""
    import mlflow

    return mlflow.MlflowClient(tracking_uri=tracker.uri).get_run(run_id)


def history(tracker: Tracker, run_id: str, name: str) -> list[tuple[int, float]]:
    """The (step, value) pairs of one metric."""
    import mlflow

    points = mlflow.MlflowClient(tracking_uri=tracker.uri).get_metric_history(run_id, name)
    return sorted((point.step, point.value) for point in points)


def test_auto_is_a_database_beside_the_artifacts_of_a_local_store(tracker: Tracker, folder: Path) -> None:
    assert tracker.uri == f"sqlite:///{folder}/mlflow.db"
    assert (folder / "mlflow.db").is_file()
    words = ui_command(tracker.uri).split()
    assert words[1:] == ["ui", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--port", "5000"]
    assert shutil.which(words[0])


def test_parameters_metrics_and_tags_read_back(tracker: Tracker) -> None:
    tags = {"heliostat.artifact": "model/a@1", "heliostat.input.teacher": "model/b@1"}
    run = tracker.start("model/a@1", config={"optim": {"lr": 0.5, "betas": [0.9, 0.99]}, "seed": 1}, tags=tags)
    run.log_metrics({"train/loss": 3.5, "train/lr": 0.25}, step=0)
    run.log_metrics({"train/loss": 2.5}, step=10)
    run.set_tags({"heliostat.stage": "pretrain"})
    run.finish("FINISHED")
    found = recorded(tracker, run.id)
    assert found.info.run_name == "model/a@1"
    assert found.info.status == "FINISHED"
    assert found.data.params == {"optim.lr": "0.5", "optim.betas": "[0.9, 0.99]", "seed": "1"}
    assert found.data.metrics == {"train/loss": 2.5, "train/lr": 0.25}
    assert found.data.tags.items() >= (tags | {"heliostat.stage": "pretrain"}).items()
    assert history(tracker, run.id, "train/loss") == [(0, 3.5), (10, 2.5)]


def test_a_file_is_kept_beside_the_store(tracker: Tracker, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "pca.png").write_bytes(b"picture")
    run = tracker.start("model/a@1", config={}, tags={})
    run.log_file(tmp_path / "pca.png", "figures")
    assert (folder / "mlflow-files" / run.id / "artifacts" / "figures" / "pca.png").read_bytes() == b"picture"


def test_a_run_is_resumed_by_its_id_with_what_it_had(tracker: Tracker) -> None:
    first = tracker.start("model/a@2", config={"seed": 1}, tags={"attempt": "1"})
    first.log_metrics({"train/loss": 3.0}, step=0)
    first.finish("FAILED")
    second = tracker.start("model/a@2", config={"seed": 1}, tags={"attempt": "2"}, resume_id=first.id)
    assert second.id == first.id
    assert recorded(tracker, first.id).info.status == "RUNNING"
    second.log_metrics({"train/loss": 2.0}, step=1)
    assert history(tracker, first.id, "train/loss") == [(0, 3.0), (1, 2.0)]


def test_a_run_that_is_gone_is_started_anew(tracker: Tracker) -> None:
    run = tracker.start("model/a@3", config={"seed": 1}, tags={}, resume_id="0" * 32)
    assert run.id != "0" * 32
    assert recorded(tracker, run.id).data.params == {"seed": "1"}


def test_a_run_that_was_deleted_is_started_anew_and_that_is_said(tracker: Tracker) -> None:
    import mlflow

    first, said = tracker.start("model/a@4", config={"seed": 1}, tags={}), []
    mlflow.MlflowClient(tracking_uri=tracker.uri).delete_run(first.id)
    second = tracker.start("model/a@4", config={"seed": 1}, tags={}, resume_id=first.id, notify=said.append)
    assert second.id != first.id
    assert said == [f"the run {first.id} is not in MLflow any more; its metrics go on in a new one"]


def test_a_server_that_fails_while_a_run_is_resumed_makes_no_second_run(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE

    first = tracker.start("model/a@5", config={"seed": 1}, tags={})

    def refuse(*arguments: object, **more: object) -> None:
        raise MlflowException("restarting", TEMPORARILY_UNAVAILABLE)

    monkeypatch.setattr(mlflow.MlflowClient, "update_run", refuse)
    with pytest.raises(TrackerLostError, match="restarting"):
        tracker.start("model/a@5", config={"seed": 1}, tags={}, resume_id=first.id)


def test_a_large_configuration_is_recorded_whole_and_a_long_value_is_cut(tracker: Tracker) -> None:
    config = {f"key{number:03d}": number for number in range(250)} | {"long": "x" * 20_000}
    params = recorded(tracker, tracker.start("big", config=config, tags={}).id).data.params
    assert len(params) == 251
    assert params["key249"] == "249"
    assert params["long"] == "x" * 6000


def test_opening_the_database_again_keeps_what_it_holds(tracker: Tracker, folder: Path) -> None:
    run = tracker.start("kept", config={}, tags={})
    again = open_tracker(TrackingConfig(), open_store(str(folder)))
    assert again == tracker
    assert recorded(again, run.id).info.run_name == "kept"


def test_three_processes_write_to_one_run_at_once_without_a_loss(tracker: Tracker) -> None:
    run = tracker.start("shared", config={}, tags={})
    program = (  # forks before it opens the database: importing MLflow three times would cost more than the test
        "import os, pickle, sys\n"
        "import mlflow.store.tracking.sqlalchemy_store\n"
        "tracker = pickle.loads(bytes.fromhex(sys.argv[1]))\n"
        "for worker in range(3):\n"
        "    if os.fork() == 0:\n"
        "        run = tracker.attach(sys.argv[2])\n"
        "        for step in range(10):\n"
        "            run.log_metrics({f'worker{worker}': step, 'all': worker}, worker * 100 + step)\n"
        "        os._exit(0)\n"
        "sys.exit(any(os.wait()[1] for _ in range(3)))\n"
    )
    environment = os.environ | {"PYTHONPATH": SOURCE_ROOT}
    command = [sys.executable, "-W", "ignore", "-c", program, pickle.dumps(tracker).hex(), run.id]
    subprocess.run(command, check=True, env=environment, timeout=120)
    for number in range(3):
        expected = [(number * 100 + step, float(step)) for step in range(10)]
        assert history(tracker, run.id, f"worker{number}") == expected
    assert len(history(tracker, run.id, "all")) == 30


def test_a_remote_store_needs_a_tracking_uri_of_its_own() -> None:
    with pytest.raises(TrackingError, match=r"the store is s3://bucket/lake; give the URI of an MLflow server"):
        open_tracker(TrackingConfig(), open_store("s3://bucket/lake"))


def test_none_keeps_nothing(tmp_path: Path) -> None:
    tracker = open_tracker(TrackingConfig(uri="none"), open_store(str(tmp_path)))
    assert isinstance(tracker, NullTracker)
    run = tracker.start("a", config={"x": 1}, tags={})
    run.log_metrics({"train/loss": 1.0}, 0)
    run.log_file(tmp_path / "missing")
    run.set_tags({"a": "b"})
    run.finish("FINISHED")
    assert (tracker.uri, run.id) == ("", "")
    assert list(tmp_path.iterdir()) == []
    assert ui_command(tracker.uri) == "(tracking is off)"


def test_attaching_to_no_run_keeps_nothing(tracker: Tracker) -> None:
    assert isinstance(tracker.attach(""), NullRun)


def test_a_tracker_can_be_pickled_for_a_worker(tracker: Tracker) -> None:
    assert pickle.loads(pickle.dumps(tracker)) == tracker


@contextmanager
def dead_port(*, listening: bool) -> Iterator[int]:
    """A port that takes connections and never answers, or one that refuses them."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if listening:
            listener.listen(16)
        yield listener.getsockname()[1]


@pytest.mark.parametrize(("listening", "reason"), [(False, "NewConnectionError"), (True, "ReadTimeoutError")])
def test_a_server_that_does_not_answer_is_one_line_within_fifteen_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listening: bool, reason: str
) -> None:
    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    with dead_port(listening=listening) as port:
        started = time.monotonic()
        with pytest.raises(TrackingError) as caught:
            open_tracker(TrackingConfig(uri=f"http://someone:password@127.0.0.1:{port}"), open_store(str(tmp_path)))
        assert time.monotonic() - started < 15
    assert str(caught.value) == (
        f"MLflow at http://***@127.0.0.1:{port} failed: no answer ({reason}); set tracking.uri to a working store, or to none"
    )


def test_a_uri_that_is_none_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        TrackingError, match=r"^MLflow at http://\[::1 failed: .*; set tracking\.uri to a working store"
    ) as caught:
        open_tracker(TrackingConfig(uri="http://[::1"), open_store(str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_a_database_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("a file where the folder should be")
    tracker = MlflowTracker(f"sqlite:///{tmp_path}/plain/mlflow.db", "heliostat", "", str(tmp_path / "spool"))
    with pytest.raises(
        TrackingError, match=rf"^MLflow at sqlite:///{re.escape(str(tmp_path))}/plain/mlflow.db failed: "
    ) as caught:
        tracker.prepare()
    assert "\n" not in str(caught.value)


def test_a_message_about_a_lost_database_holds_no_statement(tmp_path: Path) -> None:
    from sqlalchemy.exc import OperationalError

    lost = OperationalError("INSERT INTO metrics VALUES (?)", ("a value",), Exception("disk I/O error"))
    with pytest.raises(TrackingError, match="disk I/O error") as caught, one_line(f"sqlite:///{tmp_path}/mlflow.db"):
        raise lost
    assert "INSERT" not in str(caught.value)
    assert "a value" not in str(caught.value)

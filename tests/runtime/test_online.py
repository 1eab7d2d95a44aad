"""Evaluation beside a training: the training does not wait, no point is lost or judged twice, a failure is told and counted."""

import io
import json
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from online_draw import draw
from tars import Tars
from tiny_training import SHARD, Log, Stop, job, settings, shard

from heliostat.errors import DataError, TrackingError
from heliostat.metrics import METRICS as KNOWN
from heliostat.models.stored import read_backbone_files
from heliostat.runtime.online import COLORS, PICTURE, LocalEvaluator, OnlineEvaluation
from heliostat.runtime.panel import TrainingPanel
from heliostat.runtime.progress import Progress
from heliostat.runtime.trainer import TrainingRequest, train
from heliostat.storage import LocalStore, Store
from heliostat.tracking import NullRun, NullTracker
from heliostat.training.run import Watch, run_training
from heliostat.training.teacher_files import METRICS, folder_of, read_evaluations
from heliostat.training.world import World


@pytest.fixture(scope="module")
def tar() -> bytes:
    return shard()


@dataclass
class FileLog(NullRun):
    """A tracker's run that keeps the names and first bytes of its files."""

    files: dict[str, bytes] = field(default_factory=dict)

    def log_file(self, path: Path, folder: str = "") -> None:
        self.files[f"{folder}/{path.name}"] = path.read_bytes()


@dataclass
class Waiting:
    """An evaluator that holds every evaluation until it is let go, and keeps in which order it was asked."""

    go: threading.Event = field(default_factory=threading.Event)
    asked: list[int] = field(default_factory=list)
    closed: threading.Event = field(default_factory=threading.Event)

    def prepare(self) -> list[str]:
        return ["prepared"]

    def evaluate(self, step: int, files: Store, before: Store | None) -> dict[str, float]:
        self.asked.append(step)
        assert self.go.wait(60)
        return {"online/rankme": float(step), "online/feature_std": 0.5}

    def close(self) -> None:
        self.closed.set()


class Refusing(Waiting):
    """An evaluator that fails at one step."""

    def evaluate(self, step: int, files: Store, before: Store | None) -> dict[str, float]:
        if step == 4:
            raise DataError("the disk of\nthe evaluator is gone")
        return {"online/rankme": float(step), "online/feature_std": 0.5}


def evaluation(evaluator, folder: Path, log: Log, run: NullRun | None = None, report=None) -> OnlineEvaluation:
    outputs = {"": LocalStore(folder)}
    return OnlineEvaluation(
        evaluator, outputs, runs={"": run or NullRun()}, report=report or log.report, notify=log.said.append
    )


def online_records(log: Log) -> dict[int, dict[str, float]]:
    return {step: metrics for step, metrics in log.metrics if "online/rankme" in metrics}


def test_every_point_of_a_run_has_metrics_a_picture_and_a_record_of_its_own_step(tmp_path: Path, tar: bytes) -> None:
    work, log, run = job(tmp_path, settings("online.every_steps=3"), tar), Log(), FileLog()
    with evaluation(LocalEvaluator(draw(work)), tmp_path, log, run) as evaluate:
        run_training(work, World(), log.report, log.said.append, watch=Watch(evaluate))
    files = LocalStore(tmp_path)
    found = read_evaluations(files)
    assert list(found) == [3, 6, 8]
    assert {step: {**metrics, "online/failures": 0.0} for step, metrics in found.items()} == online_records(log)
    assert set(found[8]) == {"online/knn_accuracy", "online/linear_accuracy", "online/rankme", "online/feature_std"}
    assert set(found[8]) | {"online/failures"} <= set(KNOWN)
    assert all(0 <= found[8][name] <= 1 for name in found[8] if name.endswith("accuracy"))
    assert list(run.files) == [f"online/pca-step-{step:08d}.png" for step in (3, 6, 8)]
    for step in (3, 6, 8):
        picture = files.read(f"{folder_of(step)}/{PICTURE}")
        assert picture == run.files[f"online/pca-step-{step:08d}.png"]
        assert cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_COLOR).shape == (306, 306, 3)
        colors = np.load(io.BytesIO(files.read(f"{folder_of(step)}/{COLORS}")))
        assert colors.shape[1:] == (3,)


def test_it_judges_the_weights_of_the_point_and_not_later_ones(tmp_path: Path, tar: bytes) -> None:
    from heliostat.evaluation.online import evaluate_online
    from heliostat.runtime.online_images import decode_drawn

    work, log = job(tmp_path, settings("optim.lr=0.05", "online.every_steps=4"), tar), Log()
    with evaluation(LocalEvaluator(draw(work)), tmp_path, log) as evaluate:
        run_training(work, World(), log.report, log.said.append, watch=Watch(evaluate))
    found = read_evaluations(LocalStore(tmp_path))
    images = decode_drawn(draw(work), print)
    for step in (4, 8):
        backbone, info = read_backbone_files(LocalStore(tmp_path).child(folder_of(step)), "it")
        assert found[step] == pytest.approx(evaluate_online(backbone, info, images).metrics)
    assert found[4]["online/rankme"] != found[8]["online/rankme"]


def test_the_weights_of_a_run_do_not_depend_on_its_evaluations(tmp_path: Path, tar: bytes) -> None:
    work, log = job(tmp_path / "judged", settings(), tar), Log()
    with evaluation(LocalEvaluator(draw(work)), tmp_path / "judged", log) as evaluate:
        run_training(work, World(), log.report, log.said.append, watch=Watch(evaluate))
    plain = job(tmp_path / "plain", settings(), tar)
    run_training(plain, World(), log.report, log.said.append)
    for name in ("backbone.safetensors", "heads.safetensors", "history.jsonl"):
        assert LocalStore(tmp_path / "judged").read(name) == LocalStore(tmp_path / "plain").read(name), name


def test_the_training_does_not_wait_and_no_point_is_lost(tmp_path: Path) -> None:
    evaluator, log = Waiting(), Log()
    with evaluation(evaluator, tmp_path, log) as evaluate:
        started = time.perf_counter()
        for step in range(1, 8):
            evaluate("", step, LocalStore(tmp_path).child(folder_of(step)))
        assert time.perf_counter() - started < 0.5
        assert not online_records(log)
        evaluator.go.set()
    assert evaluator.asked == list(range(1, 8))
    assert list(online_records(log)) == list(range(1, 8))
    assert evaluator.closed.is_set()
    slow = [line for line in log.said if "they are slower than the training; none is lost" in line]
    assert len(slow) == 1
    assert "\n" not in slow[0]
    assert "prepared" in log.said


def test_a_failure_is_one_line_and_a_count_and_the_others_go_on(tmp_path: Path) -> None:
    log = Log()
    with evaluation(Refusing(), tmp_path, log) as evaluate:
        for step in (2, 4, 6):
            evaluate("", step, LocalStore(tmp_path).child(folder_of(step)))
    assert list(read_evaluations(LocalStore(tmp_path))) == [2, 6]
    told = "evaluation of step 4 failed, the training goes on: the disk of the evaluator is gone"
    assert [line for line in log.said if "failed" in line] == [told]
    failures = [(step, metrics["online/failures"]) for step, metrics in log.metrics]
    assert failures == [(2, 0.0), (4, 1.0), (6, 1.0)]


def test_a_tracker_that_fails_is_told_and_its_point_is_taken_up_again(tmp_path: Path) -> None:
    log, files = Log(), LocalStore(tmp_path)

    def unreachable(metrics: Mapping[str, float], step: int, model: str = "") -> None:
        raise TrackingError("MLflow does not answer")

    files.put(f"{folder_of(2)}/model.json", b"{}")
    evaluator = Waiting()
    evaluator.go.set()
    with evaluation(evaluator, tmp_path, log, report=unreachable):
        pass
    assert sum("MLflow does not answer" in line for line in log.said) == 2  # the point, and the count of failures
    assert read_evaluations(files) == {}
    with evaluation(evaluator, tmp_path, log):
        pass
    assert evaluator.asked == [2, 2]
    assert list(read_evaluations(files)) == [2]


def test_a_run_that_ends_with_an_error_does_not_wait(tmp_path: Path) -> None:
    evaluator, log = Waiting(), Log()

    def ended() -> None:
        with evaluation(evaluator, tmp_path, log) as evaluate:
            for step in (2, 4):
                evaluate("", step, LocalStore(tmp_path).child(folder_of(step)))
            raise Stop

    with pytest.raises(Stop):
        ended()
    evaluator.go.set()
    assert evaluator.closed.wait(10)
    time.sleep(0.1)
    assert read_evaluations(LocalStore(tmp_path)) == {}
    assert not online_records(log)
    assert not [line for line in log.said if "failed" in line]


def test_a_resumed_run_evaluates_what_was_left_and_nothing_twice(tmp_path: Path, tar: bytes) -> None:
    whole, log = job(tmp_path / "whole", settings(), tar), Log()
    with evaluation(LocalEvaluator(draw(whole)), tmp_path / "whole", log) as evaluate:
        run_training(whole, World(), log.report, log.said.append, watch=Watch(evaluate))

    work = job(tmp_path / "cut", settings(), tar)

    def stop(metrics: Mapping[str, float], step: int, model: str = "") -> None:
        if step >= 6:
            raise Stop

    held = Waiting()
    with pytest.raises(Stop), evaluation(held, tmp_path / "cut", log) as evaluate:
        run_training(work, World(), stop, log.said.append, watch=Watch(evaluate))
    held.go.set()
    judged = LocalStore(tmp_path / "cut").child(folder_of(2))
    judged.put(METRICS, LocalStore(tmp_path / "whole").read(f"{folder_of(2)}/{METRICS}"))
    for name in (PICTURE, COLORS):
        judged.put(name, LocalStore(tmp_path / "whole").read(f"{folder_of(2)}/{name}"))
    again = Log()
    with evaluation(LocalEvaluator(draw(work)), tmp_path / "cut", again) as evaluate:
        run_training(work, World(), again.report, again.said.append, watch=Watch(evaluate))
    assert list(online_records(again)) == [4, 6, 8]
    left, right = (LocalStore(tmp_path / name) for name in ("cut", "whole"))
    for entry in right.list("teacher/"):
        assert left.read(entry.key) == right.read(entry.key), entry.key


def test_both_students_of_a_run_are_judged_under_their_names(tmp_path: Path) -> None:
    outputs, log = {name: LocalStore(tmp_path / name) for name in ("small", "other")}, Log()
    runs = dict.fromkeys(outputs, NullRun())
    evaluator = Waiting()
    evaluator.go.set()
    with OnlineEvaluation(evaluator, outputs, runs=runs, report=log.report, notify=log.said.append) as evaluate:
        for name, store in outputs.items():
            evaluate(name, 5, store.child(folder_of(5)))
    assert {name for _, metrics in log.metrics for name in metrics} >= {"small:online/rankme", "other:online/rankme"}
    assert all(list(read_evaluations(store)) == [5] for store in outputs.values())


def test_a_whole_run_in_this_process_shows_what_was_found(tmp_path: Path, tar: bytes) -> None:
    stream = io.StringIO()
    work = job(tmp_path, settings("online.every_steps=4"), tar)
    request = TrainingRequest({"": "model/tiny@1"}, work, NullTracker(), {"": ""}, draw(work))
    train(request, {"": NullRun()}, Progress(stream))
    found = read_evaluations(LocalStore(tmp_path))
    assert list(found) == [4, 8]
    accuracy = 100 * found[8]["online/knn_accuracy"]
    assert f"  step 8: teacher k-NN {accuracy:.1f} %  linear " in stream.getvalue()
    assert stream.getvalue().splitlines()[-1].endswith(f"k-NN {accuracy:.1f} %")


def test_without_images_nothing_is_evaluated(tmp_path: Path, tar: bytes) -> None:
    work = job(tmp_path, settings(), tar)
    train(TrainingRequest({"": "model/tiny@1"}, work, NullTracker(), {"": ""}), {"": NullRun()}, Progress(io.StringIO()))
    assert read_evaluations(LocalStore(tmp_path)) == {}


def test_images_that_cannot_be_read_fail_every_evaluation_and_not_the_run(tmp_path: Path, tar: bytes) -> None:
    work = job(tmp_path, settings(), tar)
    lost = replace(draw(work), readers=(Tars({SHARD: b""}),))
    log = Log()
    with evaluation(LocalEvaluator(lost), tmp_path, log) as evaluate:
        summary = run_training(work, World(), log.report, log.said.append, watch=Watch(evaluate))
    assert summary["steps"] == 8
    assert sum("failed, the training goes on" in line for line in log.said) == 4
    assert json.loads(LocalStore(tmp_path).read("model.json"))["steps"] == 8


def test_a_panel_without_any_record_says_nothing() -> None:
    stream = io.StringIO()
    with TrainingPanel(Progress(stream), 8, {"": "model/tiny@1"}):
        pass
    assert stream.getvalue() == ""

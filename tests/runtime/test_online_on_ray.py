"""The evaluator as an actor: the same numbers as in a thread, a lost actor comes back, one without room is told about."""

import io
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from local_ray import started_ray
from online_draw import draw
from tiny_training import SETTINGS, Log, job, settings, shard

from heliostat.errors import ClusterError
from heliostat.runtime.online import PICTURE, LocalEvaluator, OnlineEvaluation
from heliostat.storage import LocalStore
from heliostat.tracking import NullRun, NullTracker
from heliostat.training.run import Watch, run_training
from heliostat.training.run_config import OnlineConfig
from heliostat.training.teacher_files import folder_of, read_evaluations
from heliostat.training.world import World

pytestmark = [
    pytest.mark.ray,
    pytest.mark.usefixtures("local_ray"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Ray 2.60's, about its own settings
]


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """One logical CPU: the evaluator shares that of the worker."""
    with started_ray(num_cpus=1):
        yield


@pytest.fixture(scope="module")
def tar() -> bytes:
    return shard()


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory, tar: bytes) -> LocalStore:
    """The files of a run whose evaluations were done in a thread."""
    folder, log = tmp_path_factory.mktemp("thread"), Log()
    work = job(folder, settings("online.every_steps=4"), tar)
    outputs, runs = {"": LocalStore(folder)}, {"": NullRun()}
    evaluator = LocalEvaluator(draw(work))
    with OnlineEvaluation(evaluator, outputs, runs=runs, report=log.report, notify=log.said.append) as evaluate:
        run_training(work, World(), log.report, log.said.append, watch=Watch(evaluate))
    return LocalStore(folder)


def evaluator_processes() -> list[psutil.Process]:
    """The evaluators below this process."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "_Actor" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_an_actor_whose_process_is_killed_comes_back_and_finds_the_same(judged: LocalStore, tar: bytes, tmp_path: Path) -> None:
    from heliostat.runtime.online_actor import RayEvaluator

    work = job(tmp_path, settings(), tar)
    evaluator = RayEvaluator(draw(work), OnlineConfig(), start_timeout_seconds=200)
    try:
        assert evaluator.prepare() == []
        (process,) = evaluator_processes()
        assert process.nice() > psutil.Process().nice()  # it yields to everything else
        process.send_signal(signal.SIGKILL)
        files = LocalStore(tmp_path)
        for name in ("model.json", "backbone.safetensors"):
            files.put(name, judged.read(f"{folder_of(4)}/{name}"))
        assert evaluator.evaluate(4, files, None) == pytest.approx(read_evaluations(judged)[4])
        assert files.read(PICTURE) == judged.read(f"{folder_of(4)}/{PICTURE}")
    finally:
        evaluator.close()


def test_an_evaluator_without_room_is_told_about_with_what_it_needs(tar: bytes, tmp_path: Path) -> None:
    from heliostat.runtime.online_actor import RayEvaluator

    work = job(tmp_path, settings(), tar)
    evaluator = RayEvaluator(draw(work), OnlineConfig(num_gpus=1), start_timeout_seconds=2)
    message = r"did not start within 2 s: it needs 0 CPU and 1 GPU besides the workers; lower"
    try:
        with pytest.raises(ClusterError, match=message):
            evaluator.prepare()
        with pytest.raises(ClusterError, match=message):  # as after the loss of the node that it was on
            evaluator.evaluate(4, LocalStore(tmp_path), None)
    finally:
        evaluator.close()


def test_a_run_whose_worker_has_every_cpu_is_evaluated_all_the_same(judged: LocalStore, tar: bytes, tmp_path: Path) -> None:
    from heliostat.runtime.progress import Progress
    from heliostat.runtime.trainer import TrainingRequest, train

    assert SETTINGS["train"]["steps"] == 8
    work = job(tmp_path, settings("online.every_steps=4", "scaling.num_workers=1", "scaling.cpus_per_worker=1"), tar)
    stream = io.StringIO()
    request = TrainingRequest({"": "model/tiny@1"}, work, NullTracker(), {"": ""}, draw(work))
    train(request, {"": NullRun()}, Progress(stream))
    ours, theirs = read_evaluations(LocalStore(tmp_path)), read_evaluations(judged)
    assert list(ours) == [4, 8]
    for step, metrics in theirs.items():
        assert ours[step] == pytest.approx(metrics, rel=1e-3)
    assert f"step 8: teacher k-NN {100 * ours[8]['online/knn_accuracy']:.1f} %" in stream.getvalue()
    assert not evaluator_processes()

"""What only a running Ray shows: shard functions that fail, workers that die, trials. One local cluster for all of it."""

import io
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from tars import Tars
from tiny_training import SETTINGS, SHARD, final_files, job, settings, shard
from tiny_training import train as train_here

from heliostat.artifacts import ArtifactRef
from heliostat.data.shards import manifest_rows, manifest_to_bytes
from heliostat.errors import DataError, StorageError, TrainingError
from heliostat.runtime import shards
from heliostat.runtime.pipelines import Context
from heliostat.runtime.progress import Progress
from heliostat.runtime.recipe import Recipe
from heliostat.runtime.shards import map_shards
from heliostat.storage import LocalStore
from heliostat.tracking import NullRun, NullTracker
from heliostat.training.run import TrainingJob

pytestmark = [
    pytest.mark.ray,
    pytest.mark.usefixtures("local_ray"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Ray 2.60's, about its own settings
]


@dataclass(frozen=True)
class Square:
    """A shard function: squares a number, and refuses one of them."""

    refused: int = -1

    def __call__(self, task: Mapping[str, Any]) -> Mapping[str, Any]:
        if task["number"] == self.refused:
            raise DataError(f"shard {task['number']} is damaged")
        return {"number": task["number"], "square": task["number"] ** 2}


@pytest.mark.parametrize("has_state", [False, True])
def test_a_shard_function_runs_once_on_every_task(has_state: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_LINE_SECONDS", 0.0)
    stream = io.StringIO()
    tasks = [{"number": number} for number in range(7)]
    found = list(map_shards(Square(), tasks, label="squaring", progress=Progress(stream), has_state=has_state))
    assert sorted((row["number"], row["square"]) for row in found) == [(number, number**2) for number in range(7)]
    assert re.fullmatch(r"  squaring \[#{20}\] 100 % 7/7 in \d+ s", stream.getvalue().splitlines()[-1])


def test_no_tasks_give_no_results() -> None:
    assert list(map_shards(Square(), [], label="none", progress=Progress(io.StringIO()))) == []


@pytest.mark.parametrize("has_state", [False, True])
def test_the_first_error_of_a_shard_function_arrives_as_its_own_line(has_state: bool) -> None:
    tasks = [{"number": number} for number in range(4)]
    with pytest.raises(DataError) as failed:
        list(map_shards(Square(refused=2), tasks, label="x", progress=Progress(io.StringIO()), has_state=has_state))
    assert str(failed.value) == "shard 2 is damaged"


LONG = (
    "train.steps=60",
    "train.log_every_steps=10",
    "train.checkpoint_every_steps=10",
    "scaling.num_workers=2",
    "scaling.cpus_per_worker=0.5",
)


def fit(work: TrainingJob) -> None:
    """Train on Ray."""
    from heliostat.runtime.trainer import TrainingRequest, train

    train(TrainingRequest({"": "model/tiny@1"}, work, NullTracker(), {"": ""}), {"": NullRun()}, Progress(io.StringIO()))


class BrokenForOneRank(Tars):
    """Reads a shard, except on the second rank, whose disk is gone."""

    def __call__(self, shard: str, offset: int, length: int) -> bytes:
        import ray.train

        if ray.train.get_context().get_world_rank() == 1:
            raise StorageError("the disk of the second rank is gone")
        return super().__call__(shard, offset, length)


def test_an_error_of_one_rank_ends_the_run_although_the_others_wait_for_it(tmp_path: Path) -> None:
    tar = shard()
    work = job(tmp_path, settings(*LONG, "scaling.max_failures=0"), tar)
    started = time.monotonic()
    with pytest.raises(TrainingError, match=r"worker 1 failed: .*the disk of the second rank is gone; see --debug"):
        fit(replace(work, sources=(replace(work.sources[0], reader=BrokenForOneRank({SHARD: tar})),)))
    assert time.monotonic() - started < 400  # collective_timeout_seconds is 600


def test_more_workers_than_the_cluster_has_room_for_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"4 workers need 4 CPU, Ray has 2; lower scaling\.num_workers"):
        fit(job(tmp_path, settings("scaling.num_workers=4"), shard()))


def test_a_trial_of_a_sweep_is_the_run_that_its_settings_describe(tmp_path: Path) -> None:
    from heliostat.runtime.stage_sweep import sweep
    from heliostat.runtime.sweep_trials import read_trials

    sections = {
        "name": "tiny",
        "store": str(tmp_path / "store"),
        "tracking": {"uri": "none"},
        "pretrain": {**SETTINGS, "data": "raw/tiny@1", "scaling": {"num_workers": 0, "cpus_per_worker": 0.5}},
        "sweep": {"grid": {"train.seed": [0, 3]}, "overrides": {"train.steps": 6}, "metric": "train/rankme"},
    }
    recipe = Recipe.model_validate_json(json.dumps(sections))
    context, tar = Context(recipe, Progress(io.StringIO())), shard()
    draft = context.artifacts.begin(ArtifactRef("raw", "tiny", "1"), config={}, inputs={}, notify=print)
    draft.put(SHARD, tar)
    draft.put("manifest.parquet", manifest_to_bytes(manifest_rows(SHARD, tar)))
    draft.commit(counts={})
    made = sweep(context, recipe.sweep)
    assert [trial.overrides for trial in read_trials(made)] == [{"train.seed": 0}, {"train.seed": 3}]
    for trial, seed in (("000", 0), ("001", 3)):
        train_here(job(tmp_path / trial, settings("train.steps=6", f"train.seed={seed}"), tar))
        files = LocalStore(Path(made.files.uri) / "trials" / trial)
        for name, data in final_files(tmp_path / trial).items():
            if not name.startswith("teacher/"):  # weights of evaluation points go with the trial's checkpoints
                assert files.read(name) == data, (trial, name)

"""Sweeps on Ray: a driver that is killed, trials that are stopped early, and what the tracker holds at the end."""

import io
import json
import os
import re
import signal
from pathlib import Path

import mlflow
import pytest
import ray
from demo_run import run, run_until
from tiny_training import SETTINGS, SHARD, final_files, job, settings, shard
from tiny_training import train as train_here

from heliostat.artifacts import Artifact, ArtifactRef, ArtifactStore, verify
from heliostat.config import validate
from heliostat.data.shards import manifest_rows, manifest_to_bytes
from heliostat.errors import TrainingError
from heliostat.runtime.pipelines import Context
from heliostat.runtime.progress import Progress
from heliostat.runtime.recipe import read_recipe
from heliostat.runtime.stage_sweep import sweep
from heliostat.runtime.sweep_config import SweepConfig
from heliostat.runtime.sweep_points import Point
from heliostat.runtime.sweep_state import SweepState
from heliostat.runtime.sweep_trials import Trial, read_trials, trial_candidates, trial_files, write_point, write_trial
from heliostat.storage import LocalStore
from heliostat.tracking import NullTracker

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Ray 2.60's, about its own settings
]

KOLEO = "method.dino.koleo_loss_weight"


def put_images(store: Path) -> bytes:
    """raw/tiny@1 in a store; returns its shard."""
    tar = shard()
    draft = ArtifactStore(LocalStore(store)).begin(ArtifactRef("raw", "tiny", "1"), config={}, inputs={}, notify=print)
    draft.put(SHARD, tar)
    draft.put("manifest.parquet", manifest_to_bytes(manifest_rows(SHARD, tar)))
    draft.commit(counts={})
    return tar


def recipe_file(folder: Path, section: dict) -> Path:
    """A recipe of the tiny training with this sweep."""
    plain = {
        "name": "tiny",
        "cluster": {"address": "local", "num_cpus": 2, "object_store_memory": 100_000_000},
        "pretrain": {**SETTINGS, "data": "raw/tiny@1"},
        "sweep": {"metric": "train/rankme", **section},
    }
    path = folder / "tiny.yaml"
    path.write_text(json.dumps(plain))
    return path


def load(store: Path) -> Artifact:
    made = ArtifactStore(LocalStore(store)).load(ArtifactRef("sweep", "tiny", "1"))
    verify(made)
    return made


def test_a_sweep_whose_driver_is_killed_goes_on_and_its_table_and_plot_are_in_the_tracker_s_run(tmp_path: Path) -> None:
    """Each trial is a Ray Train run of one worker; on two CPUs there is room for two of them."""
    store, shared = tmp_path / "store", ["train.steps=20", "train.checkpoint_every_steps=5"]
    tar = put_images(store)
    overrides = {"scaling.num_workers": 1, "train.steps": 20, "train.checkpoint_every_steps": 5}
    grid = {KOLEO: [0.0, 0.1], "method.drop_path_rate": [0.0, 0.3]}
    path = recipe_file(tmp_path, {"grid": grid, "overrides": overrides, "max_concurrent_trials": 2})
    marker = store / "sweep/tiny@1/trials/000/trial.json"
    first = run_until(["sweep", str(path)], str(store), tmp_path, marker=marker, kill=signal.SIGKILL)
    assert "sweep     sweep/tiny@1" in first
    ended = {file.parent.name: file.stat().st_mtime_ns for file in (store / "sweep/tiny@1/trials").glob("*/trial.json")}
    assert 1 <= len(ended) < 4
    done = run(["sweep", str(path)], str(store), tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(rf"[{len(ended)}-3] of 4 trials ended before", done.stdout)
    made = load(store)
    for name, written in ended.items():
        assert (store / f"sweep/tiny@1/trials/{name}/trial.json").stat().st_mtime_ns == written
    table = read_trials(made)
    assert [(trial.status, trial.step) for trial in table] == [("finished", 20)] * 4
    assert not [key for key in made.record.files if "_work" in key or "checkpoint" in key]
    for trial in table:
        words = [f"{key}={value}" for key, value in trial.overrides.items()]
        train_here(job(tmp_path / trial.name, settings(*shared, *words), tar))
        for key in ("backbone.safetensors", "heads.safetensors", "history.jsonl"):
            assert made.files.read(f"trials/{trial.name}/{key}") == final_files(tmp_path / trial.name)[key], trial.name
    assert made.record.costs["cost/worker_hours"] > 0  # of all trials and attempts: their scratch tells it
    best = max(table, key=lambda trial: trial.value)
    check_tracker(store, table, best)
    check_best(made, best, store)


def check_tracker(store: Path, table: list[Trial], best: Trial) -> None:
    """One run of the sweep with table and plot, and one finished run below it for each trial."""
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{store}/mlflow.db")
    experiment = client.get_experiment_by_name("heliostat").experiment_id
    runs = client.search_runs([experiment])
    (parent,) = [one for one in runs if one.data.tags.get("heliostat.stage") == "sweep"]
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} >= {
        "table.md",
        "table.csv",
        "plot.png",
        "best.yaml",
        "trials.json",
    }
    assert parent.data.metrics["train/rankme"] == best.value
    children = {one.data.tags["heliostat.trial"]: one for one in runs if "mlflow.parentRunId" in one.data.tags}
    assert sorted(children) == [trial.name for trial in table]
    for trial in table:
        child = children[trial.name]
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert (child.info.status, child.data.tags["heliostat.status"]) == ("FINISHED", "finished")
        assert float(child.data.params[KOLEO]) == trial.overrides[KOLEO]
        assert child.data.metrics["train/rankme"] == pytest.approx(trial.value)


def check_best(made: Artifact, best: Trial, store: Path) -> None:
    """The best settings are a recipe on the same images, at the section's own length."""
    path = store.parent / "best.yaml"
    path.write_bytes(made.files.read("best.yaml"))
    recipe = read_recipe(str(path), (), "pretrain")
    assert (recipe.name, recipe.sweep, recipe.pretrain.data) == ("tiny-best", None, "raw/tiny@1")
    assert recipe.pretrain == settings(*(f"{key}={value}" for key, value in best.overrides.items()), "data=raw/tiny@1")
    assert made.files.read("plot.png").startswith(b"\x89PNG")
    assert (
        f"| {best.overrides[KOLEO]:g} | {best.overrides['method.drop_path_rate']:g} |"
        in made.files.read("table.md").decode().splitlines()[4]
    )
    done = run(["pretrain", str(path), "--dry-run"], str(store), store.parent)
    assert done.returncode == 0, done.stderr
    assert "name: tiny-best" in done.stdout


@pytest.mark.usefixtures("local_ray")
def test_bad_trials_are_stopped_by_what_an_earlier_driver_saw_and_each_frees_all_cpus_for_the_next(tmp_path: Path) -> None:
    """Two workers take both CPUs, so the third trial starts only when those of the second are gone."""
    from heliostat.runtime.sweep_board import Board
    from heliostat.runtime.sweep_trial import SweepJob
    from heliostat.runtime.sweep_tune import run_trials

    work = job(tmp_path / "unused", settings("train.steps=30000", "train.log_every_steps=5", "train.checkpoint_every_steps=50"))
    section = {
        "grid": {"train.seed": [0, 1, 2]},
        "overrides": {"scaling.num_workers": 2},
        "metric": "train/rankme",
        "asha": {"grace_steps": 10, "reduction_factor": 2},
    }
    config, files = validate(SweepConfig, section, "sweep"), LocalStore(tmp_path / "sweep")
    said: list[str] = []
    state = SweepState(work.config, config, files, tracker=NullTracker(), parent_run="", notify=said.append)
    curve = [(step, 30.0) for step in (10, 20, 40, 80)]  # far better than any of these runs
    write_point(files, Point(0, {"train.seed": 0}), "")
    write_trial(files, Trial("000", {"train.seed": 0}, "finished", 30000, 30.0, curve=curve))
    state.take_up()
    stream = io.StringIO()
    run_trials(
        state, SweepJob("sweep/tiny@1", work.config, config, work.sources, files, NullTracker(), Board()), Progress(stream)
    )
    assert "room for 1 trial at a time; sweep.max_concurrent_trials is 2" in stream.getvalue()
    assert [trial.status for trial in state.table()] == ["finished", "stopped", "stopped"]
    for trial in state.table()[1:]:
        assert 10 <= trial.step < 30000
        assert trial.curve[-1] == (trial.step, trial.value)
        assert trial_files(files, int(trial.name)).size("trial.json") is not None
    assert [line.partition(":")[0] for line in said] == [f"trial 00{n} stopped at step {state.ends[n].step}" for n in (1, 2)]


def own_nodes() -> list[str]:
    """Runs in a process of Ray: the nodes that its dashboard knows."""
    from ray.util.state import list_nodes

    return [node.node_id for node in list_nodes()]


@pytest.mark.usefixtures("local_ray")
def test_processes_of_a_local_ray_ask_its_own_dashboard_whatever_else_runs_on_the_machine() -> None:
    """What frees the workers of a stopped trial asks it; with two Rays on a machine it used to find neither."""
    (node,) = ray.nodes()
    assert ray.get(ray.remote(own_nodes).remote()) == [node["NodeID"]]
    assert os.environ["RAY_API_SERVER_ADDRESS"].startswith("http://127.0.0.1:")


def tiny(folder: Path, section: dict, *overrides: str) -> Context:
    """A context over a store with images, which tracks nothing."""
    path = recipe_file(folder, section)
    recipe = read_recipe(str(path), (f"store={folder / 'store'}", "tracking.uri=none", *overrides), "")
    put_images(folder / "store")
    return Context(recipe, Progress(io.StringIO()))


@pytest.mark.usefixtures("local_ray")
def test_trials_are_compared_by_what_their_last_evaluation_found(tmp_path: Path) -> None:
    section = {"grid": {KOLEO: [0.0, 0.1]}, "metric": "online/knn_accuracy", "max_concurrent_trials": 1}
    context = tiny(tmp_path, section, "pretrain.online.labelled=raw/tiny@1")
    made = sweep(context, context.recipe.sweep)
    trials = read_trials(made)
    assert [trial.status for trial in trials] == ["finished", "finished"]
    for trial in trials:
        found = json.loads(made.files.read(f"trials/{trial.name}/teacher/step-00000008/metrics.json"))
        assert trial.value == found["online/knn_accuracy"]
        assert 0 <= trial.value <= 1
    best = max(trials, key=lambda trial: trial.value)
    assert made.record.metrics == {"online/knn_accuracy": best.value}
    assert made.record.inputs == {"data": "raw/tiny@1", "labelled": "raw/tiny@1"}
    groups = trial_candidates(made)
    assert [[one.name for one in group] for group in groups] == [[f"sweep, {KOLEO}=0"], [f"sweep, {KOLEO}=0.1"]]


@pytest.mark.usefixtures("local_ray")
def test_a_trial_that_no_cluster_of_this_size_can_run_is_refused_before_any_starts(tmp_path: Path) -> None:
    context = tiny(tmp_path, {"grid": {KOLEO: [0.0, 0.1]}, "overrides": {"scaling.num_workers": 4}})
    with pytest.raises(TrainingError, match=r"no trial can start: it takes 4 workers of 1 CPU, Ray has 2 CPU"):
        sweep(context, context.recipe.sweep)
    assert not list(LocalStore(tmp_path / "store/sweep/tiny@1").list("_work/points/"))

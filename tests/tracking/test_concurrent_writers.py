"""Several processes at one database: one that is new, and one that they all write to."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import heliostat

SOURCE_ROOT = str(Path(heliostat.__file__).parents[1])
PROCESSES = 4
STEPS = 25

PROGRAM = """
import json, os, sys
import mlflow.store.tracking.sqlalchemy_store, mlflow.store.model_registry.sqlalchemy_store
import heliostat.tracking.mlflow_models
from heliostat.storage import open_store
from heliostat.tracking import Link, TrackingConfig, open_tracker

folder, processes, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
for worker in range(processes):  # forked after the imports, so that all of them open the new database at the same moment
    if os.fork() == 0:
        try:
            tracker = open_tracker(TrackingConfig(retry_every_seconds=0.2), open_store(folder))
            run = tracker.start(f"writer {worker}", config={"worker": worker}, tags={})
            for step in range(steps):
                run.log_metrics({"train/loss": worker + step, "train/lr": 0.5}, step)
            model = Link(f"model/a{worker}@1", str(worker) * 64, f"{folder}/model/a{worker}@1")
            run.log_model(model, step=steps, tags={}, metrics={})
            run.register_model(model, "shared", aliases=[f"writer-{worker}"], tags={}, description="")
            run.finish("FINISHED")
            print(json.dumps({"worker": worker, "run": run.id}), flush=True)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
sys.exit(any(os.wait()[1] for _ in range(processes)))
"""


@pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning")  # MLflow 3.17's registry with SQLAlchemy 2.1
def test_four_processes_open_a_new_database_at_once_and_lose_no_metric_and_no_version(tmp_path: Path) -> None:
    import mlflow

    store = tmp_path / "store"
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(store), str(PROCESSES), str(STEPS)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=os.environ | {"PYTHONPATH": SOURCE_ROOT}
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-2000:]
    runs = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert sorted(run["worker"] for run in runs) == list(range(PROCESSES))
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{store}/mlflow.db")
    for run in runs:
        history = client.get_metric_history(run["run"], "train/loss")
        assert sorted((point.step, point.value) for point in history) == [(step, run["worker"] + step) for step in range(STEPS)]
        assert client.get_run(run["run"]).info.status == "FINISHED"
    versions = client.search_model_versions("name = 'shared'")
    assert sorted(int(version.version) for version in versions) == list(range(1, PROCESSES + 1))
    assert len({version.source for version in versions}) == PROCESSES
    aliases = client.get_registered_model("shared").aliases
    assert sorted(aliases) == [f"writer-{worker}" for worker in range(PROCESSES)]
    assert len(set(aliases.values())) == PROCESSES
    spool = store / "mlflow-spool"
    assert not spool.exists() or list(spool.iterdir()) == []

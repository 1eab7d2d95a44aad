"""The whole chain at a small size, through the command line: complete, reused, and finished after any interruption."""

import io
import itertools
import json
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from demo_run import SMALL, run, run_until

from heliostat.artifacts import ArtifactRef, ArtifactStore, verify
from heliostat.cli import main
from heliostat.config import find_recipe
from heliostat.curation.ledger_read import open_ledger
from heliostat.storage import LocalStore

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1500)]

ARTIFACTS = [
    "copies/demo@1",
    "curated/demo@1",
    "features/demo@1",
    "features/demo-curated@1",
    "features/demo-evaluation@1",
    "model/demo@1",
    "model/demo-student@1",
    "model/demo-student-scratch@1",
    "raw/demo@1",
    "raw/demo-curated@1",
    "raw/demo-evaluation@1",
    "raw/demo-heldout@1",
    "raw/demo-labelled@1",
    "raw/demo-pictures@1",
    "release/demo@1",
    "report/demo@1",
    "sweep/demo@1",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("demo")
    done = run(["demo", *SMALL], str(folder / "store"), folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "store", done.stdout


def load(store: Path, name: str):
    return ArtifactStore(LocalStore(store)).load(ArtifactRef.parse(name))


def test_every_artifact_is_complete_and_its_checksums_hold(finished) -> None:
    store, _ = finished
    artifacts = ArtifactStore(LocalStore(store))
    assert [str(ref) for ref in artifacts.list()] == ARTIFACTS
    for ref in artifacts.list():
        assert verify(artifacts.load(ref)) > 0
    assert not list(store.rglob("draft.json"))
    assert not [path for path in store.rglob("*") if path.is_file() and "_work" in path.parts]


def test_the_funnel_adds_up_and_ends_at_the_training_set(finished) -> None:
    store, output = finished
    funnel = load(store, "curated/demo@1").read_json("funnel.json")
    for step in funnel:
        assert step["rows_in"] == step["rows_kept"] + sum(step["dropped_by_reason"].values())
    for before, after in itertools.pairwise(funnel):
        assert before["rows_kept"] == after["rows_in"]
    stages = ["decode", "nsfw", "exact", "hash", "copies", "decontaminate", "retrieval", "balance"]
    assert [step["stage"] for step in funnel] == stages
    assert funnel[0]["rows_in"] == load(store, "raw/demo@1").record.counts["images"]
    assert sum(funnel[0]["dropped_by_reason"].values()) == 6  # the broken files that were planted
    assert funnel[-1]["rows_kept"] == load(store, "curated/demo@1").record.counts["images"] == 100
    assert "planted copies: recall" in output


def test_kept_images_are_the_original_bytes_unless_a_face_was_blurred(finished) -> None:
    store, _ = finished
    raw, curated = load(store, "raw/demo@1"), load(store, "curated/demo@1")

    def images(artifact) -> dict[str, bytes]:
        rows = pq.read_table(io.BytesIO(artifact.files.read("manifest.parquet"))).to_pylist()
        return {row["id"]: artifact.files.read_range(row["shard"], row["offset"], row["length"]) for row in rows}

    before, after = images(raw), images(curated)
    changed = after.keys() - before.keys()
    blurred = [row for rows in open_ledger(curated.files).rows() for row in rows.to_pylist() if row["faces_blurred"]]
    assert len(changed) == len(blurred) > 0
    assert {identity: after[identity] for identity in after.keys() - changed}.items() <= before.items()
    assert not changed & {row["id"] for row in blurred}


def test_the_ledger_tells_the_story_of_every_planted_copy_and_the_sheets_are_there(finished, capsys) -> None:
    store, _ = finished
    truth = load(store, "raw/demo@1").read_json("truth.json")
    curated = load(store, "curated/demo@1")
    told = open_ledger(curated.files)
    for planted in truth["planted"]:
        (row,) = told.find(planted["file"]).to_pylist()
        assert row["decision"] in ("kept", "dropped")
    assert main(["why", truth["planted"][0]["file"], f"store={store}"]) == 0
    assert main(["what-if", "dup_threshold=0.8", f"store={store}"]) == 0
    output = capsys.readouterr().out
    assert truth["planted"][0]["file"] in output
    assert "dup_threshold 0.74 -> 0.8" in output
    pages = [key for key in curated.record.files if key.startswith("sheets/")]
    assert {"sheets/margin-000.html", "sheets/components-000.html", "sheets/evaluation-000.html"} <= set(pages)
    scores = curated.read_json("planted.json")
    assert {"this curation", "copy alone", "thumbnail", "pHash", "PDQ"} <= set(scores)
    assert scores["this curation"]["easy_recall"]["ratio"] == 1.0
    report = curated.files.read("report.html").decode()
    assert all(name in report for name in ("Planted copies", "Contact sheets", "Balance", "images merged wrongly"))


def test_the_report_holds_table_curves_and_pictures(finished) -> None:
    store, _ = finished
    report = load(store, "report/demo@1")
    page = report.files.read("report.html").decode()
    assert page.count("<svg") == 2
    assert page.count("data:image/png;base64,") == 2
    rows = report.read_json("results.json")["rows"]
    assert {(row["name"], row["version"]) for row in rows} >= {
        ("raw pixels", "colour"),
        ("colour histogram", "colour"),
        ("random weights", "colour"),
        ("teacher", "colour"),
        ("student", "colour"),
        ("student from scratch", "colour"),
        ("raw pixels", "grey"),
        ("luminance histogram", "grey"),
        ("random weights", "grey"),
    }
    assert all(0 <= row["knn"] <= 1 and 0 <= row["linear"] <= 1 for row in rows)
    knn = {row["name"]: row["knn"] for row in rows if row["version"] == "colour"}
    (against,) = report.read_json("results.json")["scratch"]
    assert against["knn_points"] == pytest.approx(100 * (knn["student"] - knn["student from scratch"]))
    assert f"k-NN {against['knn_points']:+.1f} points" in page


def test_lineage_runs_from_the_release_to_the_raw_images(finished) -> None:
    store, output = finished
    tree = output[output.index("release/demo@1  [") :]
    for name in ("model: model/demo-student@1", "teacher: model/demo@1", "data: curated/demo@1", "raw: raw/demo@1"):
        assert name in tree
    assert "mlflow ui --backend-store-uri sqlite:///" in output
    assert json.loads((store / "release/demo@1/config.json").read_text())["architecture"]["embed_dim"] == 64
    assert (store / "release/demo@1/README.md").read_text().startswith("---\nlicense: apache-2.0")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # SQLAlchemy's, about the queries of MLflow 3.17
def test_mlflow_holds_one_finished_run_per_artifact_with_its_inputs(finished) -> None:
    from mlflow import MlflowClient

    store, _ = finished
    client = MlflowClient(f"sqlite:///{store / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("heliostat")
    runs = {
        run.data.tags.get("heliostat.artifact", run.info.run_name): run
        for run in client.search_runs([experiment.experiment_id])
    }
    assert set(ARTIFACTS) <= set(runs)
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    student = runs["model/demo-student@1"]
    assert student.data.tags["heliostat.input.teacher"] == "model/demo@1"
    steps = [metric.step for metric in client.get_metric_history(runs["model/demo@1"].info.run_id, "train/loss")]
    assert steps == [4, 8, 12, 16, 20, 24]


def test_a_second_run_reuses_everything_and_says_so(finished) -> None:
    store, _ = finished
    done = run(["demo", *SMALL], str(store), store.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": reused, made ") == len(ARTIFACTS)
    assert "Ray:" not in done.stdout


def test_a_changed_setting_under_the_same_version_is_refused_with_the_field(finished, capsys) -> None:
    store, _ = finished
    assert main(["pretrain", find_recipe("laptop").as_posix(), *SMALL, "pretrain.optim.lr=5e-4", f"store={store}"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "model/demo@1 exists with another configuration (optim.lr: 0.001 -> 0.0005)" in error
    assert "give version=" in error


STOPS = [  # from the crawl to the packed set: tests/runtime/test_curation_kills.py; a training killed often: test_kills.py
    ("model/demo@1/_work/checkpoints/step-00000008/checkpoint.json", signal.SIGKILL),
    ("sweep     sweep/demo@1", signal.SIGINT),
    ("evaluate  report/demo@1", signal.SIGINT),
    ("publish   release/demo@1", signal.SIGKILL),
]


def test_a_demo_stopped_again_and_again_ends_with_the_same_weights(finished, tmp_path: Path) -> None:
    whole, _ = finished
    store = tmp_path / "store"
    for marker, kill in STOPS:
        output = run_until(
            ["demo", *SMALL], str(store), tmp_path, marker=store / marker if marker.endswith(".json") else marker, kill=kill
        )
        if kill == signal.SIGINT:
            assert "interrupted; the same command resumes where it stopped" in output
    done = run(["demo", *SMALL], str(store), tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    artifacts = ArtifactStore(LocalStore(store))
    assert [str(ref) for ref in artifacts.list()] == ARTIFACTS
    for ref in artifacts.list():
        verify(artifacts.load(ref))
    for name in ("model/demo@1", "model/demo-student@1", "curated/demo@1", "raw/demo@1"):
        again, before = load(store, name).record, load(whole, name).record
        assert again.fingerprint == before.fingerprint
        times = {"times.json", "report.html", "report.json"}  # they tell how long it took
        assert {key: file for key, file in again.files.items() if key not in times} == {
            key: file for key, file in before.files.items() if key not in times
        }, name

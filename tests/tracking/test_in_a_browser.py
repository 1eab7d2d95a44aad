"""What people see: a real chain of training stages in the pages of a real MLflow server, in headless Chromium.

The pictures go to the test's folder, and to $HELIOSTAT_SCREENSHOTS where that is set.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from browser import Seen, find_browser, look
from mlflow_server import MlflowServer
from small_chain import teacher_phase_and_student

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not find_browser(), reason="no Chromium is installed: python tests/fixtures/install_browser.py says how"
    ),
]


@dataclass(frozen=True)
class Site:
    """The server and what stands in it."""

    server: MlflowServer
    folder: Path

    def client(self) -> Any:
        import mlflow

        return mlflow.MlflowClient(tracking_uri=self.server.uri)

    def experiment(self) -> str:
        return str(self.client().get_experiment_by_name("heliostat").experiment_id)

    def run_id(self, name: str) -> str:
        (run,) = self.client().search_runs([self.experiment()], filter_string=f"attributes.run_name = '{name}'")
        return str(run.info.run_id)

    def look(self, name: str, page: str, *words: str, height: int = 1500) -> Seen:
        seen = look(f"{self.server.uri}/#/{page}", words, height=height)
        path = self.folder / f"mlflow_{name}.png"
        path.write_bytes(seen.png)
        print(f"screenshot: {path}")
        kept = os.environ.get("HELIOSTAT_SCREENSHOTS")
        if kept:
            Path(kept).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, kept)
        return seen


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    server = MlflowServer(folder / "server")
    server.start()
    teacher_phase_and_student(folder, tracking={"uri": server.uri, "system_metrics_every_seconds": 0.5})
    yield Site(server, folder)
    server.kill()


def test_the_page_of_a_student_shows_its_teacher_its_data_and_the_whole_tree(site: Site) -> None:
    page = f"experiments/{site.experiment()}/runs/{site.run_id('model/tiny-student@1')}"
    words = ["heliostat.input.teacher", "model/tiny-larger@1", "raw/tiny@1", "Registered models", "tiny-student-1"]
    seen = site.look("student", page, *words, "└─ teacher: model/tiny-larger@1", "init: model/tiny@1", "cost/dollars")
    for word in ("train/loss", "system/cpu_utilization_percentage", "optim.lr", "Drawn in the artifact lineage.html"):
        assert word in seen.text


def test_the_page_of_a_phase_shows_the_model_before_it(site: Site) -> None:
    page = f"experiments/{site.experiment()}/runs/{site.run_id('model/tiny-larger@1')}"
    site.look("phase", page, "heliostat.input.init", "model/tiny@1", "tiny-larger-1", "tiny-1")


def test_the_registry_shows_the_published_version_with_its_alias_card_and_run(site: Site) -> None:
    seen = site.look("registry", "models/tiny/versions/1", "heliostat.input.teacher", "published", "tiny-student, version 1")
    for word in ("model/tiny-student@1", "└─ teacher: model/tiny-larger@1", "Costs of training", "release/tiny@1"):
        assert word in seen.text


def test_the_environment_and_the_drawn_lineage_are_files_of_the_run(site: Site) -> None:
    run_id = site.run_id("model/tiny-student@1")
    paths = {one.path for one in site.client().list_artifacts(run_id)}
    assert paths == {"environment.json", "lineage.html", "online"}  # the last holds the pictures of the evaluations
    assert any(one.path.endswith(".png") for one in site.client().list_artifacts(run_id, "online"))
    page = f"experiments/{site.experiment()}/runs/{run_id}/artifacts"
    site.look("files", page, "environment.json", "lineage.html", height=900)

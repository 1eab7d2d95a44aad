"""The job files without a cluster: one for each verb, and nothing in them but the call."""

import runpy
import sys
from pathlib import Path

import pytest

from heliostat.cli import STAGE_VERBS

ROOT = Path(__file__).parents[2]
JOBS = sorted(path.stem for path in (ROOT / "jobs").glob("*.py"))


def test_every_stage_and_the_whole_recipe_has_a_job_file() -> None:
    assert sorted([*STAGE_VERBS, "run"]) == JOBS


@pytest.mark.parametrize("job", JOBS)
def test_a_job_file_asks_for_its_own_verb_and_exits_with_its_status(
    job: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"jobs/{job}.py"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "jobs" / f"{job}.py"), run_name="__main__")
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"heliostat: heliostat {job} takes one recipe, got nothing")


def test_a_job_file_does_nothing_when_a_worker_process_imports_it() -> None:
    for job in JOBS:
        runpy.run_path(str(ROOT / "jobs" / f"{job}.py"), run_name="__mp_main__")

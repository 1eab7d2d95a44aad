"""The banner tells the choices of a training, the end block commands that work as they are printed."""

import io
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from random_backbone import random_model, tiny_config
from tiny_training import SETTINGS, settings

from heliostat.artifacts import Artifact, ArtifactRef, ArtifactStore
from heliostat.config import validate
from heliostat.models.config import BackboneConfig
from heliostat.runtime.banner import TrainingFacts, training_banner
from heliostat.runtime.end_block import end_lines, heliostat_command
from heliostat.runtime.pipelines import Context
from heliostat.runtime.progress import Progress
from heliostat.runtime.recipe import Recipe
from heliostat.storage import LocalStore


def facts(**changes: Any) -> TrainingFacts:
    plain = {
        "config": settings("scaling.num_workers=2"),
        "artifacts": {"": "model/tiny@1"},
        "data": {"curated/tiny@1": 32},
        "places": {"": "/store/model/tiny@1"},
        "tracker": "sqlite:////store/mlflow.db",
        "evaluation": "20 of raw/tiny-labelled@1 (4 classes), 20 of the training set",
    }
    return TrainingFacts(**(plain | changes))


def test_a_banner_holds_every_choice() -> None:
    assert training_banner(facts()) == [
        "data        curated/tiny@1 (32 images)",
        "model       model/tiny@1: vit_tiny 32x2 patch 8, 4 registers, 32,512 parameters, heads 2,268",
        "method      2 crops of 32 pixels and 2 of 16; dino over 24 prototypes, ibot, koleo; centering",
        "length      8 steps of 8 images: 64 images, 2.0 epochs",
        "workers     2 workers on CPUs, 1 thread each",
        "memory      0.00 GiB per worker for 4 images, by formula, besides what Python and torch take",
        "evaluation  every 2 steps: 20 of raw/tiny-labelled@1 (4 classes), 20 of the training set",
        "checkpoints every 2 steps; the newest 2 are kept, until the run ends",
        "store       /store/model/tiny@1",
        "tracking    sqlite:////store/mlflow.db",
    ]


def test_a_banner_names_the_teacher_and_every_student() -> None:
    config = validate_distill({"small": SETTINGS["student"] | {"embed_dim": 16}, "other": SETTINGS["student"] | {"depth": 1}})
    lines = training_banner(
        facts(
            config=config,
            artifacts={"small": "model/tiny-small@1", "other": "model/tiny-other@1"},
            teacher=BackboneConfig.model_validate(SETTINGS["student"]),
            teacher_name="model/tiny@1",
        )
    )
    assert [line.split(":")[0] for line in lines[1:4]] == [
        "model       model/tiny-small@1",
        "model       model/tiny-other@1",
        "teacher     model/tiny@1",
    ]
    assert lines[3].endswith("vit_tiny 32x2 patch 8, 4 registers, frozen")


def validate_distill(students: dict[str, Any]):
    from heliostat.training.recipe import DistillConfig

    plain = {key: value for key, value in SETTINGS.items() if key != "student"}
    return validate(DistillConfig, plain | {"students": students}, "tiny")


def test_what_is_off_is_said_and_further_choices_are_added_or_take_a_place() -> None:
    lines = training_banner(
        facts(config=settings(), evaluation="", tracker="", choices={"parallel": "none: one worker", "memory": "1 GiB"})
    )
    assert "evaluation  off (online.enabled=false)" in lines
    assert "tracking    off" in lines
    assert "workers     this process, 1 thread, without Ray" in lines
    assert "memory      1 GiB" in lines
    assert lines[-1] == "parallel    none: one worker"


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def in_a_shell(command: str, folder: Path) -> str:
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=300, cwd=folder, env=environment())
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def finished(tmp_path: Path) -> tuple[Path, Artifact]:
    """A folder whose name has a space, as a person works in it, with a store of one model in it."""
    folder = tmp_path / "my work"
    random_model(folder / "the store", tiny_config("mlp"))
    return folder, ArtifactStore(LocalStore(folder / "the store")).load(ArtifactRef.parse("model/tiny@1"))


def lines_of(folder: Path, last: Artifact, monkeypatch: pytest.MonkeyPatch, *, uri: str = "none", **said: Any) -> list[str]:
    monkeypatch.chdir(folder)
    plain = {
        "name": "tiny",
        "store": "./the store",
        "tracking": {"uri": uri},
        "pretrain": SETTINGS,
        "evaluate": {"image_size": 32, "pca_image_size": 64},
        "publish": {},
    }
    context = Context(validate(Recipe, plain, "tiny"), Progress(io.StringIO()))
    return end_lines(context, last, **said)


def command_below(lines: list[str], words: str) -> str:
    return lines[next(number for number, line in enumerate(lines) if words in line) + 1].strip()


def test_the_lineage_command_works_as_it_is_printed(finished, monkeypatch) -> None:
    folder, last = finished
    command = command_below(lines_of(folder, last, monkeypatch), "where it comes from")
    assert in_a_shell(command, folder) == "model/tiny@1  [5 steps]\n"


def test_the_lines_of_python_work_as_they_are_printed(finished, monkeypatch) -> None:
    folder, last = finished
    lines = lines_of(folder, last, monkeypatch)
    start = next(number for number, line in enumerate(lines) if "in Python" in line) + 1
    program = "\n".join(line.removeprefix("  ") for line in lines[start : start + 3])
    assert program.count("\n") == 2
    assert in_a_shell(f"{shlex.quote(sys.executable)} -c {shlex.quote(program)}", folder) == "torch.Size([1, 128])\n"


def test_the_next_stage_is_called_with_the_same_settings(finished, monkeypatch) -> None:
    from heliostat.cli import parse
    from heliostat.runtime.recipe import read_recipe

    folder, last = finished
    monkeypatch.chdir(folder)
    said = ("optim.lr=1e-3", "store=./the store", "version=7")
    lines = lines_of(folder, last, monkeypatch, recipe_name="laptop", stage="pretrain", overrides=said)
    words = shlex.split(command_below(lines, "the next stage of the recipe, evaluate"))
    request = parse(words[words.index("evaluate") :])
    assert request.words == ("laptop",)
    again = read_recipe("laptop", request.overrides, "evaluate")
    assert again == read_recipe("laptop", said, "pretrain")
    assert again.pretrain is not None
    assert (again.store, again.version, again.pretrain.optim.lr) == ("./the store", "7", 1e-3)


@pytest.mark.parametrize(
    ("stage", "recipe_name"), [("publish", "laptop"), ("", "laptop"), ("pretrain", "")], ids=["last", "whole chain", "no file"]
)
def test_there_is_no_next_stage_after_the_last_one_or_without_a_recipe(finished, monkeypatch, stage, recipe_name) -> None:
    folder, last = finished
    lines = lines_of(folder, last, monkeypatch, recipe_name=recipe_name, stage=stage)
    assert not [line for line in lines if "next stage" in line]


def test_our_own_command_runs_where_it_was_printed() -> None:
    assert "laptop" in in_a_shell(heliostat_command(["recipes"]), Path.cwd()).split()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # SQLAlchemy's, about the queries of MLflow 3.17
def test_the_mlflow_command_serves_the_runs_as_it_is_printed_but_for_the_port(finished, monkeypatch) -> None:
    folder, last = finished
    lines = lines_of(folder, last, monkeypatch, uri="auto")
    command = command_below(lines, "the curves of all runs")
    port = free_port()
    assert command.endswith("--port 5000")
    command = f"exec {command.removesuffix('5000')}{port} --workers 1"
    lighter = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    server = subprocess.Popen(command, shell=True, cwd=folder, env=environment() | lighter, start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while True:
            assert server.poll() is None
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                    assert answer.read() == b"OK"
                break
            except (urllib.error.URLError, TimeoutError):
                assert time.monotonic() < deadline, "no answer within 300 s"
                time.sleep(0.3)
    finally:
        server.terminate()
        server.wait(timeout=60)


def test_without_tracking_the_block_says_so(finished, monkeypatch) -> None:
    folder, last = finished
    assert lines_of(folder, last, monkeypatch)[-1] == "the curves of all runs: not recorded, tracking.uri is none"


def test_every_line_is_short_enough_to_read() -> None:
    assert max(len(line) for line in training_banner(facts())) <= 110
    assert all(re.match(r"\S+ +\S", line) for line in training_banner(facts()))

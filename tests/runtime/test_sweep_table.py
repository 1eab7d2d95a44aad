"""The table, the picture and the recipe that a sweep leaves."""

import csv
import io

import cv2
import numpy as np
import pytest

from heliostat.config import validate
from heliostat.runtime.recipe import read_recipe
from heliostat.runtime.sweep_best import best_recipe, words
from heliostat.runtime.sweep_config import SweepConfig
from heliostat.runtime.sweep_plot import draw_trials
from heliostat.runtime.sweep_points import fixed_points
from heliostat.runtime.sweep_table import best_group, csv_text, markdown_table, short_keys, table_lines
from heliostat.runtime.sweep_trials import Trial

KOLEO, DROP = "method.dino.koleo_loss_weight", "method.drop_path_rate"


def sweep(**section) -> SweepConfig:
    return validate(SweepConfig, section, "sweep")


def trials(section: SweepConfig, values: list) -> list[Trial]:
    """Trials of a sweep by value; (value, step) for a stopped one, a text for a failed one."""
    made = []
    for point, value in zip(fixed_points(section), values, strict=True):
        facts = {"name": point.name, "overrides": dict(point.overrides), "label": point.step}
        if isinstance(value, str):
            made.append(Trial(**facts, status="failed", step=0, error=value))
        elif isinstance(value, tuple):
            made.append(Trial(**facts, status="stopped", step=value[1], value=value[0]))
        else:
            made.append(Trial(**facts, status="finished", step=200, value=value))
    return made


GRID = {"grid": {KOLEO: [0.0, 0.1], DROP: [0.0, 0.3]}}


def test_the_best_stands_first_then_who_was_stopped_by_how_far_they_came_then_who_failed() -> None:
    section = sweep(grid={KOLEO: [0.0, 0.01, 0.1], DROP: [0.0, 0.3]})
    found = trials(section, [0.5, (0.9, 20), "no room", 0.7, (0.1, 40), float("nan")])
    lines = table_lines(found, section)
    assert lines[0].split() == ["trials", "koleo_loss_weight", "drop_path_rate", "online/knn_accuracy", "steps", "how"]
    assert [line.split()[0] for line in lines[1:]] == ["003", "000", "005", "004", "001", "002"]
    assert lines[4].split() == ["004", "0.1", "0", "0.1", "40", "stopped"]
    assert [trial.name for trial in best_group(found, section).trials] == ["003"]
    text = markdown_table(found, section, "sweep/x@1")
    assert "Trial 002 failed: no room" in text
    assert "Stopped trials stand below the finished ones" in text
    assert "seeds" not in text
    lower = sweep(**GRID, mode="min")
    assert best_group(trials(lower, [0.5, 0.4, 0.7, (0.0, 5)]), lower).trials[0].name == "001"
    assert best_group(trials(lower, [(0.5, 5)] * 4), lower) is None
    assert best_group(trials(lower, [float("nan")] * 4), lower) is None


def test_seeds_are_one_line_with_mean_and_standard_deviation_and_the_csv_has_every_digit() -> None:
    section = sweep(grid={KOLEO: [0.0, 0.1], "train.seed": [0, 1, 2]})
    values = [0.5, 0.6, 0.7, 0.1, 0.9, (0.3, 50)]
    found = trials(section, values)
    rows = list(csv.DictReader(io.StringIO(csv_text(found, section))))
    assert [row["trials"] for row in rows] == ["000 001 002", "003 004 005"]
    assert float(rows[0]["online/knn_accuracy"]) == np.mean(values[:3])
    assert float(rows[0]["spread"]) == pytest.approx(np.std(values[:3], ddof=1))
    assert (rows[1][KOLEO], rows[1]["seeds"], rows[1]["how"]) == ("0.1", "2", "2 finished, 1 stopped")
    assert float(rows[1]["online/knn_accuracy"]) == 0.5
    assert table_lines(found, section)[1].split()[-5:] == ["0.6", "0.1", "3", "200", "finished"]


def test_an_ablation_keeps_its_order_and_says_what_each_step_changed() -> None:
    steps = [{"name": "iBOT"}, {"name": "+ KoLeo", "overrides": {KOLEO: 0.1}}, {"name": "+ drop", "overrides": {DROP: 0.1}}]
    section = sweep(ablation=steps)
    lines = table_lines(trials(section, [0.5, 0.75, 0.25]), section)
    assert [line.split()[-3:] for line in lines[2:]] == [["+0.25", "200", "finished"], ["-0.5", "200", "finished"]]
    assert [line[8:15].strip() for line in lines[1:]] == ["iBOT", "+ KoLeo", "+ drop"]
    found = trials(section, [0.5, 0.75, 0.25])
    assert words(best_group(found, section)) == [f"{KOLEO}=0.1"]


def test_short_keys_are_as_long_as_it_takes_to_tell_them_apart() -> None:
    keys = ["method.dino.head_n_prototypes", "method.ibot.head_n_prototypes", "optim.lr"]
    assert short_keys(keys) == ["dino.head_n_prototypes", "ibot.head_n_prototypes", "lr"]


RANGE = {"low": 1e-3, "high": 1e-1, "log": True}
SECTIONS = {
    "curve": {"grid": {KOLEO: [0.0, 0.01, 0.1]}},
    "seeds": {"grid": {"train.seed": [0, 1]}},
    "dollars in a heat map": {"grid": {"student.arch": ["vit_tiny", "vit_small"], DROP: [0.0, 0.1]}},
    "points": {"space": {KOLEO: RANGE, DROP: {"low": 0.0, "high": 0.4}}, "num_trials": 5},
    "parallel": {"space": {KOLEO: RANGE, DROP: {"low": 0.0, "high": 0.4}, "optim.lr": RANGE}, "num_trials": 5},
    "one of each": {"grid": {KOLEO: [0.1], DROP: [0.1], "optim.lr": [1e-3]}},
    "ablation": {"ablation": [{"name": "a"}, {"name": "b $x$"}], "grid": {"train.seed": [0, 1]}},
}


@pytest.mark.parametrize("name", SECTIONS)
@pytest.mark.parametrize("kind", ["finished", "some stopped", "not finite"])
def test_every_kind_of_sweep_is_drawn(name: str, kind: str) -> None:
    section = sweep(**SECTIONS[name])
    values: list = [0.1 * (index + 1) for index in range(len(fixed_points(section)))]
    if kind != "finished":
        values[-1] = (0.05, 20) if kind == "some stopped" else float("nan")
    picture = cv2.imdecode(np.frombuffer(draw_trials(trials(section, values), section, f"sweep/{name}@1"), np.uint8), 1)
    assert picture.shape[1] == 960
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50


def test_better_trials_are_brighter_in_a_heat_map() -> None:
    section = sweep(**GRID)
    dark, bright = (
        cv2.imdecode(np.frombuffer(draw_trials(trials(section, values), section, "x"), np.uint8), 0)
        for values in ([0.9, 0.1, 0.1, 0.1], [0.1, 0.9, 0.9, 0.9])
    )
    assert bright.mean() > dark.mean() + 20


def test_the_best_recipe_is_the_section_with_the_best_settings_on_the_images_of_the_sweep(tmp_path, monkeypatch) -> None:
    class Input:
        ref = "curated/demo@1"

    class Labels:
        ref = "raw/demo-labelled@1"

    monkeypatch.chdir(tmp_path)
    recipe = read_recipe("laptop", ("sweep.overrides={train.steps: 50, scaling.num_workers: 0}",))
    section = sweep(grid={KOLEO: [0.5], "train.seed": [3, 4]}, overrides={"train.steps": 50})
    best = best_group(trials(section, [0.5, 0.75]), section)
    text = best_recipe(recipe, section, best, inputs={"data": Input(), "labelled": Labels()})
    (tmp_path / "best.yaml").write_text(text)
    read = read_recipe("best.yaml")
    assert text.startswith(
        "# The best of a sweep: online/knn_accuracy 0.625 ± 0.1768 over 2 seeds, at step 200.\n# Settings: method.dino."
    )
    assert "# The trials also had train.steps=50, which is left out here.\n" in text
    assert (read.name, read.store, read.stages) == ("demo-best", "./heliostat-store", ["pretrain"])
    assert read.pretrain.data == "curated/demo@1"
    assert read.pretrain.online.labelled == "raw/demo-labelled@1"
    koleo = read.pretrain.method.dino.model_copy(update={"koleo_loss_weight": recipe.pretrain.method.dino.koleo_loss_weight})
    assert read.pretrain.method.dino.koleo_loss_weight == 0.5
    assert koleo == recipe.pretrain.method.dino
    assert (read.pretrain.train, read.pretrain.scaling) == (recipe.pretrain.train, recipe.pretrain.scaling)

"""Signs of collapse: silent on a healthy run, one sign for each way to collapse, and a warning in the run itself."""

import math

import pytest
import torch
from tiny_training import Log, job, settings, trainer

from heliostat.training import loop
from heliostat.training.collapse import collapse_signs

HEALTHY = {  # the last record of the shipped laptop recipe
    "train/dino_global": 1.84,
    "train/dino_global_at_uniform": 2.08,
    "train/teacher_entropy": 5.44,
    "train/teacher_entropy_at_uniform": math.log(512),
    "train/prototype_usage": 0.99,
    "train/feature_std": 0.89,
    "train/rankme": 14.9,
}


def names(**changes: float) -> list[str]:
    numbers = HEALTHY | {f"train/{name}": value for name, value in changes.items()}
    return [sign.name for sign in collapse_signs(numbers, num_prototypes=512)]


def test_a_healthy_record_has_no_sign() -> None:
    assert names() == []
    assert collapse_signs({}, num_prototypes=512) == []
    assert names(rankme=math.nan, feature_std=math.nan, prototype_usage=math.nan, dino_global=math.inf) == []


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"feature_std": 0.02}, "features"),
        ({"rankme": 1.02}, "features"),
        ({"prototype_usage": 1.1 / 512, "teacher_entropy": 0.01}, "prototypes"),
        ({"dino_global": 2.079, "teacher_entropy": 6.238}, "uniform"),
    ],
)
def test_every_way_to_collapse_has_its_sign_and_advice(changes: dict[str, float], name: str) -> None:
    assert names(**changes) == [name]
    (sign,) = collapse_signs(HEALTHY | {f"train/{key}": value for key, value in changes.items()}, num_prototypes=512)
    assert "; try " in str(sign)
    assert "method." in sign.advice


def test_a_loss_at_uniform_with_a_sharp_teacher_is_a_student_that_has_not_learnt_yet() -> None:
    assert names(dino_global=2.079) == []


def test_the_settings_that_are_advised_exist() -> None:
    from heliostat.config import walk_fields
    from heliostat.training.recipe import PretrainConfig

    known = {key for key, _ in walk_fields(PretrainConfig)}
    bad = [{"train/feature_std": 0.0}, {"train/prototype_usage": 0.0}, {"train/dino_global": 2.0, "train/teacher_entropy": 2.0}]
    for record in bad:
        (sign,) = collapse_signs(record, num_prototypes=8)
        keys = {word.strip("(),").partition("=")[0] for word in sign.advice.split() if "." in word}
        assert keys
        assert keys <= known


def test_a_run_that_collapses_says_so_once_and_counts_it(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(loop, "_FEWEST_STEPS", 0)
    log = Log()
    made = trainer(
        job(
            tmp_path, settings("train.log_every_steps=1", "optim.warmup_steps=0", "method.teacher.warmup_teacher_temp_steps=0")
        ),
        log,
    )
    with torch.no_grad():  # every image gets the same feature: the final norm keeps its bias only
        for network in (made.method.student, made.method.teacher):
            network.backbone.norm.weight.zero_()
            network.backbone.norm.bias.fill_(1.0)
    state = loop.LoopState()
    for step in range(3):
        loop.one_step(made, state, made.loader.batch(step))
    warnings = [line for line in log.said if "looks collapsed" in line]
    assert len(warnings) == 1
    assert warnings[0].startswith("step 2: looks collapsed: all images have nearly the same feature (feature_std 0.00")
    assert [metrics["train/collapse_signs"] for _, metrics in log.metrics][1:] == [1.0, 1.0]

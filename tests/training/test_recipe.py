"""The training sections: phases, initial weights, several students, and what is refused."""

import pytest
from tiny_training import SETTINGS, settings

from heliostat.config import validate
from heliostat.errors import ConfigError
from heliostat.training.recipe import DistillConfig, PretrainConfig, phase_config

LARGE = {
    "student": {"arch": "vit_large", "ffn_layer": "swiglufused"},
    "train": {"steps": 625_000, "global_batch_size": 3072},
    "optim": {"lr": 2e-4, "warmup_steps": 100_000, "freeze_last_layer_steps": 1250},
    "phases": [
        {"name": "highres", "steps": 10_000, "global_crops_size": 518, "lr": 5e-5, "overrides": ["crops.local_crops_number=4"]}
    ],
}


def pretrain(**changes):
    return validate(PretrainConfig, SETTINGS | changes, "tiny")


def distill(**changes):
    plain = {key: value for key, value in SETTINGS.items() if key != "student"}
    return validate(DistillConfig, plain | changes, "tiny")


def test_a_phase_compresses_every_schedule_into_its_steps():
    base = validate(PretrainConfig, LARGE, "large")
    phase = phase_config(base, base.phases[0])
    assert (phase.train.steps, phase.optim.warmup_steps, phase.optim.freeze_last_layer_steps) == (10_000, 1600, 20)
    assert phase.method.teacher.warmup_teacher_temp_steps == 600
    assert (phase.student.img_size, phase.crops.global_crops_size, phase.crops.local_crops_size) == (518, 518, 98)
    assert (phase.optim.lr, phase.crops.local_crops_number, phase.phases) == (5e-5, 4, ())
    unchanged = ("method", "decode", "loader", "scaling", "data", "init")
    for name in unchanged[1:]:
        assert getattr(phase, name) == getattr(base, name)
    assert phase.train.global_batch_size == base.train.global_batch_size


def test_a_phase_of_a_few_steps_still_ends_its_warmups():
    base = validate(
        PretrainConfig,
        LARGE | {"phases": [{"name": "short", "steps": 1, "global_crops_size": 28, "local_crops_size": 14}]},
        "large",
    )
    phase = phase_config(base, base.phases[0])
    assert (phase.optim.warmup_steps, phase.method.teacher.warmup_teacher_temp_steps) == (0, 0)


def test_a_phase_does_not_load_the_initial_weights_again():
    plain = SETTINGS | {"init": {"weights": "w.pth", "head_warmup_steps": 2}}
    base = validate(PretrainConfig, plain | {"phases": [{"name": "big", "steps": 4, "global_crops_size": 64}]}, "tiny")
    assert phase_config(base, base.phases[0]).init.weights == ""


def test_every_student_of_a_distillation_gets_the_size_of_the_phase():
    students = {"a": SETTINGS["student"], "b": SETTINGS["student"] | {"depth": 1}}
    base = distill(students=students, phases=[{"name": "big", "steps": 4, "global_crops_size": 64}])
    phase = phase_config(base, base.phases[0])
    assert [backbone.img_size for backbone in phase.backbones.values()] == [64, 64]
    assert list(phase.backbones) == ["a", "b"]


def test_the_only_student_has_no_name():
    assert list(pretrain().backbones) == [""]
    assert list(distill(student=SETTINGS["student"]).backbones) == [""]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("crops.global_crops_size=36", "crops.global_crops_size 36 is not divisible by student.patch_size 8; use 32 or 40"),
        ("crops.local_crops_size=20", "crops.local_crops_size 20 is not divisible by student.patch_size 8; use 16 or 24"),
        ("online.image_size=20", "online.image_size 20 is not divisible by student.patch_size 8; use 16 or 24"),
        ("method.dino.head_n_prototypes=0", "method.dino.head_n_prototypes=0: input should be greater than or equal to 2"),
        ("student.in_chans=1", "student.in_chans 1 does not fit the crops, which are RGB; use 3"),
        ("init.head_warmup_steps=3", "head_warmup_steps 3 needs init.weights"),
        ("init={weights: w.pth, head_warmup_steps: 9}", "init.head_warmup_steps 9 exceeds the run of 8 steps; use at most 8"),
        (
            "phases=[{name: a, steps: 4, global_crops_size: 36}]",
            "phase a: student: img_size 36 is not divisible by patch_size 8",
        ),
        ("phases=[{name: A b, steps: 4, global_crops_size: 64}]", "phases.0.name='A b'"),
        (
            "phases=[{name: a, steps: 4, global_crops_size: 64, overrides: [optim.rl=1]}]",
            "phase a: unknown key: optim.rl. Did you mean optim.lr?",
        ),
        ("crops.local_crops_size=64", "crops.local_crops_size 64 is larger than crops.global_crops_size 32; lower it"),
        (
            "phases=[{name: a, steps: 4, global_crops_size: 64, overrides: [train.steps=3]}]",
            "phase a: give steps: of the phase instead of the override train.steps",
        ),
        (
            "phases=[{name: a, steps: 4, global_crops_size: 64, overrides: [init.weights=w.pth]}]",
            "phase a: init.weights is that of the section and cannot differ in a phase",
        ),
        (
            "phases=[{name: a, steps: 4, global_crops_size: 64, overrides: [student.depth=4]}]",
            "phase a: depth 4 differs from the section's 2; a phase goes on with its weights, remove",
        ),
        (
            "phases=[{name: a, steps: 4, global_crops_size: 64, overrides: [method.dino.head_n_prototypes=99]}]",
            "phase a: out_dim 99 differs from the section's 24; a phase goes on with its weights, remove",
        ),
        (
            "phases=[{name: a, steps: 4, global_crops_size: 64, overrides: [method.ibot.separate_head=false]}]",
            "phase a: out_dim 24 differs from the section's 20",
        ),
        (f"phases=[{{name: {'a' * 65}, steps: 4, global_crops_size: 64}}]", "should match pattern"),
        (
            "phases=[{name: a, steps: 4, global_crops_size: 64}, {name: a, steps: 2, global_crops_size: 32}]",
            "phases: a is there twice",
        ),
    ],
)
def test_an_impossible_training_is_refused_in_one_line(override, message):
    with pytest.raises(ConfigError) as error:
        settings(override)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"student": SETTINGS["student"], "students": {"a": SETTINGS["student"]}},
            r"student and students \(a\) are both given",
        ),
        ({"students": {"A": SETTINGS["student"]}}, "students.A"),
        (
            {"students": {"a": SETTINGS["student"], "b": SETTINGS["student"] | {"patch_size": 16}}},
            "students have patch sizes {'a': 8, 'b': 16}",
        ),
    ],
)
def test_impossible_students_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message.replace("{", r"\{") if "patch" in message else message):
        distill(**changes)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("scaling.num_workers=2", "loader.ray_workers=3", "train.global_batch_size=8"),
            "8 is not divisible by 2 workers with 3 data workers each (loader.ray_workers); use 6 or 12",
        ),
        (
            ("crops.cut_on=device", "scaling.num_workers=1"),
            "crops.cut_on device leaves the crops to the GPU, and loader.via ray_data has them cut",
        ),
        (("scaling.num_workers=0",), "loader.via ray_data needs Ray, and scaling.num_workers is 0; use 1 or more"),
    ],
)
def test_data_workers_that_cannot_serve_are_refused(words, message):
    with pytest.raises(ConfigError) as error:
        settings("loader.via=ray_data", *words)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("num_workers=0", "parallel=zero2"), "scaling.parallel zero2 needs training processes, and scaling.num_workers is 0"),
        (("num_workers=2", "parallel=none"), "scaling.parallel none is for one worker, and scaling.num_workers is 2"),
        (
            ("num_workers=1", "min_workers=2", "max_workers=4"),
            "scaling.num_workers 1 is outside of min_workers 2 to max_workers 4",
        ),
        (
            ("num_workers=2", "min_workers=1", "max_workers=4", "cpus_per_worker=1.5"),
            "scaling.cpus_per_worker 1.5 is not whole, and Ray counts workers that come and go in whole CPUs; use 2",
        ),
        (
            ("num_workers=2", "min_workers=4", "max_workers=2"),
            "min_workers 4 is above max_workers 2; use scaling.max_workers=4",
        ),
        (("max_failures=-2",), "scaling.max_failures"),
    ],
)
def test_workers_that_cannot_be_placed_as_asked_are_refused(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        settings(*(f"scaling.{word}" for word in words))
    assert message in str(error.value)
    assert (
        settings("scaling.num_workers=2", "scaling.cpus_per_worker=0.5", "scaling.max_failures=-1").scaling.max_failures == -1
    )

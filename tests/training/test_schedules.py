from pathlib import Path

import numpy as np
import pytest

from heliostat.training.config import OptimConfig, TeacherConfig
from heliostat.training.schedules import check_schedules, peak_lr, step_values

GOLDEN = Path(__file__).parents[1] / "golden"
# The long recipe of DINOv2, whose peak learning rate the golden file rounds to 3.4641e-4.
OPTIM = OptimConfig(
    lr=3.4641e-4, scaling_rule="none", warmup_steps=100_000, weight_decay=0.04, weight_decay_end=0.2, layerwise_decay=1.0
)
TEACHER = TeacherConfig(momentum_teacher=0.994, warmup_teacher_temp_steps=37_500)


def long_run(step):
    return step_values(step, optim=OPTIM, teacher=TEACHER, total_steps=625_000, global_batch_size=3072)


def test_every_schedule_equals_the_reference():
    with np.load(GOLDEN / "schedules.npz") as arrays:
        for index, step in enumerate(arrays["iterations"]):
            values = long_run(int(step))
            for name in ("lr", "weight_decay", "momentum", "teacher_temp"):
                assert getattr(values, name) == pytest.approx(float(arrays[name][index]), rel=1e-12, abs=1e-18), (step, name)


def test_prototypes_are_frozen_for_the_given_steps_only():
    assert long_run(1249).last_layer_lr == 0
    assert long_run(1250).last_layer_lr == long_run(1250).lr > 0


@pytest.mark.parametrize(("rule", "peak"), [("sqrt_wrt_1024", 0.008), ("none", 0.004)])
def test_the_learning_rate_scales_with_the_root_of_the_batch(rule, peak):
    assert peak_lr(OptimConfig(lr=0.004, scaling_rule=rule), 4096) == pytest.approx(peak)


@pytest.mark.parametrize("warmup", [0, 1, 2])
def test_short_warmups_do_not_divide_by_zero(warmup):
    optim = OptimConfig(lr=1.0, scaling_rule="none", warmup_steps=warmup, min_lr=0.0)
    teacher = TeacherConfig(warmup_teacher_temp_steps=warmup)
    lrs = [step_values(step, optim=optim, teacher=teacher, total_steps=4, global_batch_size=8).lr for step in range(5)]
    assert lrs[warmup] == 1.0
    assert lrs[4] == 0.0


def test_a_run_that_ends_inside_its_warmup_is_refused():
    with pytest.raises(
        ValueError, match=r"optim\.warmup_steps 100000 does not end within a run of 1000 steps; use at most 999"
    ):
        check_schedules(OPTIM, TEACHER, 1000)
    check_schedules(OPTIM, TEACHER, 100_001)

import importlib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def step_cpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("step_cpu")


def test_the_plain_implementation_has_the_same_losses_and_gradients_without_stochastic_depth(step_cpu):
    loss, gradient = step_cpu.check_agreement(num_images=2)
    assert loss < 1e-5
    assert gradient < 1e-4


def test_the_gate_sees_a_difference(step_cpu, monkeypatch):
    monkeypatch.setattr(step_cpu, "plain_koleo", lambda cls_BD: cls_BD.square().mean())
    with pytest.raises(RuntimeError, match="nothing was timed"):
        step_cpu.check_agreement(num_images=2)


def test_a_step_of_both_sides_gives_the_same_weights(step_cpu):
    case = step_cpu.setting(0.0, 2)
    ours, theirs = step_cpu.build_model(case), step_cpu.build_model(case)
    batch = step_cpu.random_batch(case, torch.device("cpu"))
    step_cpu.TrainingStep(ours, torch.device("cpu"), torch.float32)(batch)
    step_cpu.PlainStep(theirs)(batch)
    for key, value in ours.teacher.state_dict().items():
        # AdamW's first step is the learning rate (1e-4) times the sign of the gradient; the teacher takes 0.006 of it.
        torch.testing.assert_close(value, theirs.teacher.state_dict()[key], atol=2e-6, rtol=1e-4, msg=key)


def test_the_counted_cost_falls_with_the_drop_rate(step_cpu):
    costs = [step_cpu.setting(rate).tflop_per_image() for rate in step_cpu.DROP_RATES]
    assert costs[0] > costs[1] > costs[2] > 0.6 * costs[0]

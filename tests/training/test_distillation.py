import copy

import pytest
import torch

from heliostat.data.batch import Batch
from heliostat.errors import CheckpointError, ConfigError
from heliostat.models.config import BackboneConfig
from heliostat.training.config import DinoConfig, IbotConfig, MethodConfig, OptimConfig, TeacherConfig
from heliostat.training.distillation import Distillation
from heliostat.training.engine import TorchEngine
from heliostat.training.method import SelfDistillation
from heliostat.training.param_groups import build_optimizer
from heliostat.training.schedules import step_values
from heliostat.training.step import train_step

TEACHER = BackboneConfig(arch="vit_tiny", embed_dim=32, depth=3, num_heads=4, img_size=56, ffn_layer="swiglufused")
STUDENT = BackboneConfig(arch="vit_tiny", embed_dim=16, depth=2, num_heads=2, img_size=56)


def make_method(**changes):
    settings = {
        "drop_path_rate": 0.4,
        "centering": "sinkhorn_knopp",
        "dino": DinoConfig(head_n_prototypes=24, head_bottleneck_dim=8, head_hidden_dim=16),
        "ibot": IbotConfig(separate_head=True, head_n_prototypes=20, head_bottleneck_dim=8, head_hidden_dim=16),
    }
    return MethodConfig(**(settings | changes))


def make_distillation(**changes):
    return Distillation(teacher=TEACHER, students={"": STUDENT}, method=make_method(**changes))


def random_batch():
    return Batch(torch.randn(6, 3, 56, 56), torch.randn(6, 3, 28, 28), torch.rand(6, 16) < 0.5)


def test_the_teacher_never_changes_and_the_average_follows_the_student():
    model = make_distillation()
    teacher, start = copy.deepcopy(model.teacher.state_dict()), copy.deepcopy(model.results[""].state_dict())
    optimizer = torch.optim.AdamW(model.networks[""].parameters(), lr=1e-2)
    for _ in range(2):
        model.weighted_sum(model(random_batch(), 0.05)).backward()
        optimizer.step()
        model.update_teacher(0.5)
    assert all(torch.equal(value, teacher[key]) for key, value in model.teacher.state_dict().items())
    moved = [key for key, value in model.results[""].state_dict().items() if not torch.equal(value, start[key])]
    assert "backbone.blocks.0.attn.qkv.weight" in moved


def test_the_student_sees_no_masks_and_has_no_stochastic_depth():
    model, batch = make_distillation().train(), random_batch()
    unmasked = Batch(batch.global_crops, batch.local_crops, torch.zeros_like(batch.masks))
    with torch.no_grad():
        first, second = model(batch, 0.05), model(unmasked, 0.05)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_ibot_covers_every_patch_of_both_global_crops():
    model, batch = make_distillation(), random_batch()
    with torch.no_grad():
        outputs, teacher = model.student_outputs(batch), model.teacher_targets(batch, 0.05)
        ibot = model.losses(outputs, teacher, batch)["ibot"]
    student = outputs[""]
    assert student.patches_MK.shape == teacher.patches_MK.shape == (6 * 16, 20)
    log_probabilities = torch.log_softmax(student.patches_MK / 0.1, -1)
    assert ibot.item() == pytest.approx(-(teacher.patches_MK * log_probabilities).sum(1).mean().item(), rel=1e-5)


def test_every_student_parameter_has_a_gradient_and_no_other():
    model = make_distillation()
    model.weighted_sum(model(random_batch(), 0.05)).backward()
    assert all(parameter.grad is not None for parameter in model.networks[""].parameters())
    assert all(parameter.grad is None for network in (model.teacher, model.results[""]) for parameter in network.parameters())


@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
def test_the_teacher_comes_from_the_teacher_of_a_pretraining(centering):
    pretrained = SelfDistillation(TEACHER, make_method(centering=centering))
    with torch.no_grad():
        for buffer in pretrained.buffers():
            buffer.normal_()
    for own in ("centering", "sinkhorn_knopp"):
        model = make_distillation(centering=own)
        model.load_teacher(pretrained.state_dict())
        for key, value in model.teacher.state_dict().items():
            assert torch.equal(value, pretrained.teacher.state_dict()[key])
        if own == centering == "centering":
            assert torch.equal(model.dino_targets.center, pretrained.dino_targets.center)


def test_a_teacher_of_another_shape_is_refused():
    pretrained = SelfDistillation(STUDENT, make_method())
    with pytest.raises(CheckpointError, match="the teacher's state does not fit Network"):
        make_distillation().load_teacher(pretrained.state_dict())


def test_different_patch_sizes_are_refused():
    with pytest.raises(ConfigError, match="patch_size 28 differs from the teacher's 14"):
        Distillation(teacher=TEACHER, students={"": STUDENT.model_copy(update={"patch_size": 28})}, method=make_method())


def test_losses_of_a_student_with_uniform_output_have_the_announced_values():
    model = make_distillation()
    with torch.no_grad():
        for head in (model.networks[""].dino_head, model.networks[""].ibot_head):
            head.last_layer.parametrizations.weight.original0.zero_()
    shown = model.logged(model(random_batch(), 0.05))
    for name, value in model.uniform_losses(2).items():
        assert shown[name].item() == pytest.approx(value, rel=1e-5), name


def test_a_student_learns_its_teacher():
    torch.manual_seed(0)
    model, batch = make_distillation(), random_batch()
    optimizer = torch.optim.AdamW(model.networks[""].parameters(), lr=5e-3)
    totals = []
    for _ in range(15):
        total = model.weighted_sum(model(batch, 0.07))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < totals[0] - 0.3


OTHER = BackboneConfig(arch="vit_tiny", embed_dim=24, depth=1, num_heads=2, img_size=56)


def train_students(students, batches):
    """Two optimizer steps of AdamW for each student, as the loop makes them; returns the students' and averages' states."""
    torch.manual_seed(3)
    model = Distillation(teacher=TEACHER, students=students, method=make_method())
    torch.manual_seed(4)
    model.load_teacher({f"teacher.{key}": torch.randn_like(value) for key, value in model.teacher.state_dict().items()})
    config = OptimConfig(lr=1e-3, scaling_rule="none", warmup_steps=0, freeze_last_layer_steps=0)
    optimizer = build_optimizer(model.networks, config)
    engine = TorchEngine(model, optimizer, clip_grad=0.05)
    shown = []
    for step, batch in enumerate(batches):
        values = step_values(step, optim=config, teacher=TeacherConfig(), total_steps=2, global_batch_size=3)
        shown.append(train_step(model, optimizer, engine, batch, values).logged)
    return model, shown


def test_several_students_compute_what_each_computes_alone():
    torch.manual_seed(0)
    batches = [random_batch() for _ in range(2)]
    both, shown = train_students({"small": STUDENT, "other": OTHER}, batches)
    for name, config in (("small", STUDENT), ("other", OTHER)):
        alone, shown_alone = train_students({"": config}, batches)
        for key, value in alone.networks[""].state_dict().items():
            assert torch.equal(value, both.networks[name].state_dict()[key]), (name, key)
        for key, value in alone.results[""].state_dict().items():
            assert torch.equal(value, both.results[name].state_dict()[key]), (name, key)
        for step in range(2):
            own = {key.removeprefix(f"{name}/"): value for key, value in shown[step].items() if key.startswith(f"{name}/")}
            assert own == shown_alone[step]


def test_the_teacher_looks_at_a_batch_once_for_all_students():
    model, _ = train_students({"small": STUDENT, "other": OTHER}, [])
    calls = []
    model.teacher.backbone.register_forward_hook(lambda module, arguments, output: calls.append(1))
    model(random_batch(), 0.05)
    assert len(calls) == 1

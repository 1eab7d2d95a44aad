import copy
import math

import pytest
import torch

from heliostat.data.batch import Batch
from heliostat.errors import TrainingError
from heliostat.models.config import BackboneConfig
from heliostat.training.config import DinoConfig, IbotConfig, MethodConfig
from heliostat.training.method import SelfDistillation, move_average, uniform_losses

TINY = BackboneConfig(arch="vit_small", embed_dim=32, depth=2, num_heads=4, img_size=70, num_register_tokens=2)


def tiny_method(**changes):
    settings = {
        "drop_path_rate": 0.0,
        "centering": "sinkhorn_knopp",
        "dino": DinoConfig(head_n_prototypes=24, head_bottleneck_dim=8, head_hidden_dim=16),
        "ibot": IbotConfig(separate_head=True, head_n_prototypes=20, head_bottleneck_dim=8, head_hidden_dim=16),
    }
    return MethodConfig(**(settings | changes))


def random_batch(*, num_images=3, num_local_crops=2, masked=True):
    num_local = num_local_crops * num_images
    masks = torch.rand(2 * num_images, 25) < 0.3
    masks[0] = False
    return Batch(
        torch.randn(2 * num_images, 3, 70, 70),
        torch.randn(num_local, 3, 42, 42),
        masks if masked else torch.zeros_like(masks),
    )


def test_the_teacher_starts_as_the_student_and_has_no_gradient():
    model = SelfDistillation(TINY, tiny_method(drop_path_rate=0.3))
    for ours, theirs in zip(model.student.parameters(), model.teacher.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert not theirs.requires_grad
    assert model.student.backbone.blocks[0].drop_path_rate == 0.3
    assert model.teacher.backbone.blocks[0].drop_path_rate == 0
    assert model.results == {"": model.teacher}
    assert model.networks == {"": model.student}


def test_state_keys_name_the_role_first():
    roles = {key.split(".")[0] for key in SelfDistillation(TINY, tiny_method()).state_dict()}
    assert roles == {"student", "teacher"}
    keys = SelfDistillation(TINY, tiny_method(centering="centering")).state_dict().keys()
    assert {"dino_targets.center", "ibot_targets.center"} <= keys


@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
@pytest.mark.parametrize("separate_head", [True, False])
def test_every_student_parameter_has_a_gradient_even_without_masked_patches(centering, separate_head):
    ibot = IbotConfig(separate_head=separate_head, head_n_prototypes=20, head_bottleneck_dim=8, head_hidden_dim=16)
    model = SelfDistillation(TINY, tiny_method(centering=centering, ibot=ibot))
    losses = model(random_batch(masked=False), 0.05)
    model.weighted_sum(losses).backward()
    assert losses["ibot"].item() == 0
    missing = [name for name, parameter in model.student.named_parameters() if parameter.grad is None]
    assert missing == []
    assert all(parameter.grad.isfinite().all() for parameter in model.student.parameters())
    assert all(parameter.grad is None for parameter in model.teacher.parameters())
    if separate_head:
        assert not any(parameter.grad.any() for parameter in model.student.ibot_head.parameters())


def test_ibot_targets_are_the_teacher_patches_at_the_masked_places():
    model = SelfDistillation(TINY, tiny_method())
    batch = random_batch()
    rows = batch.masks.flatten().nonzero().flatten()
    with torch.no_grad():
        patches = model.teacher.backbone(batch.global_crops).patches_BND.flatten(0, 1)[rows]
        expected = model.ibot_targets(model.teacher.ibot_head(patches), 0.05)
    torch.testing.assert_close(model.teacher_targets(batch, 0.05).patches_MK, expected)


def test_the_student_sees_masked_globals_and_the_teacher_does_not():
    model = SelfDistillation(TINY, tiny_method())
    batch = random_batch()
    hidden = torch.where(batch.masks.view(-1, 1, 5, 5).repeat_interleave(14, 2).repeat_interleave(14, 3), 9.0, 0.0)
    changed = Batch(batch.global_crops + hidden, batch.local_crops, batch.masks)
    with torch.no_grad():
        torch.testing.assert_close(model.student_outputs(batch).global_GBK, model.student_outputs(changed).global_GBK)
        before, after = model.teacher_targets(batch, 0.05).cls_GBK, model.teacher_targets(changed, 0.05).cls_GBK
    assert not torch.allclose(before, after)


def test_losses_without_local_crops_or_switched_off_are_absent():
    without_locals = SelfDistillation(TINY, tiny_method())
    assert without_locals(random_batch(num_local_crops=0), 0.05).keys() == {"dino_global", "ibot", "koleo"}
    quiet = tiny_method(
        dino=DinoConfig(head_n_prototypes=24, head_bottleneck_dim=8, head_hidden_dim=16, koleo_loss_weight=0.0),
        ibot=IbotConfig(loss_weight=0.0, separate_head=True),
    )
    model = SelfDistillation(TINY, quiet)
    assert model.student.ibot_head is None
    assert model(random_batch(), 0.05).keys() == {"dino_global", "dino_local"}


def test_ibot_works_without_the_cls_token_losses():
    dino = DinoConfig(loss_weight=0.0, head_n_prototypes=24, head_bottleneck_dim=8, head_hidden_dim=16, koleo_loss_weight=0.0)
    model = SelfDistillation(TINY, tiny_method(dino=dino))
    losses = model(random_batch(), 0.05)
    assert model.weighted_sum(losses).item() == pytest.approx(losses["ibot"].item())


def test_the_weighted_sum_uses_the_weights_of_the_config():
    model = SelfDistillation(TINY, tiny_method(dino=DinoConfig(loss_weight=2.0, head_n_prototypes=24)))
    losses = {
        name: torch.tensor(value) for name, value in (("dino_global", 1.0), ("dino_local", 2.0), ("ibot", 4.0), ("koleo", 8.0))
    }
    assert model.weighted_sum(losses).item() == pytest.approx(2 * 1 + 2 * 2 + 4 + 0.8)


def test_logged_values_follow_the_convention_of_the_reference():
    model = SelfDistillation(TINY, tiny_method())
    losses = {
        name: torch.tensor(value) for name, value in (("dino_global", 1.0), ("dino_local", 2.0), ("ibot", 4.0), ("koleo", 8.0))
    }
    shown = {name: value.item() for name, value in model.logged(losses).items()}
    assert shown == pytest.approx({"dino_global": 1.0, "dino_local": 2.0, "ibot": 2.0, "koleo": 0.4, "total": 5.4})


@pytest.mark.parametrize(("prototypes", "expected"), [(65_536, (9.86, 1.232, 2.77)), (131_072, (10.47, 1.309, 2.95))])
def test_uniform_values_are_those_seen_in_published_logs(prototypes, expected):
    shown = uniform_losses(MethodConfig(dino=DinoConfig(head_n_prototypes=prototypes)), 8, masked_crop_ratio=0.5)
    assert (shown["dino_local"], shown["dino_global"], shown["ibot"]) == pytest.approx(expected, abs=0.006)


def test_losses_of_a_student_with_uniform_output_have_the_announced_values():
    model = SelfDistillation(TINY, tiny_method())
    with torch.no_grad():
        for head in (model.student.dino_head, model.student.ibot_head):
            head.last_layer.parametrizations.weight.original0.zero_()
    batch = random_batch(num_images=4, num_local_crops=3)
    batch.masks[4:] = False
    batch.masks[:4, 0] = True  # half of the crops are masked, as mask_sample_probability says
    shown = model.logged(model(batch, 0.05))
    for name, value in model.uniform_losses(3).items():
        assert shown[name].item() == pytest.approx(value, rel=1e-5), name


def test_a_step_that_is_not_committed_leaves_the_centre_untouched():
    model = SelfDistillation(TINY, tiny_method(centering="centering"))
    model.teacher_targets(random_batch(), 0.05)
    assert not model.dino_targets.center.any()
    model.update_teacher(0.99)
    assert model.dino_targets.center.any()


def test_the_teacher_moves_by_the_momentum():
    model = SelfDistillation(TINY, tiny_method())
    before = copy.deepcopy(model.teacher.state_dict())
    with torch.no_grad():
        for parameter in model.student.parameters():
            parameter.add_(1)
    model.update_teacher(0.9)
    for key, value in model.teacher.state_dict().items():
        torch.testing.assert_close(value, before[key] + 0.1)
    model.update_teacher(1.0)
    for key, value in model.teacher.state_dict().items():
        torch.testing.assert_close(value, before[key] + 0.1)


def test_small_updates_of_a_bfloat16_student_reach_the_float32_average():
    average, student = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4, dtype=torch.bfloat16)
    start = average.weight.clone()
    for _ in range(10):
        move_average(average, student, 0.9999)
    expected = student.weight.float() + 0.9999**10 * (start - student.weight.float())
    torch.testing.assert_close(average.weight, expected, atol=1e-6, rtol=1e-5)
    with pytest.raises(TrainingError, match=r"kept in torch\.bfloat16; keep it in torch\.float32"):
        move_average(student, average, 0.9)


def test_autocast_and_stochastic_depth_give_finite_losses_and_gradients():
    model = SelfDistillation(TINY, tiny_method(drop_path_rate=0.4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(random_batch(), 0.05)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    model.weighted_sum(losses).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.student.parameters())


def test_training_lowers_the_loss_of_one_batch():
    torch.manual_seed(0)
    model, batch = SelfDistillation(TINY, tiny_method()), random_batch(num_images=4)
    optimizer = torch.optim.AdamW(model.student.parameters(), lr=2e-3)
    totals = []
    for _ in range(12):
        total = model.weighted_sum(model(batch, 0.07))
        totals.append(total.item())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        model.update_teacher(0.99)
    assert math.isfinite(totals[-1])
    assert totals[-1] < totals[0] - 0.3

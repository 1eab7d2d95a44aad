"""Whole training steps against the public reference implementation of DINOv2."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from heliostat.data.batch import Batch
from heliostat.models.config import BackboneConfig
from heliostat.models.names import from_fair_names
from heliostat.models.weights import load_state, submodule_state
from heliostat.training.config import DinoConfig, IbotConfig, MethodConfig, OptimConfig, TeacherConfig
from heliostat.training.engine import TorchEngine
from heliostat.training.method import SelfDistillation, masked_rows
from heliostat.training.param_groups import build_optimizer, multipliers
from heliostat.training.schedules import step_values
from heliostat.training.step import train_step

GOLDEN = Path(__file__).parents[1] / "golden"
STEP_FILES = ("steps_shared_sinkhorn", "steps_separate_sinkhorn_registers")


def golden(name):
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        meta = json.loads(str(arrays["meta"]))
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files if key != "meta"}, meta


def golden_method(arrays, meta):
    backbone = BackboneConfig(
        arch="vit_small",
        embed_dim=meta["embed_dim"],
        depth=meta["depth"],
        num_heads=meta["num_heads"],
        ffn_layer=meta["ffn"],
        img_size=meta["global_size"],
        num_register_tokens=meta["num_register_tokens"],
        interpolate_antialias=meta["num_register_tokens"] > 0,
        interpolate_offset=0.0 if meta["num_register_tokens"] else 0.1,
    )
    method = MethodConfig(
        drop_path_rate=meta["drop_path"],
        student_temp=meta["student_temp"],
        centering=meta["centering"],
        dino=DinoConfig(
            head_n_prototypes=meta["dino_prototypes"],
            head_bottleneck_dim=meta["dino_head_bottleneck"],
            head_hidden_dim=meta["dino_head_hidden"],
            koleo_loss_weight=meta["koleo_weight"],
        ),
        ibot=IbotConfig(
            separate_head=not meta["head_shared"],
            head_n_prototypes=meta["ibot_prototypes"],
            head_bottleneck_dim=meta["ibot_head_bottleneck"],
            head_hidden_dim=meta["ibot_head_hidden"],
        ),
        teacher=TeacherConfig(warmup_teacher_temp_steps=3),
    )
    model = SelfDistillation(backbone, method)
    load_state(model.student, from_fair_names(submodule_state(arrays, "student0")), "golden student")
    load_state(model.teacher, from_fair_names(submodule_state(arrays, "teacher0")), "golden teacher")
    return model


def golden_optim(meta):
    return OptimConfig(
        lr=meta["base_lr"],
        scaling_rule="none",
        warmup_steps=meta["warmup_iterations"],
        min_lr=meta["min_lr"],
        weight_decay=meta["weight_decay"][0],
        weight_decay_end=meta["weight_decay"][1],
        clip_grad=meta["clip_grad"],
        freeze_last_layer_steps=meta["freeze_last_layer_iterations"],
        layerwise_decay=meta["layerwise_decay"],
        patch_embed_lr_mult=meta["patch_embed_lr_mult"],
    )


def largest_difference(module, expected):
    """Largest absolute difference, without the bias of attention keys.

    A constant added to all keys shifts every attention score of a query alike, so that bias has gradient 0 up to rounding, and
    AdamW turns the sign of the rounding into steps of the size of the learning rate. No two implementations agree on it.
    """
    state = {key: value.clone() for key, value in module.state_dict().items()}
    expected = {key: value.clone() for key, value in from_fair_names(expected).items()}
    assert state.keys() == expected.keys()
    for key, value in state.items():
        if key.endswith("qkv.bias"):
            width = len(value) // 3
            assert (value - expected[key]).abs().max() < 4 * 0.002  # four steps of at most the learning rate
            value[width : 2 * width] = expected[key][width : 2 * width] = 0
    return max(float((state[key] - expected[key]).abs().max()) for key in state)


def check_step(result, arrays, prefix, method):
    """Every loss term and gradient norm of one golden step."""
    weights = {"koleo": method.dino.koleo_loss_weight, "ibot": method.ibot.loss_weight}
    for name, key in (
        ("dino_local", "dino_local"),
        ("dino_global", "dino_global"),
        ("koleo", "koleo_backpropagated"),
        ("ibot", "ibot_backpropagated"),
    ):
        term = result.losses[name].item() * weights.get(name, 1.0)
        # KoLeo is a difference of logarithms near 0, where a relative bound means nothing.
        assert term == pytest.approx(arrays[f"{prefix}.{key}"].item(), rel=1e-5, abs=2e-6), (prefix, name)
    assert result.total.item() == pytest.approx(arrays[f"{prefix}.total"].item(), rel=1e-5)
    for child, norm in result.gradient_norms.items():
        assert norm == pytest.approx(arrays[f"{prefix}.grad_norm.{child}"].item(), rel=1e-4), (prefix, child)


@pytest.mark.parametrize("name", STEP_FILES)
def test_four_training_steps_equal_the_reference(name):
    arrays, meta = golden(name)
    model, optim = golden_method(arrays, meta), golden_optim(meta)
    optimizer = build_optimizer(model.networks, optim)
    engine = TorchEngine(model, optimizer, clip_grad=optim.clip_grad, keep_gradients=True)
    schedule = {"total_steps": meta["total_iterations"], "global_batch_size": meta["batch"]}
    for step in range(meta["steps"]):
        prefix = f"step{step}"
        values = step_values(step, optim=optim, teacher=model.method.teacher, **schedule)
        for name_of_value in ("lr", "last_layer_lr", "weight_decay", "momentum", "teacher_temp"):
            expected = arrays[f"{prefix}.{name_of_value}"].item()
            assert getattr(values, name_of_value) == pytest.approx(expected, rel=1e-12, abs=1e-15)
        crops = (arrays[f"{prefix}.{crop}_crops"].float() for crop in ("global", "local"))
        batch = Batch(*crops, arrays[f"{prefix}.masks"])
        assert torch.equal(masked_rows(batch.masks), arrays[f"{prefix}.mask_indices"])
        check_step(train_step(model, optimizer, engine, batch, values), arrays, prefix, model.method)
        if step == 0:
            gradients = {key: parameter.grad for key, parameter in model.student.named_parameters()}
            expected = from_fair_names(submodule_state(arrays, "clipped_grad0"))
            assert gradients.keys() == expected.keys()
            for key, gradient in gradients.items():
                torch.testing.assert_close(gradient, expected[key], atol=1e-5, rtol=1e-4, msg=lambda m, k=key: f"{k}: {m}")
    for role, network in (("studentN", model.student), ("teacherN", model.teacher)):
        for child, module in network.named_children():
            assert largest_difference(module, submodule_state(arrays, f"{role}.{child}")) < 1e-4, (role, child)


@pytest.mark.parametrize("name", STEP_FILES)
def test_parameter_multipliers_equal_the_reference(name):
    arrays, meta = golden(name)
    model = golden_method(arrays, meta)
    expected = from_fair_names(meta["param_multipliers"])
    for key, _ in model.student.named_parameters():
        found = multipliers(key, meta["depth"], golden_optim(meta))
        assert [*found[:2], float(found.is_last_layer)] == pytest.approx(expected[key]), key
    assert expected.keys() == dict(model.student.named_parameters()).keys()

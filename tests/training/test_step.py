"""The step function: equal over any number of processes, and untouched by what is not finite."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from heliostat.data.batch import Batch
from heliostat.errors import DataError
from heliostat.models.config import BackboneConfig
from heliostat.training.config import DinoConfig, IbotConfig, MethodConfig, OptimConfig, TeacherConfig
from heliostat.training.engine import TorchEngine
from heliostat.training.method import SelfDistillation
from heliostat.training.param_groups import build_optimizer
from heliostat.training.schedules import step_values
from heliostat.training.step import train_step
from heliostat.training.world import World

TINY = BackboneConfig(arch="vit_small", embed_dim=32, depth=2, num_heads=4, img_size=28, layerscale=0.5)
OPTIM = OptimConfig(lr=1e-3, scaling_rule="none", warmup_steps=1, freeze_last_layer_steps=1, clip_grad=0.3)

# Runs steps on the rows of one rank; rank 0 of one process has all rows.
RANK = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, {folder!r})
from test_step import make_model, steps_of

rank, size, folder, centering = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{{folder}}/store{{size}}", rank=rank, world_size=size)
torch.save(steps_of(make_model(centering), rank, size), f"{{folder}}/{{size}}-{{rank}}.pt")
dist.destroy_process_group()
"""


def make_model(centering="sinkhorn_knopp", **changes):
    torch.manual_seed(0)
    method = MethodConfig(
        drop_path_rate=0.0,
        centering=centering,
        dino=DinoConfig(head_n_prototypes=24, head_bottleneck_dim=8, head_hidden_dim=16, koleo_loss_distributed=True),
        ibot=IbotConfig(separate_head=True, head_n_prototypes=20, head_bottleneck_dim=8, head_hidden_dim=16),
        **changes,
    )
    return SelfDistillation(TINY, method)


def rows_of(crops, num_images, rank, size):
    """The rank's images out of crop-major rows."""
    own = num_images // size
    return crops.unflatten(0, (-1, num_images))[:, rank * own : (rank + 1) * own].flatten(0, 1)


def make_engine(model, world, **options):
    optimizer = build_optimizer(model.networks, OPTIM)
    return optimizer, TorchEngine(model, optimizer, clip_grad=OPTIM.clip_grad, world=world, **options)


def values_of(step):
    return step_values(step, optim=OPTIM, teacher=TeacherConfig(), total_steps=4, global_batch_size=4)


def batch_of(step, rank, size):
    generator = torch.Generator().manual_seed(step)
    crops = torch.randn(2 * 4, 3, 28, 28, generator=generator)
    local = torch.randn(2 * 4, 3, 14, 14, generator=generator)
    masks = torch.rand(2 * 4, 4, generator=generator) < 0.4
    return Batch(*(rows_of(each, 4, rank, size) for each in (crops, local, masks)))


def steps_of(model, rank, size):
    """Three steps; losses, gradient norms, and the state after them."""
    world = World(rank, size)
    optimizer, engine = make_engine(model, world)
    losses, norms = [], []
    for step in range(3):
        result = train_step(model, optimizer, engine, batch_of(step, rank, size), values_of(step))
        losses.append({name: float(loss) for name, loss in result.losses.items()})
        norms.append(result.gradient_norms)
    return losses, norms, model.state_dict()


@pytest.mark.parametrize("centering", ["sinkhorn_knopp", "centering"])
def test_two_processes_make_the_step_of_one_on_the_joined_batch(tmp_path, centering):
    script = RANK.format(folder=str(Path(__file__).parent))
    arguments = [[str(rank), "2", str(tmp_path), centering] for rank in range(2)]
    ranks = [subprocess.Popen([sys.executable, "-c", script, *words]) for words in arguments]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    first, second = (torch.load(tmp_path / f"2-{rank}.pt", weights_only=True) for rank in range(2))
    losses, norms, state = steps_of(make_model(centering), 0, 1)
    for step in range(3):
        for name, whole in losses[step].items():
            assert (first[0][step][name] + second[0][step][name]) / 2 == pytest.approx(whole, rel=1e-5, abs=1e-6), (step, name)
        for name, norm in norms[step].items():
            assert first[1][step][name] == pytest.approx(norm, rel=1e-4), (step, name)
            assert first[1][step][name] == second[1][step][name]
    for key, value in state.items():
        assert torch.equal(first[2][key], second[2][key]), key
        if not key.endswith("qkv.bias"):  # keys' bias has no gradient but rounding, which AdamW turns into steps
            torch.testing.assert_close(first[2][key], value, atol=1e-5, rtol=1e-4, msg=lambda text, key=key: f"{key}: {text}")


def test_clipped_gradients_can_be_kept_for_a_look():
    model = make_model()
    optimizer, engine = make_engine(model, World(), keep_gradients=True)
    kept = []
    for step in range(2):
        result = train_step(model, optimizer, engine, batch_of(step, 0, 1), values_of(step))
        kept.append(model.student.backbone.norm.weight.grad.clone())
        norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in model.student.backbone.parameters()]))
        assert float(norm) == pytest.approx(min(OPTIM.clip_grad, result.gradient_norms["backbone"]), rel=1e-4)
    plain = make_model()
    optimizer, engine = make_engine(plain, World())
    for step in range(2):
        train_step(plain, optimizer, engine, batch_of(step, 0, 1), values_of(step))
    assert all(parameter.grad is None for parameter in plain.student.parameters())
    assert not torch.equal(*kept)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_step_that_is_not_finite_changes_nothing_and_names_the_loss():
    model = make_model("centering")
    optimizer, engine = make_engine(model, World())
    train_step(model, optimizer, engine, batch_of(0, 0, 1), values_of(0))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batch = batch_of(1, 0, 1)
    batch.local_crops[0, 0, 0, 0] = float("nan")
    result = train_step(model, optimizer, engine, batch, values_of(1))
    assert result.not_finite == ["dino_local", "total"]
    assert result.gradient_norms == {}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_frozen_backbone_has_no_gradient_and_does_not_move():
    model = make_model()
    optimizer, engine = make_engine(model, World())
    model.student.backbone.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for step in range(2):
        result = train_step(model, optimizer, engine, batch_of(step, 0, 1), values_of(step))
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert result.gradient_norms["backbone"] == 0
    assert moved
    assert all(".dino_head." in key or ".ibot_head." in key for key in moved)


def test_crops_in_bytes_are_refused():
    model = make_model()
    optimizer, engine = make_engine(model, World())
    batch = batch_of(0, 0, 1)
    raw = Batch(batch.global_crops.to(torch.uint8), batch.local_crops.to(torch.uint8), batch.masks)
    with pytest.raises(DataError, match=r"crops are torch\.uint8; normalise them first"):
        train_step(model, optimizer, engine, raw, values_of(0))

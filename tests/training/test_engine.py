"""The plain torch engine: clipping, moments, and what it gives to checkpoints and takes back."""

import math
from pathlib import Path

import pytest
import torch
from tiny_training import job, settings, shard, state_bytes, trainer

from heliostat.training.loop import one_step
from heliostat.training.pieces import share_out, whole
from heliostat.training.step import train_step
from heliostat.training.trainer import LoopState
from heliostat.training.world import World, compute_dtype, not_finite


@pytest.fixture(scope="module")
def tar() -> bytes:
    return shard()


def made_at(folder: Path, tar: bytes, *overrides: str, steps: int = 0):
    made = trainer(job(folder, settings(*overrides), tar))
    state = LoopState()
    for step in range(steps):
        one_step(made, state, made.loader.batch(step))
    return made


def total_of(made, step: int) -> torch.Tensor:
    """A loss with gradients in all networks."""
    from heliostat.data.raw_batch import crops_of

    batch = crops_of(made.loader.batch(step), made.config.crops, made.world.device)
    torch.manual_seed(step)
    result = made.engine.student_pass(batch, made.method.teacher_targets(batch, 0.05))
    return made.method.weighted_sum(result.losses)


def test_each_submodule_is_clipped_by_its_own_norm(tmp_path: Path, tar: bytes) -> None:
    made = made_at(tmp_path, tar, "optim.clip_grad=0.01")
    made.engine.backward(total_of(made, 0))
    modules = dict(made.method.student.named_children())

    def norm(module: torch.nn.Module) -> float:
        return math.sqrt(sum(float(one.grad.square().sum()) for one in module.parameters() if one.grad is not None))

    expected, clipped = {name: norm(module) for name, module in modules.items()}, {}
    made.optimizer.register_step_pre_hook(lambda *_: clipped.update({name: norm(module) for name, module in modules.items()}))
    norms = made.engine.clip_and_step()
    assert norms == pytest.approx(expected, rel=1e-5)
    assert set(norms) == {"backbone", "dino_head", "ibot_head"}
    assert all(value == pytest.approx(0.01, rel=1e-3) for value in clipped.values())
    assert all(parameter.grad is None for parameter in made.method.parameters())


def test_a_limit_of_zero_clips_nothing(tmp_path: Path, tar: bytes) -> None:
    made = made_at(tmp_path, tar, "optim.clip_grad=0")
    made.engine.backward(1e3 * total_of(made, 0))
    before = {name: one.grad.clone() for name, one in made.method.student.named_parameters() if one.grad is not None}
    seen = {}
    made.optimizer.register_step_pre_hook(
        lambda *_: seen.update({name: made.method.student.get_parameter(name).grad.clone() for name in before})
    )
    made.engine.clip_and_step()
    assert all(torch.equal(seen[name], gradient) for name, gradient in before.items())


@pytest.mark.parametrize("size", [1, 2, 3])
def test_what_the_ranks_write_is_everything_once_and_comes_back_bit_for_bit(tmp_path: Path, tar: bytes, size: int) -> None:
    made = made_at(tmp_path / "one", tar, steps=3)
    everything = made.engine.pieces()
    shares = [share_out(everything, rank, size) for rank in range(size)]
    names = [piece.name for share in shares for piece in share]
    assert sorted(names) == sorted(piece.name for piece in everything)
    largest = max(sum(piece.num_bytes for piece in share) for share in shares)
    assert largest <= sum(piece.num_bytes for piece in everything) / size + max(piece.num_bytes for piece in everything)
    held = {piece.name: piece.values.clone() for share in shares for piece in share}
    again = made_at(tmp_path / "other", tar, steps=1)
    apply = again.engine.restore(lambda name, start, count: held[name][start : start + count], held.keys())
    assert state_bytes(again.method) != state_bytes(made.method)  # nothing before it is applied
    apply()
    assert state_bytes(again.method) == state_bytes(made.method)
    for one in (made, again):
        one_step(one, LoopState(step=3), made.loader.batch(3))
    assert state_bytes(again.method) == state_bytes(made.method)


def test_a_whole_tensor_is_one_flat_piece() -> None:
    (piece,) = whole({"a": torch.arange(6.0).view(2, 3)})
    assert (piece.shape, piece.start, piece.values.tolist()) == ((2, 3), 0, [0, 1, 2, 3, 4, 5])


def test_discarded_gradients_leave_no_trace(tmp_path: Path, tar: bytes) -> None:
    made = made_at(tmp_path, tar)
    made.engine.backward(math.inf * total_of(made, 0))
    made.engine.discard()
    assert all(parameter.grad is None for parameter in made.method.parameters())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_gradients_that_are_not_finite_are_not_stepped(tmp_path: Path, tar: bytes, bad: float) -> None:
    made = made_at(tmp_path, tar)
    before = state_bytes(made.method)
    made.engine.backward(total_of(made, 0))
    next(made.method.student.dino_head.parameters()).grad[0, 0] = bad
    norms = made.engine.clip_and_step()
    assert math.isfinite(norms["backbone"])
    assert not math.isfinite(norms["dino_head"])
    assert state_bytes(made.method) == before
    assert not [piece for piece in made.engine.pieces() if piece.name.startswith("adamw/")]


@pytest.mark.parametrize("images_per_pass", [1, 2, 3, 4])
@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
def test_a_batch_in_passes_makes_the_step_of_the_whole_batch(
    tmp_path: Path, tar: bytes, images_per_pass: int, centering: str
) -> None:
    overrides = ("method.drop_path_rate=0", "method.dino.koleo_loss_weight=0", f"method.centering={centering}")
    steps = []
    for limit in (0, images_per_pass):
        made = made_at(tmp_path / str(limit), tar, *overrides)
        from heliostat.data.raw_batch import crops_of
        from heliostat.training.loop import _values

        batch = crops_of(made.loader.batch(0), made.config.crops, made.world.device)
        result = train_step(made.method, made.optimizer, made.engine, batch, _values(made, 3), images_per_pass=limit)
        steps.append((result, made))
    (one, whole_run), (parts, in_passes) = steps
    for name, loss in one.losses.items():
        torch.testing.assert_close(parts.losses[name], loss, rtol=1e-6, atol=1e-6)
    assert parts.gradient_norms == pytest.approx(one.gradient_norms, rel=1e-4)
    torch.testing.assert_close(parts.features[""], one.features[""])
    for (_, ours), (_, theirs) in zip(
        whole_run.method.teacher.named_parameters(), in_passes.method.teacher.named_parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)  # 0.1 of AdamW's step of 1e-3, whose sign noise may decide


def test_recomputed_activations_change_no_bit(tmp_path: Path, tar: bytes) -> None:
    plain = made_at(tmp_path / "plain", tar, steps=3)
    recomputed = made_at(tmp_path / "recomputed", tar, "scaling.activation_checkpointing=true", steps=3)
    assert state_bytes(recomputed.method) == state_bytes(plain.method)


def test_not_finite_names_what_is_not() -> None:
    values = {"ibot": torch.tensor(1.0), "dino": torch.tensor(math.nan), "koleo": torch.tensor([1.0, math.inf])}
    assert not_finite(values, World()) == ["dino", "koleo"]
    assert not_finite({"ibot": torch.tensor(1e38)}, World()) == []


def test_auto_computes_in_float32_on_a_cpu() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert compute_dtype("auto", cpu) == torch.float32
    assert compute_dtype("auto", cuda) == torch.bfloat16
    assert compute_dtype("bfloat16", cpu) == torch.bfloat16
    assert compute_dtype("float32", cuda) == torch.float32

"""The plain torch engine: clipping, moments, and one verdict about finiteness for all ranks."""

import math

import pytest
import torch
from torch import nn

from heliostat.training.engine import TorchEngine, World, compute_dtype, not_finite


def make_engine(clip_grad: float = 1.0) -> tuple[dict[str, nn.Linear], torch.optim.AdamW, TorchEngine]:
    torch.manual_seed(0)
    modules = {"backbone": nn.Linear(4, 3), "dino_head": nn.Linear(3, 2)}
    groups = [{"params": list(module.parameters())} for module in modules.values()]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    return modules, optimizer, TorchEngine(modules, optimizer, clip_grad=clip_grad, world=World(), dtype=torch.float32)


def loss_of(modules: dict[str, nn.Linear], scale: float = 1.0) -> torch.Tensor:
    inputs = torch.linspace(-1, 1, 20).view(5, 4)
    return scale * modules["dino_head"](modules["backbone"](inputs)).square().sum()


def test_each_submodule_is_clipped_by_its_own_norm() -> None:
    modules, optimizer, engine = make_engine(clip_grad=0.5)
    loss_of(modules).backward()
    expected = {
        name: math.sqrt(sum(float(parameter.grad.square().sum()) for parameter in module.parameters()))
        for name, module in modules.items()
    }
    clipped = {}
    optimizer.register_step_pre_hook(
        lambda *_: clipped.update({name: [p.grad.clone() for p in module.parameters()] for name, module in modules.items()})
    )
    norms = engine.clip_and_step()
    assert norms == pytest.approx(expected, rel=1e-5)
    for gradients in clipped.values():
        assert math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients)) <= 0.5 + 1e-5
    assert all(parameter.grad is None for module in modules.values() for parameter in module.parameters())


def test_a_limit_of_zero_clips_nothing() -> None:
    modules, optimizer, engine = make_engine(clip_grad=0.0)
    engine.backward(loss_of(modules, 1e3))
    before = [parameter.grad.clone() for parameter in modules["backbone"].parameters()]
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.extend(p.grad.clone() for p in modules["backbone"].parameters()))
    engine.clip_and_step()
    assert all(torch.equal(one, other) for one, other in zip(seen, before, strict=True))


def test_the_moments_come_back_and_the_next_step_is_the_same() -> None:
    modules, _, engine = make_engine()
    for _ in range(3):
        engine.backward(loss_of(modules))
        engine.clip_and_step()
    again_modules, _, again = make_engine()
    for name, module in modules.items():
        again_modules[name].load_state_dict(module.state_dict())
    again.load_optimizer_tensors({name: value.clone() for name, value in engine.optimizer_tensors().items()})
    for one, parts in ((engine, modules), (again, again_modules)):
        one.backward(loss_of(parts))
        one.clip_and_step()
    for name, module in modules.items():
        for ours, theirs in zip(module.parameters(), again_modules[name].parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_discarded_gradients_leave_no_trace() -> None:
    modules, _, engine = make_engine()
    engine.backward(loss_of(modules, math.inf))
    engine.discard()
    assert all(parameter.grad is None for module in modules.values() for parameter in module.parameters())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_gradients_that_are_not_finite_are_not_stepped(bad: float) -> None:
    modules, _, engine = make_engine()
    before = {name: [p.detach().clone() for p in module.parameters()] for name, module in modules.items()}
    engine.backward(loss_of(modules))
    next(modules["dino_head"].parameters()).grad[0, 0] = bad
    norms = engine.clip_and_step()
    assert math.isfinite(norms["backbone"])
    assert not math.isfinite(norms["dino_head"])
    for name, module in modules.items():
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(module.parameters(), before[name], strict=True))
        assert all(parameter.grad is None for parameter in module.parameters())
    assert engine.optimizer_tensors() == {}


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

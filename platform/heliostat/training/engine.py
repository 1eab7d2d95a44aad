"""EDGE to the optimizer's back end: gradients in, weights out, over one process or many.

`TorchEngine` keeps weights, gradients and AdamW moments whole on every rank and averages gradients over the ranks.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from heliostat.errors import CheckpointError


@dataclass(frozen=True)
class World:
    """The place of one process among the training processes."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes."""
        return self.rank == 0


class Engine(Protocol):
    """What a training step asks of a back end."""

    @property
    def world(self) -> World:
        """The processes that gradients are averaged over."""

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The context in which forward passes run."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of a scalar."""

    def clip_and_step(self) -> dict[str, float]:
        """Average over ranks, clip each sub-module, step; returns the norms before clipping by sub-module.

        A norm that is not finite (it is the same on every rank) means that no step was made and the gradients are dropped.
        """

    def discard(self) -> None:
        """Drop the gradients: nothing of this step remains."""

    def whole_state(self, module: nn.Module) -> dict[str, Tensor]:
        """A network's state in float32, whole, on the main rank; empty on the others. Every rank calls it."""

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimizer's state as named tensors."""

    def load_optimizer_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `optimizer_tensors` gave."""


class TorchEngine:
    """Plain torch: replicated weights, float32 or bfloat16 autocast, gradient averaging over the default process group."""

    def __init__(
        self,
        submodules: Mapping[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        *,
        clip_grad: float,
        world: World,
        dtype: torch.dtype,
        keep_gradients: bool = False,
    ) -> None:
        """`submodules` are clipped one by one. keep_gradients leaves the clipped ones in place until the next backward."""
        self._submodules = dict(submodules)
        self._optimizer = optimizer
        self._clip_grad = clip_grad
        self._world = world
        self._dtype = dtype
        self._keep_gradients = keep_gradients

    @property
    def world(self) -> World:
        return self._world

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        return torch.autocast(self._world.device.type, dtype=self._dtype, enabled=self._dtype != torch.float32)

    def _parameters(self) -> Iterator[nn.Parameter]:
        for group in self._optimizer.param_groups:
            yield from (parameter for parameter in group["params"] if parameter.requires_grad)

    def backward(self, loss: Tensor) -> None:
        if self._keep_gradients:
            self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]

    def clip_and_step(self) -> dict[str, float]:
        self._average_gradients()
        norms = {}
        for name, module in self._submodules.items():
            limit = self._clip_grad or math.inf
            norms[name] = float(nn.utils.clip_grad_norm_(module.parameters(), limit))
        if all(math.isfinite(norm) for norm in norms.values()):
            self._optimizer.step()
        if not self._keep_gradients:
            self._optimizer.zero_grad(set_to_none=True)
        return norms

    def discard(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def _average_gradients(self) -> None:
        if self._world.size == 1:
            return
        # One flat buffer: a single collective costs less than one per parameter, and every rank sums in the same order.
        gradients = [
            parameter.grad if parameter.grad is not None else torch.zeros_like(parameter) for parameter in self._parameters()
        ]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        flat.div_(self._world.size)
        offset = 0
        for parameter in self._parameters():
            parameter.grad = flat[offset : offset + parameter.numel()].view_as(parameter)
            offset += parameter.numel()

    def whole_state(self, module: nn.Module) -> dict[str, Tensor]:
        return module.state_dict() if self._world.is_main else {}

    def optimizer_tensors(self) -> dict[str, Tensor]:
        state = self._optimizer.state_dict()["state"]
        return {f"{index}.{name}": value for index, values in state.items() for name, value in values.items()}

    def load_optimizer_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            index, _, name = key.partition(".")
            state.setdefault(int(index), {})[name] = value
        self._optimizer.load_state_dict({"state": state, "param_groups": self._optimizer.state_dict()["param_groups"]})


def build_engine(
    networks: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    *,
    clip_grad: float,
    world: World | None = None,
    dtype: torch.dtype = torch.float32,
    keep_gradients: bool = False,
) -> TorchEngine:
    """The engine of a method's networks; children are clipped one by one: `backbone`, `dino_head`, `small/backbone` ..."""
    submodules = {
        f"{name}/{child}" if name else child: module
        for name, network in networks.items()
        for child, module in network.named_children()
    }
    world = world or World()
    return TorchEngine(submodules, optimizer, clip_grad=clip_grad, world=world, dtype=dtype, keep_gradients=keep_gradients)


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of forward passes: `auto` is bfloat16 on CUDA and float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def not_finite(values: Mapping[str, Tensor], world: World) -> list[str]:
    """Names of values that are not finite, with the ranks where: the same list on every rank."""
    names = sorted(values)
    bad_V = torch.stack([~torch.isfinite(values[name].detach()).all() for name in names]).to(torch.float32)
    if world.size == 1:
        return [name for name, flag in zip(names, bad_V.tolist(), strict=True) if flag]
    ranks = [torch.empty_like(bad_V) for _ in range(world.size)]
    dist.all_gather(ranks, bad_V)
    found = []
    for name, flags in zip(names, torch.stack(ranks, 1).tolist(), strict=True):
        where = [str(rank) for rank, flag in enumerate(flags) if flag]
        if where:
            shown = ", ".join(where[:4]) + (f" and {len(where) - 4} more" if len(where) > 4 else "")
            found.append(f"{name} (rank {shown})")
    return found


def refuse_different_steps(step: int, world: World) -> None:
    """Raise CheckpointError on every rank unless all of them go on from the same step (one may have failed to read a file)."""
    if world.size == 1:
        return
    lowest_highest = torch.tensor([-step, step], device=world.device)
    dist.all_reduce(lowest_highest, op=dist.ReduceOp.MAX)
    lowest, highest = -int(lowest_highest[0]), int(lowest_highest[1])
    if lowest != highest:
        raise CheckpointError(f"ranks found different newest checkpoints, steps {lowest} and {highest}; run the command again")

"""What a training step asks of the optimizer's back end, and the one that keeps weights whole on every rank.

`TorchEngine` averages gradients over the ranks while the backward pass goes on; alone it is plain torch.
`zero_engine.ZeroEngine` shards moments, gradients and weights.
"""

import contextlib
import math
from collections.abc import Callable, Collection
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from heliostat.data.batch import Batch
from heliostat.training.gradient_average import GradientAverage
from heliostat.training.method import Method, TeacherTargets, move_average
from heliostat.training.pieces import Piece, ReadPiece, moment_name, share_out, whole
from heliostat.training.student_pass import PassResult, StudentPass
from heliostat.training.world import World

MOMENT_NAMES = ("exp_avg", "exp_avg_sq", "step")
"""AdamW's tensors of a parameter: two of its shape, and a count."""


class Engine(Protocol):
    """What a training step asks of a back end."""

    @property
    def world(self) -> World:
        """The processes that gradients are averaged over."""

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The context in which forward passes run."""

    def student_pass(self, batch: Batch, teacher: TeacherTargets) -> PassResult:
        """Forward of the trained networks; its losses are ready for `backward`."""

    def backward(self, loss: Tensor, *, is_last: bool = True) -> None:
        """Add the gradients of a scalar. is_last: no other pass of this step follows, gradients are averaged over the ranks."""

    def clip_and_step(self) -> dict[str, float]:
        """Clip each sub-module, step; returns the norms before clipping by sub-module.

        A norm that is not finite (it is the same on every rank) means that no step was made and the gradients are dropped.
        """

    def discard(self) -> None:
        """Drop the gradients: nothing of this step remains."""

    def move_average(self, average: nn.Module, source: nn.Module, momentum: float) -> None:
        """average = momentum * average + (1 - momentum) * source over all parameters, in float32, without communication."""

    def whole_state(self, module: nn.Module) -> dict[str, Tensor]:
        """A network's state in float32, whole, on the main rank; empty on the others. Every rank calls it."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Whole shapes of weights, averages and centres by name, as checkpoints hold them."""

    def pieces(self) -> list[Piece]:
        """What this rank has to write of weights, averages, moments and centres: together all of it, each element once."""

    def restore(self, read: ReadPiece, names: Collection[str]) -> Callable[[], None]:
        """Read what `pieces` of any engine and any number of ranks gave; `names` are those of all its tensors.

        Nothing changes until the function that is returned is called. Raises what `read` raises.
        """


class TorchEngine:
    """Plain torch: replicated float32 weights, float32 or bfloat16 autocast, gradients averaged in float32."""

    def __init__(
        self,
        method: Method,
        optimizer: torch.optim.Optimizer,
        *,
        clip_grad: float,
        world: World | None = None,
        dtype: torch.dtype = torch.float32,
        keep_gradients: bool = False,
    ) -> None:
        """Children of the method's networks are clipped one by one: `backbone`, `dino_head`, `small/backbone` ...

        keep_gradients leaves the clipped gradients in place until the next backward pass.
        """
        self._method = method
        self._optimizer = optimizer
        self._clip_grad = clip_grad
        self._world = world or World()
        self._dtype = dtype
        self._keep_gradients = keep_gradients
        self._has_gradients = False
        self._pass = StudentPass(method)
        self._average = GradientAverage(self._pass.parameters(), self._world.size)

    @property
    def world(self) -> World:
        return self._world

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        return torch.autocast(self._world.device.type, dtype=self._dtype, enabled=self._dtype != torch.float32)

    def student_pass(self, batch: Batch, teacher: TeacherTargets) -> PassResult:
        return PassResult(*self._pass(batch, teacher))

    def backward(self, loss: Tensor, *, is_last: bool = True) -> None:
        if not self._has_gradients:
            self._optimizer.zero_grad(set_to_none=True)
        self._has_gradients = True
        self._average.begin(is_last=is_last)
        loss.backward()  # type: ignore[no-untyped-call]
        self._average.finish()

    def clip_and_step(self) -> dict[str, float]:
        norms = {}
        for name, module in clipped_modules(self._method).items():
            limit = self._clip_grad or math.inf
            norms[name] = float(nn.utils.clip_grad_norm_(module.parameters(), limit))
        if all(math.isfinite(norm) for norm in norms.values()):
            self._optimizer.step()
        if not self._keep_gradients:
            self._optimizer.zero_grad(set_to_none=True)
        self._has_gradients = False
        return norms

    def discard(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        self._has_gradients = False

    def move_average(self, average: nn.Module, source: nn.Module, momentum: float) -> None:
        move_average(average, source, momentum)

    def whole_state(self, module: nn.Module) -> dict[str, Tensor]:
        return module.state_dict() if self._world.is_main else {}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in saved_tensors(self._method).items()}

    def pieces(self) -> list[Piece]:
        tensors = saved_tensors(self._method)
        for name, parameter in trained_parameters(self._method).items():
            state = self._optimizer.state.get(parameter, {})
            tensors |= {moment_name(moment, name): state[moment] for moment in MOMENT_NAMES if moment in state}
        return share_out(whole(tensors), self._world.rank, self._world.size)

    def restore(self, read: ReadPiece, names: Collection[str]) -> Callable[[], None]:
        found = [(tensor, read(name, 0, tensor.numel())) for name, tensor in saved_tensors(self._method).items()]
        trained, moments = trained_parameters(self._method), dict[nn.Parameter, dict[str, Tensor]]()
        for moment in MOMENT_NAMES:
            for name, parameter in trained.items():
                key = moment_name(moment, name)
                if key in names:  # a parameter that had no gradient yet has no moments
                    values = read(key, 0, 1 if moment == "step" else parameter.numel())
                    shape = () if moment == "step" else parameter.shape
                    moments.setdefault(parameter, {})[moment] = values.view(shape).to(parameter.device)

        def apply() -> None:
            for tensor, values in found:
                tensor.detach().view(-1).copy_(values)
            self._optimizer.state.clear()
            self._optimizer.state.update(cast("dict[Tensor, Any]", moments))

        return apply


def clipped_modules(method: Method) -> dict[str, nn.Module]:
    """The modules that are clipped by themselves: children of the networks, `<network>/<child>` where that has a name."""
    return {
        f"{name}/{child}" if name else child: module
        for name, network in method.networks.items()
        for child, module in network.named_children()
    }


def trained_parameters(method: Method) -> dict[str, nn.Parameter]:
    """Parameters of the trained networks by their names in the method."""
    own = {parameter for network in method.networks.values() for parameter in network.parameters()}
    return {name: parameter for name, parameter in method.named_parameters() if parameter in own}


def saved_tensors(method: Method) -> dict[str, Tensor]:
    """What changes while a method trains, by name: all weights and centres but those of a frozen teacher."""
    return {name: tensor for name, tensor in method.state_dict(keep_vars=True).items() if not method.is_frozen(name)}

"""EDGE to DeepSpeed: moments, gradients and, in stage 3, weights are shards of float32 tensors over the ranks.

Weights stay in float32; with bfloat16 compute the parameters of the backbone's linear and convolution layers travel in bfloat16
between the ranks, and so do their gradients, while heads, norms and tokens travel in float32. Teacher and averages are modules
of their own that stage 3 shards exactly as the student: an average moves shard by shard without any communication.
"""

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from heliostat.data.batch import Batch
from heliostat.errors import TrainingError
from heliostat.models.blocks import Block
from heliostat.training.engine import MOMENT_NAMES, clipped_modules, saved_tensors, trained_parameters
from heliostat.training.method import Method, Network, TeacherTargets, move_average
from heliostat.training.pieces import Piece, ReadPiece, moment_name, share_out, whole
from heliostat.training.student_pass import PassResult, StudentPass
from heliostat.training.world import World

_FRAGMENT = "_hp_mapping"  # in stages 1 and 2: where the optimizer's part of a parameter lies, None where it has none
_GATHER_ELEMENTS = 2**24  # of each rank at a time, where a whole network is put together for the main rank


def _deepspeed(device: torch.device) -> Any:
    """The library, quiet, for the right accelerator and without operations that it would have to compile."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # Ray Train sets it; DeepSpeed refuses to start without
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, 40 to 100 s (measured)
    return deepspeed


def zero_settings(stage: int, *, images_per_pass: int, block_elements: int, dtype: torch.dtype, on_gpu: bool) -> dict[str, Any]:
    """DeepSpeed's configuration.

    A ViT is many small blocks. Each is fetched as a whole (`set_z3_leaf_modules`), so that its ten or more tensors cost one
    all-gather instead of one each; two are fetched ahead; about four are alive at once, and none is kept from the forward for
    the backward pass, which is what ZeRO-3 is for (DeepSpeed's default of 1e9 elements would keep a ViT-g whole). Nothing
    persists on all ranks: student and teacher must have the same shards, and a persistent weight of the teacher goes stale.
    """
    zero: dict[str, Any] = {"stage": stage, "contiguous_gradients": True, "overlap_comm": on_gpu, "reduce_bucket_size": 2**26}
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": 2 * block_elements,
            "stage3_max_live_parameters": 4 * block_elements,
            "stage3_max_reuse_distance": block_elements,
            "stage3_param_persistence_threshold": 0,
        }
    return {
        "train_micro_batch_size_per_gpu": images_per_pass,
        "gradient_accumulation_steps": 1,  # passes are counted by the training step, which says which is the last
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # each sub-module is clipped by itself, below
        "torch_autocast": {
            "enabled": dtype != torch.float32,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],  # see `_mark_travelling`
        },
        "wall_clock_breakdown": False,
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the library says of its own settings and of PyTorch's future away from the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _mark_travelling(networks: Iterable[Network], dtype: torch.dtype) -> None:
    """Have the large weights of backbones travel in the compute dtype; heads keep float32, as in DINOv2."""
    if dtype == torch.float32:
        return
    for network in networks:
        for module in network.backbone.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                for parameter in module.parameters(recurse=False):
                    parameter.comm_dtype = dtype  # type: ignore[attr-defined]  # DeepSpeed's own mark


@dataclass(frozen=True)
class _Location:
    """`count` elements from `start` of a flattened parameter, at `offset` of one of the optimizer's flat tensors."""

    flat: Tensor
    offset: int
    start: int
    count: int

    def of(self, values: Tensor) -> Tensor:
        """The parameter's elements of a tensor as long as the flat one."""
        return values.detach().narrow(0, self.offset, self.count)


def shard(parameter: Any) -> Tensor:
    """This rank's float32 elements of a parameter in stage 3, padded to equal size: what the optimizer wrote last."""
    values: Tensor = parameter.ds_tensor.data
    return values


class ZeroEngine:
    """DeepSpeed ZeRO stage 1, 2 or 3 around the trained networks of a method."""

    def __init__(
        self,
        method: Method,
        optimizer: torch.optim.Optimizer,
        *,
        stage: int,
        clip_grad: float,
        world: World,
        dtype: torch.dtype,
        images_per_pass: int,
    ) -> None:
        """Take over method and optimizer: in stage 3 the weights of all their networks become shards.

        Needs an initialised process group. Raises TrainingError without one.
        """
        if not dist.is_initialized():
            raise TrainingError(f"scaling.parallel=zero{stage} needs training processes; set scaling.num_workers to 1 or more")
        self._method, self._optimizer, self._stage = method, optimizer, stage
        self._clip_grad, self._world, self._dtype = clip_grad, world, dtype
        self._trained = trained_parameters(method)
        self._shapes = {name: tuple(parameter.shape) for name, parameter in method.named_parameters()}
        block = next(iter(method.networks.values())).backbone.blocks[0]
        settings = zero_settings(
            stage,
            images_per_pass=images_per_pass,
            block_elements=sum(parameter.numel() for parameter in block.parameters()),
            dtype=dtype,
            on_gpu=world.device.type == "cuda",
        )
        _mark_travelling([*method.networks.values(), *method.teachers], dtype)
        deepspeed, student_pass = _deepspeed(world.device), StudentPass(method)
        with _quiet():
            if stage == 3:
                for module in dict.fromkeys(
                    (student_pass, *method.teachers, *method.results.values())
                ):  # in one order everywhere
                    deepspeed.utils.set_z3_leaf_modules(module, [Block])
                    deepspeed.zero.Init(module=module, config_dict_or_path=settings)  # one by one, never whole on the device
            self._engine, *_ = deepspeed.initialize(model=student_pass, optimizer=optimizer, config=settings)
            if stage == 3:  # an engine without optimizer: it fetches the teacher's shards while the teacher computes
                self._teachers = [deepspeed.initialize(model=teacher, config=settings)[0] for teacher in method.teachers]

    @property
    def world(self) -> World:
        return self._world

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        return torch.autocast(self._world.device.type, dtype=self._dtype, enabled=self._dtype != torch.float32)

    def student_pass(self, batch: Batch, teacher: TeacherTargets) -> PassResult:
        return PassResult(*self._engine(batch, teacher))

    def backward(self, loss: Tensor, *, is_last: bool = True) -> None:
        self._engine.set_gradient_accumulation_boundary(is_last)
        self._engine.backward(loss, scale_wrt_gas=False)

    def _gradients(self) -> Iterator[tuple[str, Tensor]]:
        """(sub-module, this rank's shard of a gradient) of every group of the optimizer."""
        zero = self._engine.optimizer
        for number, gradients in zero.averaged_gradients.items():
            group = zero.sub_group_to_group_id[number] if self._stage == 3 else number
            for gradient in gradients or ():
                yield self._optimizer.param_groups[group]["submodule"], gradient

    def clip_and_step(self) -> dict[str, float]:
        names = list(clipped_modules(self._method))
        squares = torch.zeros(len(names), device=self._world.device)
        for name, gradient in self._gradients():
            squares[names.index(name)] += gradient.float().square().sum()
        dist.all_reduce(squares)
        norms = dict(zip(names, squares.sqrt().tolist(), strict=True))
        if not all(math.isfinite(norm) for norm in norms.values()):
            self.discard()
            return norms
        if self._clip_grad:
            for name, gradient in self._gradients():
                gradient.mul_(min(1.0, self._clip_grad / (norms[name] + 1e-6)))
        self._engine.step()
        self._hold_back_frozen()
        return norms

    def _hold_back_frozen(self) -> None:
        """Frozen parameters made no step, as in plain torch: the count that corrects AdamW's moments stays where it was."""
        frozen = [parameter for parameter in self._trained.values() if not parameter.requires_grad]
        locations = [location for location in map(self._location, frozen) if location is not None]
        for flat in {location.flat for location in locations}:
            self._optimizer.state[flat]["step"].sub_(1)

    def discard(self) -> None:
        zero = self._engine.optimizer
        zero.zero_grad()
        for held in (zero.averaged_gradients, getattr(zero, "all_grad_tensors", {})):
            for number in list(held):
                held[number] = None

    def move_average(self, average: nn.Module, source: nn.Module, momentum: float) -> None:
        if self._stage < 3:
            move_average(average, source, momentum)
            return
        averages = [shard(parameter) for parameter in average.parameters()]
        sources = [shard(parameter) for parameter in source.parameters()]
        torch._foreach_lerp_(averages, sources, 1 - momentum)

    def whole_state(self, module: nn.Module) -> dict[str, Tensor]:
        if self._stage < 3:
            return module.state_dict() if self._world.is_main else {}
        found = {name: buffer.detach() for name, buffer in module.named_buffers()} if self._world.is_main else {}
        waiting: list[tuple[str, Any]] = []
        for name, parameter in module.named_parameters():
            waiting.append((name, parameter))
            if sum(one.ds_tensor.numel() for _, one in waiting) > _GATHER_ELEMENTS:
                found |= self._gathered(waiting)
                waiting = []
        return found | self._gathered(waiting)

    def _gathered(self, parameters: list[tuple[str, Any]]) -> dict[str, Tensor]:
        """Whole tensors on the CPU of the main rank, from the shards of all."""
        if not parameters:
            return {}
        mine = torch.cat([shard(parameter) for _, parameter in parameters])
        shards = [torch.empty_like(mine) for _ in range(self._world.size)] if self._world.is_main else None
        dist.gather(mine, shards)
        if shards is None:
            return {}
        host, found, offset = [shard.cpu() for shard in shards], {}, 0
        for name, parameter in parameters:
            size = parameter.ds_tensor.numel()
            flat = torch.cat([shard[offset : offset + size] for shard in host])
            found[name] = flat[: parameter.ds_numel].view(parameter.ds_shape)
            offset += size
        return found

    def _location(self, parameter: Any) -> _Location | None:
        """Where this rank's optimizer holds a trained parameter; None where it holds nothing of it."""
        zero = self._engine.optimizer
        if self._stage == 3:
            group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
            start = self._world.rank * size
            count = max(0, min(size, parameter.ds_numel - start))
            return _Location(zero.fp32_partitioned_groups_flat[group], offset, start, count) if count else None
        fragment = getattr(parameter, _FRAGMENT)
        if fragment is None:
            return None
        flat = zero.single_partition_of_fp32_groups[fragment.param_group_index]
        place, source = fragment.hp_fragment_address, fragment.lp_fragment_address
        return _Location(flat, place.start, source.start, source.numel)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        found = {name: tuple(tensor.shape) for name, tensor in saved_tensors(self._method).items()}
        return found | {name: shape for name, shape in self._shapes.items() if name in found}

    def pieces(self) -> list[Piece]:
        held = []
        whole_here = {}
        for name, tensor in saved_tensors(self._method).items():
            if self._stage == 3 and isinstance(tensor, nn.Parameter):
                held += self._shard_piece(name, tensor)
            else:
                whole_here[name] = tensor
        held += share_out(whole(whole_here), self._world.rank, self._world.size)
        for name, parameter in self._trained.items():
            location = self._location(parameter)
            if location is None:
                continue
            for moment, values in self._optimizer.state.get(location.flat, {}).items():
                if moment == "step":
                    if location.start == 0:
                        held.append(Piece(moment_name(moment, name), (), 0, values.detach().view(1)))
                else:
                    held.append(Piece(moment_name(moment, name), self._shapes[name], location.start, location.of(values)))
        return held

    def _renew_masters(self) -> None:
        """Have the optimizer's float32 partitions hold the shards; on CPUs they are not the same memory."""
        for parameter in self._trained.values():
            location = self._location(parameter)
            if location is not None:
                location.of(location.flat).copy_(shard(parameter)[: location.count])

    def _shard_piece(self, name: str, parameter: Any) -> list[Piece]:
        start = self._world.rank * parameter.ds_tensor.numel()
        count = max(0, min(parameter.ds_tensor.numel(), parameter.ds_numel - start))
        values = shard(parameter)[:count]
        return [Piece(name, tuple(parameter.ds_shape), start, values)] if count else []

    def restore(self, read: ReadPiece, names: Collection[str]) -> Callable[[], None]:
        found: list[tuple[Tensor, Tensor]] = []
        for name, tensor in saved_tensors(self._method).items():
            if self._stage == 3 and isinstance(tensor, nn.Parameter):
                for piece in self._shard_piece(name, tensor):
                    found.append((piece.values, read(name, piece.start, piece.values.numel())))
            else:
                found.append((tensor.detach().view(-1), read(name, 0, tensor.numel())))
        moments: list[tuple[str, _Location, Tensor]] = []
        for moment in MOMENT_NAMES:
            for name, parameter in self._trained.items():
                location = self._location(parameter)
                if location is not None and moment_name(moment, name) in names:
                    start, count = (0, 1) if moment == "step" else (location.start, location.count)
                    moments.append((moment, location, read(moment_name(moment, name), start, count)))

        def apply() -> None:
            for target, values in found:
                target.copy_(values)
            self._optimizer.state.clear()
            for moment, location, values in moments:
                state = self._optimizer.state.setdefault(location.flat, _fresh_moments(location.flat))
                (state["step"].view(1) if moment == "step" else location.of(state[moment])).copy_(values)
            if self._stage == 3:
                self._renew_masters()
            else:
                fragments: list[Any] = [getattr(parameter, _FRAGMENT) for parameter in self._trained.values()]
                for fragment in fragments:
                    if fragment is not None:
                        fragment.update_hp()

        return apply


def _fresh_moments(flat: Tensor) -> dict[str, Tensor]:
    """AdamW's state of a flat parameter before its first step."""
    moments = {name: torch.zeros_like(flat) for name in MOMENT_NAMES if name != "step"}
    return {"step": torch.zeros((), dtype=torch.float32, device=flat.device), **moments}

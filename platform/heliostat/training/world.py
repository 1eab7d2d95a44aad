"""The processes that train together, and what they have to agree on."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor


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

    def agree(self, flags: list[bool]) -> list[bool]:
        """For each flag whether it is set on every rank: the same answer everywhere. Every rank calls it at the same point."""
        if self.size == 1:
            return flags
        votes = torch.tensor([int(flag) for flag in flags], device=self.device)
        dist.all_reduce(votes, op=dist.ReduceOp.MIN)
        return [bool(vote) for vote in votes.tolist()]

    def mean(self, values: list[float]) -> list[float]:
        """Each value's mean over the ranks, the same everywhere. Every rank calls it at the same point."""
        if self.size == 1:
            return values
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return [float(value) / self.size for value in sums.tolist()]

    def lowest(self, value: int) -> int:
        """The least value of all ranks. Every rank calls it at the same point."""
        if self.size == 1:
            return value
        least = torch.tensor([value], device=self.device)
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        return int(least)


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

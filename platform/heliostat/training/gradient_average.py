"""Gradients averaged over the ranks in float32 while the backward pass goes on, in buckets that never change.

DistributedDataParallel would do the same, but it lays its buckets anew after the first step, and with three ranks or more the
order of a sum depends on where an element lies in its bucket: a run that goes on from a checkpoint would differ in the last bit
from one that was never stopped.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_BYTES = 25 * 2**20  # DistributedDataParallel's default: large enough for the network, small enough to overlap


@dataclass
class _Bucket:
    parameters: list[nn.Parameter] = field(default_factory=list)
    waiting: int = 0
    flat: Tensor | None = None
    work: dist.Work | None = None


class GradientAverage:
    """Averages the gradients of parameters over the default process group; does nothing in a world of one."""

    def __init__(self, parameters: Iterable[nn.Parameter], world_size: int) -> None:
        """Hook into the parameters, last ones first: their gradients are ready first."""
        self._size = world_size
        self._buckets: list[_Bucket] = []
        self._bucket_of: dict[nn.Parameter, _Bucket] = {}
        self._next = 0
        self._is_on = False
        if world_size == 1:
            return
        room = 0
        for parameter in reversed(list(parameters)):
            if room <= 0:
                self._buckets.append(_Bucket())
                room = BUCKET_BYTES
            self._buckets[-1].parameters.append(parameter)
            self._bucket_of[parameter] = self._buckets[-1]
            room -= parameter.numel() * parameter.element_size()
            parameter.register_post_accumulate_grad_hook(self._arrived)  # type: ignore[no-untyped-call]

    def begin(self, *, is_last: bool) -> None:
        """Before a backward pass. Only the last pass of a step is followed by communication."""
        self._is_on = is_last and self._size > 1
        self._next = 0
        for bucket in self._buckets:
            bucket.waiting = sum(parameter.requires_grad for parameter in bucket.parameters)

    def _arrived(self, parameter: nn.Parameter) -> None:
        if not self._is_on:
            return
        self._bucket_of[parameter].waiting -= 1
        while self._next < len(self._buckets) and self._buckets[self._next].waiting == 0:
            self._send(self._buckets[self._next])

    def _send(self, bucket: _Bucket) -> None:
        """Start the sum of one bucket. All ranks send theirs in the same order, whatever order gradients came in."""
        self._next += 1
        trained = [parameter for parameter in bucket.parameters if parameter.requires_grad]
        if trained:
            gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in trained]
            bucket.flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            bucket.work = dist.all_reduce(bucket.flat, async_op=True)

    def finish(self) -> None:
        """After the last backward pass of a step: wait, and put the averages into the parameters' gradients."""
        if not self._is_on:
            return
        while self._next < len(self._buckets):
            self._send(self._buckets[self._next])  # what no gradient came for
        for bucket in self._buckets:
            if bucket.work is None or bucket.flat is None:
                continue
            bucket.work.wait()
            offset, flat = 0, bucket.flat.div_(self._size)
            for parameter in bucket.parameters:
                if parameter.requires_grad:
                    parameter.grad = flat[offset : offset + parameter.numel()].view_as(parameter)
                    offset += parameter.numel()
            bucket.flat = bucket.work = None
        self._is_on = False

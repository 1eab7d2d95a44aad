"""Batch-subset stochastic depth (section 5 of arXiv 2304.07193): a residual branch is computed for some images of a batch only.

A residual is `x, kept = take_subset(x, subset)`, the branch on the kept rows, then `add_to_subset`. Both go over the packed
sequence as seldom as PyTorch's operations allow: whole images are moved, the factor B/subset rides on the addition, and the
two gradients of x are joined by adding to the kept rows.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Shapes: S tokens of all groups, R tokens of the kept subset, B images and T tokens per image of one group, D width.


class Group(NamedTuple):
    """Images of one size inside a packed sequence: num_images * num_tokens consecutive rows."""

    num_images: int
    num_tokens: int

    @property
    def num_rows(self) -> int:
        """Rows of the packed sequence that belong to the group."""
        return self.num_images * self.num_tokens


class Subset(NamedTuple):
    """The images of each group that a residual branch is computed for: their places within the group."""

    packed: tuple[Group, ...]
    images: tuple[Tensor, ...]

    @property
    def groups(self) -> tuple[Group, ...]:
        """The kept images as a packed sequence of their own."""
        return tuple(Group(len(images), group.num_tokens) for images, group in zip(self.images, self.packed, strict=True))

    @property
    def factors(self) -> tuple[float, ...]:
        """B/subset of each group, which keeps the expectation of the residual."""
        return tuple(group.num_images / len(images) for images, group in zip(self.images, self.packed, strict=True))


def draw_subset(groups: Sequence[Group], drop_path_rate: float, device: torch.device) -> Subset:
    """Draw, in each group, the images that receive the residual.

    At least one image per group is kept (as DINOv2), so every parameter takes part in every step. Uses the global generator.
    """
    sizes = [max(int(group.num_images * (1 - drop_path_rate)), 1) for group in groups]
    images = [torch.randperm(group.num_images, device=device)[:size] for group, size in zip(groups, sizes, strict=True)]
    return Subset(tuple(groups), tuple(images))


def _images_of(x_SD: Tensor, groups: Sequence[Group]) -> list[Tensor]:
    """Views (B, T * D), one per group: whole images are moved, which needs no index per token."""
    parts = torch.split(x_SD, [group.num_rows for group in groups])
    return [part.view(group.num_images, -1) for part, group in zip(parts, groups, strict=True)]


def _copy_subset(x_SD: Tensor, subset: Subset) -> Tensor:
    """The rows of the kept images, (R, D)."""
    kept_RD = x_SD.new_empty(sum(group.num_rows for group in subset.groups), x_SD.shape[1])
    sources, targets = _images_of(x_SD.contiguous(), subset.packed), _images_of(kept_RD, subset.groups)
    for source, target, images in zip(sources, targets, subset.images, strict=True):
        torch.index_select(source, 0, images, out=target)
    return kept_RD


class _Take(torch.autograd.Function):
    """See `take_subset`."""

    @staticmethod
    def forward(context: Any, x_SD: Tensor, subset: Subset) -> tuple[Tensor, Tensor]:
        context.subset = subset
        return x_SD, _copy_subset(x_SD, subset)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient_SD: Tensor, gradient_RD: Tensor) -> tuple[Tensor, None]:
        subset, joined_SD = context.subset, gradient_SD.clone(memory_format=torch.contiguous_format)
        kept = _images_of(gradient_RD.contiguous(), subset.groups)
        for target, source, images in zip(_images_of(joined_SD, subset.packed), kept, subset.images, strict=True):
            target.index_add_(0, images, source)
        return joined_SD, None


class _Add(torch.autograd.Function):
    """See `add_to_subset`."""

    @staticmethod
    def forward(context: Any, x_SD: Tensor, branch_RD: Tensor, subset: Subset) -> Tensor:
        context.subset, context.dtype = subset, branch_RD.dtype
        sum_SD = x_SD.clone(memory_format=torch.contiguous_format)
        sources = _images_of(branch_RD.to(x_SD.dtype), subset.groups)
        places = zip(_images_of(sum_SD, subset.packed), sources, subset.images, subset.factors, strict=True)
        for target, source, images, factor in places:
            target.index_add_(0, images, source, alpha=factor)
        return sum_SD

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient_SD: Tensor) -> tuple[Tensor, Tensor, None]:
        subset = context.subset
        branch_RD = _copy_subset(gradient_SD, subset)
        for part, factor in zip(_images_of(branch_RD, subset.groups), subset.factors, strict=True):
            part.mul_(factor)
        return gradient_SD, branch_RD.to(context.dtype), None


def take_subset(x_SD: Tensor, subset: Subset) -> tuple[Tensor, Tensor]:
    """x itself and the rows of its kept images, (R, D). Go on with the x that is returned, or its gradient is not joined."""
    return _Take.apply(x_SD, subset)  # type: ignore[no-any-return, no-untyped-call]


def add_to_subset(x_SD: Tensor, branch_RD: Tensor, subset: Subset) -> Tensor:
    """x plus, in its kept rows, the branch times B/subset; in the dtype of x, which is left unchanged."""
    return _Add.apply(x_SD, branch_RD, subset)  # type: ignore[no-any-return, no-untyped-call]

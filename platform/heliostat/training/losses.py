"""The losses of DINOv2 and the targets they compare with, in float32 whatever the precision of the networks.

Losses take logits, not probabilities, and return unweighted scalars. Ranks are joined where the paper joins them: in
Sinkhorn-Knopp and in the centre; KoLeo stays inside a rank unless it is told to look further.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

# Shapes: B images, G = 2 global crops, L local crops, M masked patches, R rows of any kind, K prototypes, D width.


def _sum_over_ranks(values: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def _max_over_ranks(values: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def _top_of_rows(scores_RK: Tensor) -> Tensor:
    """Greatest value over the rows of all ranks, (1, K) in float32; a rank may hold no rows."""
    no_rows = scores_RK.shape[0] == 0
    top_1K = scores_RK.new_full((1, scores_RK.shape[1]), -math.inf) if no_rows else scores_RK.amax(0, keepdim=True)
    return _max_over_ranks(top_1K.float())


def _log_sum_of_rows(scores_RK: Tensor) -> Tensor:
    """Logarithm of the sum over the rows of all ranks, (1, K); a rank may hold no rows."""
    top_1K = _top_of_rows(scores_RK)
    return top_1K + _sum_over_ranks((scores_RK - top_1K).exp_().sum(0, keepdim=True)).log()


@torch.no_grad()
def sinkhorn_knopp(logits_RK: Tensor, temperature: float, num_iterations: int = 3) -> Tensor:
    """Targets (R, K), each row a distribution, with prototypes used about equally over the rows of all ranks.

    Three iterations as DINOv2 (arXiv 2006.09882, Algorithm 1), computed on logarithms: finite for every finite logit, where
    exponentials overflow from logit 3.6 at temperature 0.04. The constant factors of the usual form cancel and are left out.
    Every rank must call it, also with R = 0. In float32, for float64 logits in float64.
    """
    # The largest logit of each prototype is taken off before the division: the first normalisation absorbs it, and a
    # difference in float32 keeps the digits that dividing a logit of 1e4 by 0.04 would lose.
    scores_RK = (logits_RK - _top_of_rows(logits_RK)).div_(temperature)
    for _ in range(num_iterations):
        scores_RK -= _log_sum_of_rows(scores_RK)
        scores_RK = functional.log_softmax(scores_RK, dim=1)  # takes each row's log-sum-exp off in one pass
    return scores_RK.exp_()


class TargetAssignment(nn.Module):
    """Turns the teacher's logits into targets, by Sinkhorn-Knopp or by a moving centre and a softmax.

    The centre follows the mean over the rows of all ranks together (DINOv2 averages the means of the ranks, which differ in
    their number of masked patches); a batch without rows leaves it as it is. It moves only in `commit`, which the method calls
    with the teacher's update: a step that is thrown away because a loss was not finite leaves it untouched.
    """

    def __init__(self, num_prototypes: int, centering: Literal["centering", "sinkhorn_knopp"]) -> None:
        super().__init__()
        moving = centering == "centering"
        self.center: Tensor | None
        self.next_mean: Tensor | None
        self.register_buffer("center", torch.zeros(1, num_prototypes) if moving else None)
        self.register_buffer("next_mean", torch.zeros(1, num_prototypes) if moving else None, persistent=False)

    @torch.no_grad()
    def forward(self, logits_RK: Tensor, temperature: float) -> Tensor:
        """Targets (R, K) in float32. Every rank must call it, also with R = 0."""
        if self.center is None:
            return sinkhorn_knopp(logits_RK, temperature)
        logits_RK = logits_RK.float()
        num_rows = logits_RK.new_full((1, 1), logits_RK.shape[0])
        joined = _sum_over_ranks(torch.cat([logits_RK.sum(0, keepdim=True), num_rows], dim=1))
        total_1K, count_11 = joined[:, :-1], joined[:, -1:]
        self.next_mean = torch.where(count_11 > 0, total_1K / count_11.clamp(min=1), self.center)
        return torch.softmax((logits_RK - self.center) / temperature, dim=1)

    @torch.no_grad()
    def commit(self) -> None:
        """Move the centre a tenth of the way to the mean of the last batch (DINOv2: momentum 0.9)."""
        if self.center is not None and self.next_mean is not None:
            self.center.lerp_(self.next_mean, 0.1)


_BLOCK_LOGITS = 2**22  # rows are taken in blocks of about this many logits: a temporary in float32 has 16 MiB


def _blocks(logits_GRK: Tensor) -> Iterator[tuple[int, slice]]:
    num_rows = max(_BLOCK_LOGITS // logits_GRK.shape[2], 1)
    for group in range(logits_GRK.shape[0]):
        for start in range(0, logits_GRK.shape[1], num_rows):
            yield group, slice(start, start + num_rows)


class _SoftCrossEntropy(torch.autograd.Function):
    """Keeps logits and targets only, which exist anyway: the softmax is computed again for the gradient."""

    @staticmethod
    def forward(context: Any, student_GRK: Tensor, targets_GRK: Tensor, student_temp: float) -> Tensor:
        context.save_for_backward(student_GRK, targets_GRK)
        context.student_temp = student_temp
        losses_GR = student_GRK.new_empty(student_GRK.shape[:2], dtype=torch.float32)
        for block in _blocks(student_GRK):
            log_probabilities = functional.log_softmax(student_GRK[block].float() / student_temp, dim=-1)
            losses_GR[block] = log_probabilities.mul_(targets_GRK[block]).sum(-1)
        return losses_GR.neg_()

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient_GR: Tensor) -> tuple[Tensor, None, None]:
        student_GRK, targets_GRK = context.saved_tensors
        scale_GR1 = (gradient_GR / context.student_temp).unsqueeze(-1)
        result_GRK = torch.empty_like(student_GRK)
        for block in _blocks(student_GRK):
            targets, scale = targets_GRK[block], scale_GR1[block]
            softmax = torch.softmax(student_GRK[block].float() / context.student_temp, dim=-1)
            softmax.mul_(targets.sum(-1, keepdim=True) * scale)
            result_GRK[block] = softmax.addcmul_(targets, scale, value=-1)
        return result_GRK, None, None


def soft_cross_entropy(student_GRK: Tensor, targets_GRK: Tensor, student_temp: float) -> Tensor:
    """Cross-entropy of each row, (G, R), between targets and the student's softmax at student_temp, in float32.

    G may be missing, and missing in the targets alone: they then serve every group. The gradient goes to the student only, in
    its dtype.
    """
    grouped_GRK = student_GRK if student_GRK.dim() == 3 else student_GRK.unsqueeze(0)
    targets_GRK = targets_GRK.expand_as(grouped_GRK)
    losses_GR: Tensor = _SoftCrossEntropy.apply(grouped_GRK, targets_GRK, student_temp)  # type: ignore[no-untyped-call]
    return losses_GR.view(student_GRK.shape[:-1])


def dino_global_loss(student_GBK: Tensor, targets_GBK: Tensor, *, num_local_crops: int, student_temp: float) -> Tensor:
    """Each global crop against the targets of the other one: two of the 2L + 2 pairs that the cls token loss averages."""
    swapped_GBK = targets_GBK.flip(0)
    num_pairs = 2 * num_local_crops + 2
    return 2 / num_pairs * soft_cross_entropy(student_GBK, swapped_GBK, student_temp).mean()


def dino_local_loss(student_LBK: Tensor, targets_GBK: Tensor, *, student_temp: float) -> Tensor:
    """Each local crop against both global crops: 2L of the 2L + 2 pairs that the cls token loss averages."""
    num_local_crops, num_images = student_LBK.shape[:2]
    num_pairs = 2 * num_local_crops + 2
    # The student's term is the same for both targets, so their sum is compared once.
    return soft_cross_entropy(student_LBK, targets_GBK.sum(0), student_temp).sum() / (num_images * num_pairs)


def ibot_loss(student_MK: Tensor, targets_MK: Tensor, weights_M: Tensor, *, num_crops: int, student_temp: float) -> Tensor:
    """Masked patches against the teacher's tokens at the same places.

    weights_M is 1 / number of masked patches in the crop of each row. num_crops is 2B: a crop without masked patches counts in
    the mean with loss 0 (DINOv2), so with half the crops masked this is half the mean cross-entropy. M may be 0.
    """
    return (soft_cross_entropy(student_MK, targets_MK, student_temp) * weights_M).sum() / num_crops


class _RowsOfAllRanks(torch.autograd.Function):
    """Rows of every rank, in rank order; the gradient of a row comes back to its rank summed over the ranks that used it."""

    @staticmethod
    def forward(context: Any, rows_BD: Tensor) -> Tensor:
        parts = [torch.empty_like(rows_BD) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows_BD.contiguous())
        context.first, context.num_rows = dist.get_rank() * len(rows_BD), len(rows_BD)
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, gradient_RD: Tensor) -> Tensor:
        summed_RD = gradient_RD.contiguous().clone()
        dist.all_reduce(summed_RD)
        return summed_RD[context.first : context.first + context.num_rows]


def koleo_loss(cls_BD: Tensor, *, distributed: bool = False) -> Tensor:
    """Differential-entropy regulariser: mean of -log(distance to the nearest neighbour) on the unit sphere (arXiv 1806.03198).

    In float32 whatever the dtype of cls_BD, also under autocast, so two identical embeddings give a large finite loss (in
    float16 they give infinity). Neighbours are the rank's own images (DINOv2), or with `distributed` those of all ranks: the
    mean over ranks then is the loss of the joined batch, and so is its gradient. Every rank must call that with the same B.
    Where there is no other image the loss is 0.
    """
    eps = 1e-8  # DINOv2's, for the norm, inside the distance and inside the logarithm
    with torch.autocast(cls_BD.device.type, enabled=False):
        unit_BD = functional.normalize(cls_BD.float(), dim=-1, eps=eps)
        joined = distributed and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        all_RD: Tensor = _RowsOfAllRanks.apply(unit_BD) if joined else unit_BD  # type: ignore[no-untyped-call]
        if len(all_RD) < 2:
            return unit_BD.sum() * 0
        with torch.no_grad():
            similarity_BR = unit_BD @ all_RD.T
            similarity_BR.diagonal(dist.get_rank() * len(unit_BD) if joined else 0).fill_(-1)
            nearest_B = similarity_BR.argmax(dim=1)
        distance_B = functional.pairwise_distance(unit_BD, all_RD[nearest_B], p=2, eps=eps)
        return -(distance_B + eps).log().mean()

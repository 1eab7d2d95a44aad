"""Numbers that show a collapse early, as pure functions of tensors."""

import math

import torch
from torch import Tensor

# Shapes: R rows (images or tokens), D width, K prototypes.


@torch.no_grad()
def feature_std(features_RD: Tensor) -> Tensor:
    """Spread of L2-normalised features: mean over channels of their standard deviation, times the square root of D.

    1 for features in all directions alike, 0 when all images have the same feature (arXiv 2011.10566, figure 2). Needs R >= 2.
    """
    unit_RD = torch.nn.functional.normalize(features_RD.float(), dim=-1)
    return unit_RD.std(dim=0, correction=0).mean() * math.sqrt(features_RD.shape[1])


@torch.no_grad()
def rankme(features_RD: Tensor) -> Tensor:
    """Effective rank, from 1 to min(R, D): exponential of the entropy of the singular values (Eq. 1 of arXiv 2210.02885).

    NaN when any feature is NaN or infinite, as after a step that was skipped for that.
    """
    if not bool(torch.isfinite(features_RD).all()):
        return features_RD.new_tensor(math.nan)
    singular_values = torch.linalg.svdvals(features_RD.float())
    eps = 1e-7  # of the paper, for float32
    shares = singular_values / singular_values.sum().clamp(min=eps) + eps
    return torch.exp(-torch.sum(shares * shares.log()))


@torch.no_grad()
def teacher_entropy(targets_RK: Tensor) -> Tensor:
    """Mean entropy of the targets in nats: ln K when the teacher says nothing, 0 when every target is one prototype."""
    return torch.sum(torch.special.entr(targets_RK.float())) / targets_RK.shape[0]


def kl_to_teacher(dino_global: float, entropy: float, num_local_crops: int) -> float:
    """Kullback-Leibler divergence of the student from its targets in nats, mean over the global pairs; 0 when all is learnt.

    The cross-entropy is that divergence plus the targets' own entropy, which no student can get below. dino_global is the loss
    of that name, 2 of 2L + 2 pairs.
    """
    return dino_global * (2 * num_local_crops + 2) / 2 - entropy


@torch.no_grad()
def prototype_usage(targets_RK: Tensor) -> Tensor:
    """Share of the prototypes in use, from 1/K to 1: exponential of the entropy of the mean target, divided by K.

    With R rows of sharp targets it cannot exceed R / K; compare it between steps, not between batch sizes.
    """
    mean_K = targets_RK.float().mean(0)
    return torch.exp(torch.sum(torch.special.entr(mean_K))) / targets_RK.shape[1]

"""Signs of a collapse in a run's own numbers, and what to try: the answer to "is my loss normal?".

Thresholds are assumptions with a wide margin, not studied: healthy runs of ours lie far from all of them (feature_std 0.85 to
0.95, effective rank above 10, teacher entropy below 0.9 ln K).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

_LEAST_FEATURE_STD = 0.1  # at 0.1 about 99 % of every normalised feature is common to all images
_LEAST_RANKME = 1.5  # 1 is one direction for all images
_LEAST_PROTOTYPES = 1.5  # prototypes in use; 1 is one for all images
_UNIFORM_SHARE = 0.99  # of the value at uniform output, for the loss and for the teacher's entropy


@dataclass(frozen=True)
class Sign:
    """One sign of collapse: what is seen, and what to try."""

    name: str
    seen: str
    advice: str

    def __str__(self) -> str:
        return f"{self.seen}; try {self.advice}"


def collapse_signs(numbers: Mapping[str, float], *, num_prototypes: int) -> list[Sign]:
    """Signs in one record of metrics (`train/...`). Call it after the warm-ups: before them a healthy run looks collapsed too.

    A number that the record lacks, or that is not finite, gives no sign.
    """
    numbers = {name: value for name, value in numbers.items() if math.isfinite(value)}
    return [sign for sign in (_same_features(numbers), _one_prototype(numbers, num_prototypes), _uniform(numbers)) if sign]


def _same_features(numbers: Mapping[str, float]) -> Sign | None:
    spread, rank = numbers.get("train/feature_std", 1.0), numbers.get("train/rankme", 2.0)
    if spread >= _LEAST_FEATURE_STD and rank >= _LEAST_RANKME:
        return None
    return Sign(
        "features",
        f"all images have nearly the same feature (feature_std {spread:.3f}, effective rank {rank:.1f})",
        "a lower optim.lr, a longer optim.warmup_steps, a higher method.dino.koleo_loss_weight, more images per step",
    )


def _one_prototype(numbers: Mapping[str, float], num_prototypes: int) -> Sign | None:
    used = numbers.get("train/prototype_usage", 1.0) * num_prototypes
    if used >= _LEAST_PROTOTYPES:
        return None
    return Sign(
        "prototypes",
        f"the teacher puts all images on one prototype ({used:.1f} of {num_prototypes} in use)",
        "method.centering=sinkhorn_knopp, a higher method.teacher.warmup_teacher_temp, a lower optim.lr",
    )


def _uniform(numbers: Mapping[str, float]) -> Sign | None:
    loss, at_uniform = numbers.get("train/dino_global", 0.0), numbers.get("train/dino_global_at_uniform", 1.0)
    entropy, most = numbers.get("train/teacher_entropy", 0.0), numbers.get("train/teacher_entropy_at_uniform", 1.0)
    if loss < _UNIFORM_SHARE * at_uniform or entropy < _UNIFORM_SHARE * most:
        return None
    return Sign(
        "uniform",
        f"the loss stays at its value for uniform output (dino_global {loss:.3f} of {at_uniform:.3f}, teacher entropy "
        f"{entropy:.2f} of {most:.2f})",
        "a lower method.teacher.teacher_temp, fewer prototypes (method.dino.head_n_prototypes), a higher optim.lr, more steps",
    )

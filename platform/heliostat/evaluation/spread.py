"""How far features are spread out, without labels: numbers that fall when a backbone collapses."""

import numpy as np
from numpy.typing import NDArray

# Shapes: N images, D width.


def rankme(features_ND: NDArray[np.float32]) -> float:
    """Effective rank, 1 to min(N, D): exponential of the entropy of the singular values (Eq. 1 of arXiv 2210.02885)."""
    singular_values = np.linalg.svd(features_ND.astype(np.float64), compute_uv=False)
    eps = 1e-7  # of the paper
    shares = singular_values / max(float(singular_values.sum()), eps) + eps
    return float(np.exp(-np.sum(shares * np.log(shares))))


def feature_std(features_ND: NDArray[np.float32]) -> float:
    """Standard deviation of the L2-normalised features, mean over components, times sqrt(D): 1 spread out, 0 collapsed."""
    norms_N1 = np.linalg.norm(features_ND, axis=1, keepdims=True)
    unit_ND = features_ND.astype(np.float64) / np.maximum(norms_N1, 1e-12)
    return float(unit_ND.std(axis=0).mean() * np.sqrt(features_ND.shape[1]))

"""First centroids of k-means, drawn far from each other: D^2 sampling, one or several draws per pass."""

import numpy as np
import torch
from numpy.typing import NDArray

from heliostat.curation.assignment import nearest_centroid, unit

# Shapes: S rows that seeding draws from, D dimension.

NO_DISTANCE = 1e-6
"""1 - cosine below this is rounding: the vectors are the same."""


def seed_centroids(vectors_SD: torch.Tensor, k: int, *, rounds: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """(k,) distinct rows drawn one after the other with probability proportional to 1 - cosine to the nearest drawn before.

    That is half the squared distance: k-means++ with rounds=k; fewer rounds draw several at once. Rows that equal a drawn one
    come last, so k rows are found whatever the vectors are.
    """
    unit_SD = unit(vectors_SD)
    num_rows = len(unit_SD)
    chosen = [np.array([generator.integers(num_rows)])]
    nearest_S = unit_SD @ unit_SD[int(chosen[0][0])]
    taken_S = np.zeros(num_rows, np.bool_)
    taken_S[chosen[0]] = True
    while (missing := k - int(taken_S.sum())) > 0:
        count = min(missing, -(-k // rounds))
        distance_S = (1.0 - nearest_S).cpu().numpy().astype(np.float64)
        distance_S[distance_S < NO_DISTANCE] = 1e-300
        # Of independent exponential waiting times the shortest belong to rows drawn without replacement, by their rates.
        waiting_S = generator.exponential(size=num_rows) / distance_S
        waiting_S[taken_S] = np.inf
        drawn = np.argpartition(waiting_S, count - 1)[:count]
        drawn = drawn[np.argsort(waiting_S[drawn], kind="stable")]
        taken_S[drawn] = True
        chosen.append(drawn)
        nearest_S = torch.maximum(nearest_S, nearest_centroid(unit_SD, unit_SD[torch.from_numpy(drawn)])[1])
    return np.concatenate(chosen)

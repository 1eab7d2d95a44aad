"""Linear probe: multinomial logistic regression on frozen, standardised features."""

import numpy as np
import torch
from numpy.typing import NDArray

from heliostat.errors import DataError
from heliostat.evaluation.config import LinearConfig

# Shapes: N training vectors, Q queries, D width, C classes.


def linear_accuracy(
    features_ND: NDArray[np.float32],
    labels_N: NDArray[np.int64],
    queries_QD: NDArray[np.float32],
    truth_Q: NDArray[np.int64],
    *,
    config: LinearConfig,
) -> float:
    """Top-1 accuracy in 0..1 of the probe. Deterministic: the problem is convex and starts at zero."""
    num_classes = int(max(labels_N.max(), truth_Q.max())) + 1
    if num_classes < 2:
        raise DataError("a linear probe needs at least 2 classes; the labelled images have 1")
    mean_D = features_ND.mean(axis=0)
    scale_D = np.maximum(features_ND.std(axis=0), 1e-6)
    inputs_ND = torch.from_numpy((features_ND - mean_D) / scale_D)
    targets_N = torch.from_numpy(labels_N)
    weight_CD = torch.zeros(num_classes, inputs_ND.shape[1], requires_grad=True)
    bias_C = torch.zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight_CD, bias_C], max_iter=config.max_iterations, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(inputs_ND @ weight_CD.T + bias_C, targets_N)
        loss = loss + 0.5 * config.weight_decay * weight_CD.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        logits_QC = torch.from_numpy((queries_QD - mean_D) / scale_D) @ weight_CD.T + bias_C
    return float((logits_QC.argmax(dim=1).numpy() == truth_Q).mean())

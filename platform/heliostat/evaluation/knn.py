"""Weighted k-nearest-neighbour accuracy, the yardstick that needs no training."""

import numpy as np
from numpy.typing import NDArray

from heliostat.errors import DataError
from heliostat.evaluation.config import KnnConfig

# Shapes: N bank vectors, Q queries, D width, K neighbours.


def normalise_rows(vectors_ND: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows divided by their L2 norm; a zero row stays zero. float32 (N, D) -> float32 (N, D)."""
    norms_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    return np.asarray(vectors_ND / np.maximum(norms_N1, 1e-12), dtype=np.float32)


def nearest(
    bank_ND: NDArray[np.float32], queries_QD: NDArray[np.float32], k: int, *, exclude_self: bool = False
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Cosine similarities (Q, K) and bank rows (Q, K) of the k nearest, best first; ties go to the lower row.

    `exclude_self` drops row q for query q (bank and queries are the same matrix).
    """
    if not 1 <= k <= len(bank_ND) - int(exclude_self):
        raise DataError(
            f"k-NN with {k} neighbours needs more than the {len(bank_ND)} labelled images; lower evaluate.knn.neighbors"
        )
    bank_ND = normalise_rows(bank_ND)
    similarities, rows = [], []
    for start in range(0, len(queries_QD), 1024):
        block_QN = normalise_rows(queries_QD[start : start + 1024]) @ bank_ND.T
        if exclude_self:
            block_QN[np.arange(len(block_QN)), start + np.arange(len(block_QN))] = -np.inf
        order_QK = np.argsort(-block_QN, axis=1, kind="stable")[:, :k]
        rows.append(order_QK)
        similarities.append(np.take_along_axis(block_QN, order_QK, axis=1))
    return np.concatenate(similarities), np.concatenate(rows)


def knn_predict(
    bank_ND: NDArray[np.float32], labels_N: NDArray[np.int64], queries_QD: NDArray[np.float32], config: KnnConfig
) -> NDArray[np.int64]:
    """Predicted class of each query, int64 (Q,): the class with the largest sum of exp(similarity / temperature)."""
    return _vote(*nearest(bank_ND, queries_QD, config.neighbors), labels_N, config)


def _vote(
    similarities_QK: NDArray[np.float32], rows_QK: NDArray[np.int64], labels_N: NDArray[np.int64], config: KnnConfig
) -> NDArray[np.int64]:
    weights_QK = np.exp((similarities_QK - 1.0) / config.temperature)  # similarity <= 1: cannot overflow
    votes_QC = np.zeros((len(rows_QK), int(labels_N.max()) + 1))
    for column in range(rows_QK.shape[1]):
        np.add.at(votes_QC, (np.arange(len(rows_QK)), labels_N[rows_QK[:, column]]), weights_QK[:, column])
    return np.asarray(votes_QC.argmax(axis=1), dtype=np.int64)


def leave_one_out_accuracy(features_ND: NDArray[np.float32], labels_N: NDArray[np.int64], *, config: KnnConfig) -> float:
    """Top-1 accuracy in 0..1 where each image is judged by all the others: no image is spared for a bank."""
    found = nearest(features_ND, features_ND, config.neighbors, exclude_self=True)
    return float((_vote(*found, labels_N, config) == labels_N).mean())


def knn_accuracy(
    bank_ND: NDArray[np.float32],
    labels_N: NDArray[np.int64],
    queries_QD: NDArray[np.float32],
    truth_Q: NDArray[np.int64],
    *,
    config: KnnConfig,
) -> float:
    """Top-1 accuracy in 0..1."""
    return float((knn_predict(bank_ND, labels_N, queries_QD, config) == truth_Q).mean())

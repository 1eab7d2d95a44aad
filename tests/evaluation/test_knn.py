"""k-NN against a loop over every pair, and against scikit-learn's weighted neighbours."""

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from heliostat.errors import DataError
from heliostat.evaluation.config import KnnConfig
from heliostat.evaluation.knn import knn_accuracy, knn_predict, nearest, normalise_rows


def problem(seed: int = 0, classes: int = 5, bank: int = 120, queries: int = 70, width: int = 9):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, width))
    labels, truth = rng.integers(0, classes, bank), rng.integers(0, classes, queries)
    vectors = centres[labels] + 1.2 * rng.normal(size=(bank, width))
    asked = centres[truth] + 1.2 * rng.normal(size=(queries, width))
    return vectors.astype(np.float32), labels.astype(np.int64), asked.astype(np.float32), truth.astype(np.int64)


def slow_prediction(bank, labels, query, neighbors: int, temperature: float) -> int:
    similarities = [float(np.dot(row, query) / (np.linalg.norm(row) * np.linalg.norm(query))) for row in bank]
    order = sorted(range(len(bank)), key=lambda row: (-similarities[row], row))[:neighbors]
    votes: dict[int, float] = {}
    for row in order:
        votes[int(labels[row])] = votes.get(int(labels[row]), 0.0) + float(np.exp(similarities[row] / temperature))
    return max(sorted(votes), key=lambda label: votes[label])


@pytest.mark.parametrize(("neighbors", "temperature"), [(1, 0.07), (10, 0.07), (20, 1.0), (120, 0.05)])
def test_predictions_are_those_of_a_loop_over_every_pair(neighbors: int, temperature: float) -> None:
    bank, labels, queries, _ = problem()
    config = KnnConfig(neighbors=neighbors, temperature=temperature)
    found = knn_predict(bank, labels, queries, config)
    assert found.tolist() == [slow_prediction(bank, labels, query, neighbors, temperature) for query in queries]


def test_predictions_and_accuracy_are_those_of_scikit_learn() -> None:
    bank, labels, queries, truth = problem(seed=1)
    config = KnnConfig(neighbors=15, temperature=0.1)
    reference = KNeighborsClassifier(15, metric="cosine", algorithm="brute", weights=lambda distance: np.exp(-distance / 0.1))
    reference.fit(bank, labels)
    assert (knn_predict(bank, labels, queries, config) == reference.predict(queries)).all()
    assert knn_accuracy(bank, labels, queries, truth, config=config) == reference.score(queries, truth)


def test_many_queries_are_answered_as_few_are() -> None:
    bank, _, _, _ = problem()
    queries = np.random.default_rng(2).normal(size=(2500, 9)).astype(np.float32)
    similarities, rows = nearest(bank, queries, 3)
    for query in (0, 1023, 1024, 2499):
        alone = nearest(bank, queries[query : query + 1], 3)
        np.testing.assert_allclose(alone[0][0], similarities[query], rtol=1e-5)
        assert alone[1][0].tolist() == rows[query].tolist()


def test_equal_similarities_go_to_the_lower_row() -> None:
    bank = np.ones((6, 4), np.float32)
    _, rows = nearest(bank, bank[:1], 4)
    assert rows.tolist() == [[0, 1, 2, 3]]


def test_the_query_itself_can_be_left_out() -> None:
    bank, _, _, _ = problem(bank=1200)
    _, with_self = nearest(bank, bank, 4)
    _, rows = nearest(bank, bank, 3, exclude_self=True)
    assert with_self[:, 0].tolist() == list(range(1200))
    assert rows.tolist() == with_self[:, 1:].tolist()


def test_similarities_are_cosines_whatever_the_lengths() -> None:
    bank, _, queries, _ = problem()
    near, rows = nearest(bank, queries, 5)
    scaled_near, scaled_rows = nearest(1e4 * bank, 1e-4 * queries, 5)
    np.testing.assert_allclose(near, scaled_near, rtol=1e-4)
    assert (rows == scaled_rows).all()
    assert np.abs(near).max() <= 1 + 1e-6


def test_a_zero_vector_stays_zero() -> None:
    assert not normalise_rows(np.zeros((2, 3), np.float32)).any()
    np.testing.assert_allclose(np.linalg.norm(normalise_rows(np.eye(3, dtype=np.float32) * 7), axis=1), 1)


@pytest.mark.parametrize("k", [0, 121])
def test_more_neighbours_than_images_are_refused(k: int) -> None:
    bank, _, queries, _ = problem()
    with pytest.raises(DataError, match=f"k-NN with {k} neighbours"):
        nearest(bank, queries, k)

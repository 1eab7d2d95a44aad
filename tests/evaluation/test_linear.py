"""The linear probe against scikit-learn's logistic regression on the same objective."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from heliostat.errors import DataError
from heliostat.evaluation.config import LinearConfig
from heliostat.evaluation.linear import linear_accuracy


def problem(seed: int = 0, classes: int = 4, noise: float = 2.5):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, 12)) * 1.5
    labels, truth = rng.integers(0, classes, 300), rng.integers(0, classes, 500)
    scale = 10.0 ** rng.integers(-3, 4, 12)  # features of very different size
    features = (centres[labels] + noise * rng.normal(size=(300, 12))) * scale
    queries = (centres[truth] + noise * rng.normal(size=(500, 12))) * scale
    return features.astype(np.float32), labels.astype(np.int64), queries.astype(np.float32), truth.astype(np.int64)


@pytest.mark.parametrize("weight_decay", [1e-3, 1e-2, 1e-1])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_accuracy_is_that_of_scikit_learns_optimum(weight_decay: float, seed: int) -> None:
    features, labels, queries, truth = problem(seed)
    found = linear_accuracy(
        features, labels, queries, truth, config=LinearConfig(weight_decay=weight_decay, max_iterations=300)
    )
    scaler = StandardScaler().fit(features)
    reference = LogisticRegression(C=1 / (weight_decay * len(features)), max_iter=5000, tol=1e-10)
    reference.fit(scaler.transform(features), labels)
    expected = reference.score(scaler.transform(queries), truth)
    assert 0.3 < expected < 0.99
    assert found == pytest.approx(expected, abs=2 / len(queries))  # a query on the border may fall either way


def test_the_result_is_the_same_every_time() -> None:
    assert len({linear_accuracy(*problem(), config=LinearConfig()) for _ in range(3)}) == 1


def test_a_constant_feature_does_no_harm() -> None:
    features, labels, queries, truth = problem()
    plain = linear_accuracy(features, labels, queries, truth, config=LinearConfig())
    features, queries = (np.concatenate([part, np.full((len(part), 1), 3, np.float32)], axis=1) for part in (features, queries))
    assert linear_accuracy(features, labels, queries, truth, config=LinearConfig()) == plain


def test_separable_classes_are_separated_and_noise_is_not() -> None:
    assert linear_accuracy(*problem(noise=0.01), config=LinearConfig()) == 1.0
    features, labels, queries, truth = problem()
    shuffled = np.random.default_rng(5).permutation(labels)
    assert linear_accuracy(features, shuffled, queries, truth, config=LinearConfig()) < 0.45


def test_one_class_is_refused() -> None:
    features, labels, queries, truth = problem()
    with pytest.raises(DataError, match="at least 2 classes"):
        linear_accuracy(features, 0 * labels, queries, 0 * truth, config=LinearConfig())

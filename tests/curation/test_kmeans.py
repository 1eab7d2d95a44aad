"""k-means in tasks against a plain one, in any order, in any blocks, and after any kill."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from heliostat.curation.assignment import assign
from heliostat.curation.kmeans import kmeans, refill_empty
from heliostat.curation.tasks import TaskFunction, run_serially
from heliostat.curation.vectors import ArrayVectors
from heliostat.errors import DataError
from heliostat.storage import LocalStore


def blobs(num_rows: int, num_blobs: int, dimension: int, seed: int, spread: float = 0.1) -> np.ndarray:
    generator = np.random.default_rng(seed)
    centers = generator.standard_normal((num_blobs, dimension))
    centers /= np.linalg.norm(centers, axis=1, keepdims=True)
    noise = spread * generator.standard_normal((num_rows, dimension))
    vectors = centers[generator.integers(num_blobs, size=num_rows)] + noise
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def run_shuffled(
    function: TaskFunction, tasks: Sequence[Mapping[str, Any]], *, label: str, has_state: bool = False
) -> Iterator[Mapping[str, Any]]:
    order = np.random.default_rng(len(tasks)).permutation(len(tasks))
    for place in order:
        yield from run_serially(function, [tasks[place]], label=label)
        yield from run_serially(function, [tasks[place]], label=label)  # every task twice, as after a lost node


class KilledError(Exception):
    """Stands for the end of a process."""


def run_killed_after(num_tasks: int) -> Any:
    left = itertools.count(num_tasks, -1)

    def run(
        function: TaskFunction, tasks: Sequence[Mapping[str, Any]], *, label: str, has_state: bool = False
    ) -> Iterator[Mapping[str, Any]]:
        for task in tasks:
            if next(left) <= 0:
                raise KilledError
            yield from run_serially(function, [task], label=label)

    return run


def fit(vectors: ArrayVectors, folder: Path, k: int = 12, run: Any = run_serially, **settings: Any) -> np.ndarray:
    return kmeans(vectors, k, **{"iterations": 8, "seed": 3, **settings}, work=LocalStore(folder), run=run)


def test_lloyds_iterations_equal_a_plain_implementation_from_the_same_first_centroids(tmp_path: Path) -> None:
    array = blobs(600, 10, 16, 0)
    vectors = ArrayVectors(array, rows_per_block=100)
    values = array.astype(np.float64)
    for k in (1, 3, 12):
        centroids = fit(vectors, tmp_path, k=k, iterations=0, rows_per_centroid=600).astype(np.float64)
        for iterations in range(1, 6):
            cluster = (values @ centroids.T).argmax(axis=1)
            assert np.bincount(cluster, minlength=k).min() > 0
            centroids = unit(np.stack([values[cluster == one].sum(axis=0) for one in range(k)]))
            found = fit(vectors, tmp_path, k=k, iterations=iterations, rows_per_centroid=600)
            np.testing.assert_allclose(found, centroids, atol=2e-6)


@pytest.mark.parametrize("seeding", ["kmeans++", "sample", "random"])
def test_a_fit_with_spread_seeds_is_as_good_as_the_better_half_of_plain_ones_and_with_random_seeds_as_the_worst(
    tmp_path: Path, seeding: str
) -> None:
    array = blobs(900, 12, 24, 1, spread=0.05)
    values = array.astype(np.float64)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    distances = []
    for seed in range(10):
        centroids = values[np.random.default_rng(seed).choice(900, 12, replace=False)]
        for _ in range(20):
            cluster = (values @ centroids.T).argmax(axis=1)
            filled = [values[cluster == one].sum(axis=0) if (cluster == one).any() else centroids[one] for one in range(12)]
            centroids = unit(np.stack(filled))
        distances.append(1 - (values @ centroids.T).max(axis=1).mean())
    found = fit(ArrayVectors(array), tmp_path, iterations=20, seeding=seeding)
    limit = np.quantile(distances, 1.0 if seeding == "random" else 0.5)
    assert 1 - (values @ found.T).max(axis=1).mean() < 1.01 * limit


def test_blocks_tasks_and_their_order_do_not_change_a_bit(tmp_path: Path) -> None:
    array = blobs(1000, 8, 16, 2)
    settings = {"k": 10, "rows_per_centroid": 60, "seeding": "sample"}  # 600 of 1000 rows are fitted
    whole = fit(ArrayVectors(array, rows_per_block=1000), tmp_path / "a", **settings)
    many = fit(ArrayVectors(array, rows_per_block=13), tmp_path / "b", **settings)
    shuffled = fit(ArrayVectors(array, rows_per_block=13), tmp_path / "c", run=run_shuffled, **settings)
    assert whole.tobytes() == many.tobytes() == shuffled.tobytes()
    other = fit(ArrayVectors(array, rows_per_block=13), tmp_path / "d", seed=4, **settings)
    assert whole.tobytes() != other.tobytes()


def test_a_run_killed_anywhere_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    vectors = ArrayVectors(blobs(300, 6, 8, 3), rows_per_block=40)
    settings = {"k": 6, "iterations": 3, "rows_per_centroid": 30, "seeding": "sample"}
    expected = fit(vectors, tmp_path / "whole", **settings)
    for num_tasks in range(0, 60, 3):
        folder = tmp_path / f"killed-{num_tasks}"
        try:
            fit(vectors, folder, run=run_killed_after(num_tasks), **settings)
        except KilledError:
            killed = num_tasks
        assert fit(vectors, folder, **settings).tobytes() == expected.tobytes()
    assert killed > 40  # the whole run was covered


def test_a_killed_run_does_not_repeat_the_iterations_it_finished(tmp_path: Path) -> None:
    vectors = ArrayVectors(blobs(300, 6, 8, 3), rows_per_block=300)
    labels: list[str] = []

    def run(function: TaskFunction, tasks: Sequence[Mapping[str, Any]], *, label: str, has_state: bool = False) -> Any:
        labels.append(label)
        return run_serially(function, tasks, label=label)

    with pytest.raises(KilledError):
        fit(vectors, tmp_path, run=run_killed_after(7), iterations=5)  # rows, seeds, 2 iterations of 2 tasks, a sum
    fit(vectors, tmp_path, run=run, iterations=5)
    assert next(label for label in labels if label.startswith("k-means")) == "k-means, iteration 3 of 5"
    labels.clear()
    fit(vectors, tmp_path, run=run, iterations=5)
    assert labels == ["rows with a vector"]


def test_absent_rows_change_nothing_and_get_no_cluster(tmp_path: Path) -> None:
    array, kept = blobs(400, 6, 8, 4), np.random.default_rng(0).random(400) < 0.6
    holey = ArrayVectors(array, kept=kept, rows_per_block=50)
    found = fit(holey, tmp_path / "a", k=6, seeding="kmeans++")
    assignment = assign(holey, found, name="pool", work=LocalStore(tmp_path / "a"), run=run_shuffled)
    products = array.astype(np.float32) @ found.T
    np.testing.assert_array_equal(assignment.cluster, np.where(kept, products.argmax(axis=1), -1))
    cosine = products.max(axis=1) / np.linalg.norm(array.astype(np.float32), axis=1)
    np.testing.assert_allclose(assignment.similarity, np.where(kept, cosine, 0.0), atol=1e-6)


def test_more_clusters_than_different_vectors_leave_empty_clusters_and_no_nonsense(tmp_path: Path) -> None:
    different = blobs(3, 3, 8, 5)
    vectors = ArrayVectors(np.repeat(different, 20, axis=0), rows_per_block=7)
    centroids = fit(vectors, tmp_path, k=9)
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1.0, atol=1e-5)
    cluster = assign(vectors, centroids, name="pool", work=LocalStore(tmp_path), run=run_serially).cluster.reshape(3, 20)
    assert (cluster == cluster[:, :1]).all()
    assert len(set(cluster[:, 0])) == 3


def test_one_image_is_one_cluster_around_itself(tmp_path: Path) -> None:
    array = blobs(1, 1, 8, 6)
    np.testing.assert_allclose(fit(ArrayVectors(array), tmp_path, k=1), unit(array.astype(np.float32)), atol=1e-6)


def test_an_empty_cluster_takes_half_of_the_largest() -> None:
    centroids = unit(np.random.default_rng(0).standard_normal((5, 8))).astype(np.float32)
    sizes = np.array([4.0, 0.0, 90.0, 0.0, 1.0])
    refilled = refill_empty(centroids, sizes)
    np.testing.assert_array_equal(refilled[4], centroids[4])
    assert refilled[1] @ centroids[2] > 0.999999 - 1e-5
    assert refilled[3] @ centroids[0] > 0.999999 - 1e-5
    assert not np.array_equal(refilled[1], refilled[2])
    np.testing.assert_allclose(np.linalg.norm(refilled, axis=1), 1.0, atol=1e-6)


@pytest.mark.parametrize("k", [0, 6])
def test_k_outside_the_number_of_images_is_refused(tmp_path: Path, k: int) -> None:
    kept = np.array([True] * 5 + [False] * 5)
    with pytest.raises(DataError, match=rf"{k} clusters are not in 1\.\.5"):
        fit(ArrayVectors(blobs(10, 2, 8, 7), kept=kept), tmp_path, k=k)


def test_a_vector_that_is_not_finite_is_named(tmp_path: Path) -> None:
    array = blobs(30, 2, 8, 8)
    array[17, 3] = np.nan
    with pytest.raises(DataError, match="row 17"):
        fit(ArrayVectors(array, rows_per_block=10), tmp_path, k=2)

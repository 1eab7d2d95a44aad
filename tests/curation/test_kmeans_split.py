"""k-means in two steps: exactly k clusters, images with the closest child of their coarse cluster, whatever is killed."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from heliostat.curation.assignment import Assignment, assign
from heliostat.curation.hierarchy import hierarchy
from heliostat.curation.kmeans import kmeans
from heliostat.curation.kmeans_split import kmeans_in_two_steps, lloyd
from heliostat.curation.retrieval_config import ClustersConfig
from heliostat.curation.tasks import TaskFunction, run_serially
from heliostat.curation.vectors import ArrayVectors
from heliostat.errors import DataError
from heliostat.storage import LocalStore


def blobs(num_rows: int, num_blobs: int, seed: int, dimension: int = 12) -> np.ndarray:
    generator = np.random.default_rng(seed)
    centers = generator.standard_normal((num_blobs, dimension))
    share = generator.pareto(1.5, size=num_blobs) + 0.2
    label = generator.choice(num_blobs, p=share / share.sum(), size=num_rows)
    vectors = centers[label] + 0.3 * generator.standard_normal((num_rows, dimension))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


ARRAY = blobs(900, 30, 0)
KEPT = np.random.default_rng(1).random(900) < 0.9


def split(folder: Path, k: int = 47, run: Any = run_serially, **settings: Any) -> tuple[np.ndarray, Assignment]:
    return kmeans_in_two_steps(
        ArrayVectors(ARRAY, kept=KEPT, rows_per_block=150),
        k,
        **{"iterations": 6, "seed": 0, "rows": np.flatnonzero(KEPT), "children": 8, "rows_per_task": 200, **settings},
        work=LocalStore(folder),
        run=run,
    )


def test_there_are_exactly_k_clusters_and_each_image_is_with_the_closest_child_of_its_coarse_cluster(tmp_path: Path) -> None:
    centroids, found = split(tmp_path)
    assert len(centroids) == 47
    np.testing.assert_array_equal(found.cluster >= 0, KEPT)
    firsts = np.load(next(tmp_path.glob("split-47/firsts.npy")))
    assert firsts[-1] == 47
    coarse = np.searchsorted(firsts, found.cluster[KEPT], side="right") - 1
    products = ARRAY[KEPT].astype(np.float32) @ centroids.T
    for row, (one, cluster) in enumerate(zip(coarse, found.cluster[KEPT], strict=True)):
        first, end = firsts[one : one + 2]
        assert products[row, cluster] == pytest.approx(products[row, first:end].max(), abs=1e-6)


def test_two_steps_are_nearly_as_good_as_one(tmp_path: Path) -> None:
    _, found = split(tmp_path / "two")
    vectors = ArrayVectors(ARRAY, kept=KEPT)
    work = LocalStore(tmp_path / "one")
    flat = kmeans(vectors, 47, iterations=6, seed=0, work=work, run=run_serially)
    one = assign(vectors, flat, name="x", work=work, run=run_serially)
    assert 1 - found.similarity[KEPT].mean() < 1.2 * (1 - one.similarity[KEPT].mean())


class KilledError(Exception):
    """Stands for the end of a process."""


def test_a_run_killed_anywhere_ends_with_the_same_bytes_and_leaves_no_copy_of_the_vectors(tmp_path: Path) -> None:
    expected_centroids, expected = split(tmp_path / "whole")
    for number in range(2, 70, 6):
        left = iter(range(number))

        def run(function: TaskFunction, tasks: Sequence[Mapping[str, Any]], *, left: Any = left, **told: Any) -> Iterator[Any]:
            for task in reversed(tasks):
                if next(left, None) is None:
                    raise KilledError
                yield from run_serially(function, [task], **told)

        folder = tmp_path / str(number)
        try:
            split(folder, run=run)
        except KilledError:
            last_killed = number
        centroids, found = split(folder)
        assert centroids.tobytes() == expected_centroids.tobytes()
        assert found.cluster.tobytes() == expected.cluster.tobytes()
        assert list(folder.glob("split-47/sorted/*")) == []
    assert last_killed > 40


def test_copies_of_one_image_are_split_without_nonsense(tmp_path: Path) -> None:
    array = np.repeat(ARRAY[:2], 30, axis=0)
    vectors = ArrayVectors(array)
    centroids, found = kmeans_in_two_steps(
        vectors, 20, iterations=3, seed=0, work=LocalStore(tmp_path), run=run_serially, rows=np.arange(60), children=5
    )
    assert centroids.shape == (20, 12)
    assert np.isfinite(centroids).all()
    assert [len(set(found.cluster[start : start + 30])) for start in (0, 30)] == [1, 1]


def test_as_many_clusters_as_images_give_each_image_its_own(tmp_path: Path) -> None:
    _, found = split(tmp_path, k=int(KEPT.sum()))
    assert len(np.unique(found.cluster[KEPT])) == KEPT.sum()
    with pytest.raises(DataError, match=rf"{KEPT.sum() + 1} clusters are not in 1\.\.{KEPT.sum()}"):
        split(tmp_path / "more", k=int(KEPT.sum()) + 1)


def test_lloyd_in_memory_separates_blobs_and_fills_every_cluster() -> None:
    vectors = torch.from_numpy(ARRAY[:300].astype(np.float32))
    centroids = lloyd(vectors, 30, iterations=10, generator=np.random.default_rng(0))
    assert len(torch.unique((vectors @ centroids.T).argmax(dim=1))) == 30
    torch.testing.assert_close(centroids.norm(dim=1), torch.ones(30))


def test_a_hierarchy_splits_large_levels_that_are_not_resampled(tmp_path: Path) -> None:
    vectors = ArrayVectors(ARRAY, kept=KEPT, rows_per_block=300)
    config = ClustersConfig(levels=(250, 120), split_above=100, iterations=3, resampling_rounds=(0, 1))
    found = hierarchy(vectors, config, work=LocalStore(tmp_path), run=run_serially)
    assert [len(centroids) for centroids in found.centroids] == [250, 120]
    assert [int(sizes.sum()) for sizes in found.sizes()] == [KEPT.sum()] * 2
    assert (tmp_path / "level-1" / "split-250").exists()
    assert not (tmp_path / "level-2" / "split-120").exists()

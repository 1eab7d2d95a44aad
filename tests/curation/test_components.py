"""Connected components in memory and over files against a breadth-first search."""

from collections import deque

import numpy as np
import pytest

from heliostat.curation import components
from heliostat.curation.components import components_of_files, connected_components, spanning_stars
from heliostat.curation.edges import edges_key, make_edges, write_edges
from heliostat.curation.tasks import run_serially
from heliostat.errors import DataError
from heliostat.storage import LocalStore


def walk(num_nodes: int, first: np.ndarray, second: np.ndarray) -> list[int]:
    """Slow and independent: every node labelled by the node the search began at."""
    near: list[list[int]] = [[] for _ in range(num_nodes)]
    for one, other in zip(first, second, strict=True):
        near[one].append(other)
        near[other].append(one)
    label = [-1] * num_nodes
    for start in range(num_nodes):
        queue = deque([start] if label[start] < 0 else [])
        while queue:
            node = queue.popleft()
            if label[node] < 0:
                label[node] = start
                queue.extend(near[node])
    return label


def random_graph(seed: int) -> tuple[int, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    num_nodes = int(generator.integers(1, 200))
    return num_nodes, *generator.integers(num_nodes, size=(2, int(generator.integers(0, 2 * num_nodes))))


def over_files(folder, num_nodes, first, second, *, num_files=1, threshold=0.5) -> np.ndarray:
    files = LocalStore(folder / "files")
    for number, part in enumerate(np.array_split(np.arange(len(first)), num_files)):
        similarity = np.full(len(part), 0.75, np.float32)
        write_edges(files, edges_key("edges/", number), make_edges(first[part], second[part], similarity))
    work = LocalStore(folder / "work")
    return components_of_files(files, "edges/", num_nodes, threshold=threshold, work=work, run=run_serially)


@pytest.mark.parametrize("seed", range(20))
def test_random_graphs_equal_a_breadth_first_search_in_memory_and_over_files(tmp_path, seed, monkeypatch):
    num_nodes, first, second = random_graph(seed)
    expected = walk(num_nodes, first, second)
    assert connected_components(num_nodes, first, second).tolist() == expected
    assert over_files(tmp_path, num_nodes, first, second, num_files=1 + seed % 5).tolist() == expected
    monkeypatch.setattr(components, "MAX_COMPILED", 0)
    assert connected_components(num_nodes, first, second).tolist() == expected


def test_a_long_chain_in_random_order_is_one_component_labelled_by_its_smallest_node(tmp_path):
    order = np.random.default_rng(0).permutation(5_000)
    assert not connected_components(5_000, order[:-1], order[1:]).any()
    assert not over_files(tmp_path, 5_000, order[:-1], order[1:], num_files=7).any()


def test_stars_name_each_inner_row_once_with_the_smallest_row_it_hangs_together_with():
    stars = spanning_stars(np.array([9, 5, 70, 5]), np.array([5, 3, 80, 9]))
    assert sorted(zip(*stars.tolist(), strict=True)) == [(5, 3), (9, 3), (80, 70)]


def test_edges_at_the_threshold_do_not_connect_and_no_edges_leave_every_row_alone(tmp_path):
    first, second = np.array([0, 1]), np.array([1, 2])
    assert over_files(tmp_path / "at", 4, first, second, num_files=1, threshold=0.75).tolist() == [0, 1, 2, 3]
    assert over_files(tmp_path / "none", 3, first[:0], second[:0], num_files=1).tolist() == [0, 1, 2]
    assert connected_components(0, first[:0], second[:0]).tolist() == []


def test_edges_of_rows_that_the_pool_does_not_have_are_refused(tmp_path):
    with pytest.raises(DataError, match="names row 2, the pool has 2"):
        connected_components(2, np.array([0]), np.array([2]))
    with pytest.raises(DataError, match="names row 7, the pool has 3"):
        over_files(tmp_path, 3, np.array([0]), np.array([7]), num_files=1)

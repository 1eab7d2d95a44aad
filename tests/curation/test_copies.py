"""Copy graph, components, representatives, guard, decontamination."""

from collections import deque

import numpy as np
import pyarrow as pa
import pytest

from heliostat.curation.config import CopyLimits
from heliostat.curation.copies import connected_components, copy_edges, decontaminate, find_copies, quality_order
from heliostat.errors import DataError


def walk_components(num_nodes: int, edges: np.ndarray) -> list[int]:
    """Slow and independent: breadth-first search, every node labelled by the node the search began at."""
    near: list[list[int]] = [[] for _ in range(num_nodes)]
    for first, second in edges:
        near[first].append(second)
        near[second].append(first)
    label = [-1] * num_nodes
    for start in range(num_nodes):
        queue = deque([start] if label[start] < 0 else [])
        while queue:
            node = queue.popleft()
            if label[node] < 0:
                label[node] = start
                queue.extend(near[node])
    return label


def quality(pixels: list[int], formats: list[str] | None = None, sizes: list[int] | None = None) -> pa.Table:
    count = len(pixels)
    return pa.table(
        {
            "id": [f"{position:04x}" for position in range(count)],
            "width": pa.array(pixels, pa.int32()),
            "height": pa.array([1] * count, pa.int32()),
            "format": formats or ["jpeg"] * count,
            "bytes": pa.array(sizes or [100] * count, pa.int64()),
        }
    )


def on_a_circle(degrees: list[float]) -> np.ndarray:
    """Unit vectors in the plane: similarity is the cosine of the angle between them."""
    angles = np.deg2rad(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def limits(threshold: float, guard: float = -1.0) -> CopyLimits:
    return CopyLimits(threshold, guard, decontamination_threshold=threshold)


@pytest.mark.parametrize("seed", range(20))
def test_components_of_random_graphs_equal_a_breadth_first_search(seed):
    generator = np.random.default_rng(seed)
    num_nodes = int(generator.integers(1, 200))
    edges = generator.integers(num_nodes, size=(int(generator.integers(0, 2 * num_nodes)), 2))
    assert connected_components(num_nodes, edges).tolist() == walk_components(num_nodes, edges)


def test_a_long_chain_in_random_order_is_one_component_labelled_by_its_smallest_node():
    order = np.random.default_rng(0).permutation(5_000)
    edges = np.stack([order[:-1], order[1:]], axis=1)
    assert (connected_components(5_000, edges) == 0).all()
    assert (connected_components(5_000, edges[::-1, ::-1]) == 0).all()


def test_components_do_not_depend_on_the_order_of_edges_and_no_edges_leave_every_node_alone():
    edges = np.random.default_rng(1).integers(100, size=(80, 2))
    np.testing.assert_array_equal(connected_components(100, edges), connected_components(100, edges[::-1]))
    np.testing.assert_array_equal(connected_components(3, np.empty((0, 2), np.int64)), [0, 1, 2])


def test_edges_leave_out_the_image_itself_padding_and_similarities_at_the_threshold():
    similarities = np.array([[1.0, 0.7, 0.6], [1.0, 0.9, -1.0]], np.float32)
    ids = np.array([[0, 1, 2], [1, 0, -1]])
    assert copy_edges(similarities, ids, np.float32(0.6)).tolist() == [[0, 1], [1, 0]]


def test_the_representative_has_most_pixels_then_a_lossless_format_then_most_bytes_then_the_smallest_id():
    table = quality([10, 20, 20, 20, 20], ["png", "jpeg", "PNG", "png", "png"], [999, 999, 50, 70, 70])
    assert quality_order(table).tolist() == [4, 3, 2, 0, 1]
    found = find_copies(on_a_circle([0, 1, 2, 3, 4]), table, limits(0.9))
    assert found.representative.tolist() == [3] * 5
    assert found.component.tolist() == [0] * 5
    assert found.dropped.tolist() == [True, True, True, False, True]
    assert found.similarity_to_representative[3] == 1.0


def test_copies_do_not_depend_on_the_order_of_arrival():
    generator = np.random.default_rng(3)
    vectors = on_a_circle(list(generator.uniform(0, 360, 120)))
    table = quality(generator.integers(1, 5, 120).tolist())
    shuffled = generator.permutation(120)
    ids = np.array(table["id"].to_pylist())
    first = find_copies(vectors, table, limits(0.999, 0.999))
    second = find_copies(vectors[shuffled], table.take(shuffled), limits(0.999, 0.999))
    np.testing.assert_array_equal(ids[first.representative][shuffled], ids[shuffled][second.representative])
    np.testing.assert_array_equal(first.component[shuffled], second.component)


def test_the_guard_splits_a_chain_whose_ends_are_unlike_and_reports_whom_it_saved():
    degrees = [0.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 200.0]
    vectors, table = on_a_circle(degrees), quality([9, 1, 1, 1, 1, 8, 1, 1])
    linked = find_copies(vectors, table, limits(np.cos(np.deg2rad(11))))
    assert linked.representative.tolist() == [0] * 7 + [7]
    assert (linked.num_split_components, linked.num_saved) == (0, 0)
    guarded = find_copies(vectors, table, limits(np.cos(np.deg2rad(11)), np.cos(np.deg2rad(25))))
    assert guarded.representative.tolist() == [0, 0, 0, 5, 5, 5, 5, 7]
    assert (guarded.num_split_components, guarded.num_saved) == (1, 1)
    assert guarded.similarity_to_representative.min() >= np.cos(np.deg2rad(25))


@pytest.mark.parametrize("seed", range(5))
def test_with_the_guard_no_image_is_represented_by_one_it_does_not_resemble(seed):
    generator = np.random.default_rng(seed)
    vectors = generator.standard_normal((300, 6)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    found = find_copies(vectors, quality(generator.integers(1, 9, 300).tolist()), limits(0.7, 0.8))
    similarity = np.einsum("nd,nd->n", vectors, vectors[found.representative])
    assert similarity.min() >= 0.8 - 1e-6
    np.testing.assert_allclose(found.similarity_to_representative, similarity, atol=1e-5)
    assert (found.representative[found.representative] == found.representative).all()


def test_the_nearest_other_image_is_recorded_even_below_the_threshold_and_never_the_image_itself():
    found = find_copies(on_a_circle([0, 0, 30]), quality([1, 1, 1]), limits(0.99))
    assert found.nearest.tolist()[:2] == [1, 0]
    assert found.nearest[2] in (0, 1)
    assert found.nearest_similarity[2] == pytest.approx(np.cos(np.deg2rad(30)), abs=1e-6)
    alone = find_copies(on_a_circle([0]), quality([1]), limits(0.99))
    assert (alone.nearest.tolist(), alone.nearest_similarity.tolist()) == ([-1], [-1.0])


def test_embeddings_and_quality_must_have_one_row_per_image():
    with pytest.raises(DataError, match="2 embeddings for 3 images"):
        find_copies(on_a_circle([0, 1]), quality([1, 1, 1]), limits(0.9))


def test_decontamination_drops_the_whole_component_of_an_image_that_shows_a_reference():
    vectors = on_a_circle([0, 20, 40, 180])
    found = decontaminate(vectors, on_a_circle([50, 300]), 0.95, component=np.array([0, 0, 0, 1]))
    assert found.dropped.tolist() == [True, True, True, False]
    assert found.reference.tolist() == [0, 0, 0, 1]
    assert decontaminate(vectors, on_a_circle([50]), 0.95).dropped.tolist() == [False, False, True, False]


def test_without_references_nothing_is_dropped():
    found = decontaminate(on_a_circle([0, 20]), np.empty((0, 2), np.float32))
    assert not found.dropped.any()
    assert found.reference.tolist() == [-1, -1]

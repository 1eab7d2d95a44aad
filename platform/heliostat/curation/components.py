"""Connected components of the copy graph, in memory and over files of edges larger than memory.

    in memory    scipy's compiled search, labels made ours: the smallest row of each component
    over files   every file is reduced by a task to its spanning stars (each touched row with the smallest row it hangs together
                 with in that file), and the stars are hung into one array of parents, file after file

The smallest row does not depend on the order or the cut of the edges, so both give the same labels. Memory of the second: 8
bytes a row, and the stars of one file.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array  # type: ignore[import-untyped]
from scipy.sparse.csgraph import connected_components as compiled_components  # type: ignore[import-untyped]

from heliostat.curation.edges import edge_keys, read_edges
from heliostat.curation.slices import run_missing
from heliostat.curation.tasks import TaskMap
from heliostat.curation.vectors import read_array, write_array
from heliostat.errors import DataError
from heliostat.storage import Store

# Shapes: N rows, E edges, T rows touched by an edge.

MAX_COMPILED = 2**31 - 1
"""Nodes and edges that scipy's 32-bit search takes."""


def connected_components(num_nodes: int, first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.int64]:
    """(N,) int64: every node's smallest node of its component. first, second: (E,) ends of the edges, in any order.

    Measured for 40M nodes and 24M edges on one core: benchmarks/copies.py. Raises DataError for a node that does not exist.
    """
    if not len(first):
        return np.arange(num_nodes, dtype=np.int64)
    low, high = int(min(first.min(), second.min())), int(max(first.max(), second.max()))
    if low < 0 or high >= num_nodes:
        raise DataError(f"an edge names row {low if low < 0 else high}, the pool has {num_nodes}; join these images again")
    if num_nodes > MAX_COMPILED or len(first) > MAX_COMPILED:
        parent = np.arange(num_nodes, dtype=np.int64)
        hang(parent, first, second)
        return _flat(parent)
    ends = first.astype(np.int32), second.astype(np.int32)
    graph = coo_array((np.ones(len(first), np.bool_), ends), shape=(num_nodes, num_nodes))
    count, number = compiled_components(graph, directed=False)
    smallest = np.empty(count, np.int64)
    smallest[number[::-1]] = np.arange(num_nodes - 1, -1, -1)  # the last write wins: the smallest node
    return np.asarray(smallest[number], np.int64)


def _roots(parent: NDArray[np.int64], nodes: NDArray[np.int64]) -> NDArray[np.int64]:
    """The root above each of the nodes, and a shorter way to it for the next time."""
    root = parent[nodes]
    while True:
        above = parent[root]
        if np.array_equal(above, root):
            parent[nodes] = root
            return root
        root = above


def hang(parent: NDArray[np.int64], first: NDArray[np.int64], second: NDArray[np.int64]) -> None:
    """Change the parents so that both ends of every edge have one root, the smallest node.

    Every edge hangs the larger of its two roots under the smaller; the rounds grow with the logarithm of the longest chain.
    """
    while len(first):
        first, second = _roots(parent, first), _roots(parent, second)
        open_edges = first != second
        first, second = first[open_edges], second[open_edges]
        np.minimum.at(parent, np.maximum(first, second), np.minimum(first, second))


def _flat(parent: NDArray[np.int64]) -> NDArray[np.int64]:
    """The root of every node."""
    while not np.array_equal(above := parent[parent], parent):
        parent = above
    return parent


def spanning_stars(first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.int64]:
    """(2, T') touched rows that are not the smallest of their component, and that smallest row."""
    nodes, compact = np.unique(np.concatenate([first, second]), return_inverse=True)
    label = connected_components(len(nodes), compact[: len(first)], compact[len(first) :])
    inner = np.flatnonzero(label != np.arange(len(nodes)))
    return np.stack([nodes[inner], nodes[label[inner]]])


@dataclass(frozen=True)
class _StarsOfFile:
    """Task: the spanning stars of one file of edges."""

    files: Store
    work: Store
    threshold: float

    def __call__(self, task: Mapping[str, Any]) -> Mapping[str, Any]:
        edges = read_edges(self.files, str(task["file"])).above(self.threshold)
        write_array(self.work, str(task["done"]), spanning_stars(edges.first, edges.second))
        return {"done": task["done"]}


def components_of_files(
    files: Store, prefix: str, num_nodes: int, *, threshold: float, work: Store, run: TaskMap
) -> NDArray[np.int64]:
    """(N,) labels of the components that edges above `threshold` make, over all files of edges under a prefix."""
    keys = edge_keys(files, prefix)
    stars = [f"stars/{number:06d}.npy" for number in range(len(keys))]
    tasks = [{"file": key, "done": done} for key, done in zip(keys, stars, strict=True)]
    function = _StarsOfFile(files, work, threshold)
    run_missing(run, function, tasks, store=work, prefix="stars/", label="components")
    parent = np.arange(num_nodes, dtype=np.int64)
    for key in stars:
        inner, root = read_array(work, key)
        if len(inner) and int(inner.max()) >= num_nodes:
            raise DataError(f"an edge names row {int(inner.max())}, the pool has {num_nodes}; join these images again")
        hang(parent, inner, root)
    return _flat(parent)

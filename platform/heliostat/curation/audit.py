"""How many edges a join found: exact search for the pairs of a sample of images, counted by similarity band.

A sample of 1,000 images against a billion costs a thousandth of a millionth of comparing all with all, so every join is
audited.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heliostat.curation.copies_config import JoinConfig
from heliostat.curation.edges import RECORD, edge_keys, read_edges
from heliostat.curation.products import Operand, operand, rank_in_runs, similar_pairs
from heliostat.curation.slices import DONE, read_slices, run_missing, write_slices
from heliostat.curation.strips import sample_rows, strip_operand, strips_of
from heliostat.curation.tasks import TaskMap
from heliostat.curation.vectors import Block, Vectors
from heliostat.storage import Store

BANDS = (0.45, 0.6, 0.7, 0.8, 0.9)
"""Similarities at which a band begins; the floor of the join begins the first, and 1 ends the last."""


@dataclass(frozen=True)
class Band:
    """Edges of sampled images with low <= similarity < high: how many there are, and how many of them the join stored."""

    low: float
    high: float
    num_true: int
    num_found: int

    @property
    def recall(self) -> float | None:
        """Share found; None where the sample has none."""
        return self.num_found / self.num_true if self.num_true else None


@dataclass(frozen=True)
class Audit:
    """num_images: sampled; bands: ascending, the whole range from the floor to 1."""

    num_images: int
    bands: tuple[Band, ...]

    @property
    def recall(self) -> float | None:
        """Share found over all bands; None where the sample has no edges."""
        num_true = sum(band.num_true for band in self.bands)
        return sum(band.num_found for band in self.bands) / num_true if num_true else None


@dataclass(frozen=True)
class _TruePairs:
    """Task: pairs of the sampled rows with one strip, exactly."""

    vectors: Vectors
    work: Store
    rows: tuple[int, ...]
    config: JoinConfig

    def __call__(self, task: Mapping[str, Any]) -> Mapping[str, Any]:
        # Numbered beyond the pool, for a sampled image is not the end of an edge that it finds itself.
        beyond = self.vectors.num_rows
        sample = _operand_of(self.vectors, np.array(self.rows, np.int64) + beyond, self.work)
        strip = strip_operand(self.vectors, (task["strip"][0], task["strip"][1]))
        # One more than the neighbours stored: a sampled row finds itself, too.
        pairs = similar_pairs(sample, strip, self.config.floor, neighbors=self.config.neighbors + 1, same=False)
        found = np.empty(len(pairs.first), RECORD)
        found["node"], found["other"], found["similarity"] = pairs.first - beyond, pairs.second, pairs.similarity
        write_slices(self.work, str(task["key"]), found, np.zeros(len(found), np.int64), 1)
        return {"done": task["done"]}


def _operand_of(vectors: Vectors, rows: NDArray[np.int64], work: Store) -> Operand:
    values = read_slices(work, ["audit/sample"], range(1), np.dtype(("<f2", (vectors.dimension,))))
    return operand(Block(rows, values.reshape(-1, vectors.dimension)), "sample")


@dataclass(frozen=True)
class _StoredPairs:
    """Task: the stored edges of sampled rows in one file, as records of the sampled node."""

    files: Store
    work: Store
    rows: tuple[int, ...]

    def __call__(self, task: Mapping[str, Any]) -> Mapping[str, Any]:
        edges = read_edges(self.files, str(task["file"]))
        rows = np.array(self.rows, np.int64)
        by_first, by_second = np.isin(edges.first, rows), np.isin(edges.second, rows)
        found = np.empty(int(by_first.sum() + by_second.sum()), RECORD)
        found["node"] = np.concatenate([edges.first[by_first], edges.second[by_second]])
        found["other"] = np.concatenate([edges.second[by_first], edges.first[by_second]])
        found["similarity"] = np.concatenate([edges.similarity[by_first], edges.similarity[by_second]])
        write_slices(self.work, str(task["key"]), found, np.zeros(len(found), np.int64), 1)
        return {"done": task["done"]}


def audit_edges(
    vectors: Vectors,
    *,
    files: Store,
    prefix: str,
    work: Store,
    config: JoinConfig,
    run: TaskMap,
    first_new_row: int = 0,
    seed: int = 0,
) -> Audit:
    """Compare the edges under `prefix` with the exact ones of config.audit_rows images from `first_new_row` on."""
    sample = sample_rows(vectors, config.audit_rows, first_row=first_new_row, seed=seed)
    rows = tuple(sample.rows.tolist())
    values = np.ascontiguousarray(sample.vectors, "<f2")
    records = values.view(np.dtype(("V", 2 * vectors.dimension))).ravel()
    write_slices(work, "audit/sample", records, np.zeros(len(rows), np.int64), 1)
    strips = strips_of(vectors, config.rows_per_strip)
    true_keys = [f"audit/true-{number:06d}" for number in range(len(strips))]
    tasks: list[Mapping[str, Any]] = [
        {"strip": strip, "key": key, "done": key + DONE} for strip, key in zip(strips, true_keys, strict=True)
    ]
    run_missing(run, _TruePairs(vectors, work, rows, config), tasks, store=work, prefix="audit/true-", label="audit")
    names = edge_keys(files, prefix)
    stored_keys = [f"audit/stored-{number:06d}" for number in range(len(names))]
    tasks = [{"file": name, "key": key, "done": key + DONE} for name, key in zip(names, stored_keys, strict=True)]
    run_missing(run, _StoredPairs(files, work, rows), tasks, store=work, prefix="audit/stored-", label="audit")
    true = read_slices(work, true_keys, range(1), RECORD)
    stored = read_slices(work, stored_keys, range(1), RECORD)
    return Audit(len(rows), count_found(true, stored, config.floor, config.neighbors))


def count_found(true: NDArray[Any], stored: NDArray[Any], floor: float, neighbors: int) -> tuple[Band, ...]:
    """Bands of the `neighbors` best true pairs of each node. true, stored: RECORD arrays of the same sampled nodes."""
    true = true[true["node"] != true["other"]]
    true = true[np.lexsort((true["other"], -true["similarity"], true["node"]))]
    true = true[rank_in_runs(true["node"]) < neighbors]
    nodes = np.unique(true["node"])  # a few thousand at most, so that a node and a row fit into 63 bits
    keys = (np.searchsorted(nodes, part["node"]) * (1 << 48) + part["other"] for part in (true, stored))
    found = np.isin(*keys)
    edges = [floor, *(begin for begin in BANDS if begin > floor), np.inf]
    similarity = true["similarity"].astype(np.float64)
    edges[0] = -np.inf
    bands = []
    for low, high in itertools.pairwise(edges):
        within = (similarity >= low) & (similarity < high)
        bands.append(Band(max(low, floor), min(high, 1.0), int(within.sum()), int(found[within].sum())))
    return tuple(bands)

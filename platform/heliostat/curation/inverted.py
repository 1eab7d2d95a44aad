"""Neighbours through an inverted file of FAISS: one index for the pool, candidates from its codes, exact re-scoring.

The index is built in one process and lies as an object in the work store, where every task loads it: for pools whose codes fit
into the memory of a worker (D/4 + 8 bytes an image). Beyond, the self-join goes through buckets. Codes are too coarse to hold a
threshold (a rank-10 intersection of 0.6 on Deep1B, FAISS's benchs/README), so the stored vectors of all candidates are
compared.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heliostat.curation.buckets import distinct_pairs
from heliostat.curation.copies_config import JoinConfig
from heliostat.curation.edges import write_pairs
from heliostat.curation.index import add_to_inverted_file, load_index, save_index, search_inverted_file, train_inverted_file
from heliostat.curation.products import Operand, Pairs, exact_similarities
from heliostat.curation.slices import DONE, run_missing
from heliostat.curation.strips import sample_rows, strip_operand, strips_of
from heliostat.curation.tasks import TaskMap
from heliostat.curation.vectors import Vectors
from heliostat.storage import Store

# Shapes: Q queries, k candidates, E pairs.

TRAINING_ROWS = 500_000
"""Vectors that the lists and codes are fitted on: FAISS wants 39 per list, and 8 sqrt(N) lists at 2.5e8 images are 126,000."""

INDEX_KEY = "inverted-file"

CANDIDATES_PER_NEIGHBOR = 4
"""Self-join: images taken from the index for each pair that may be stored."""


def write_inverted_file(vectors: Vectors, work: Store, *, seed: int) -> None:
    """Build the index of all vectors, unless it lies in the work store already."""
    if work.size(INDEX_KEY) is not None:
        return
    sample = sample_rows(vectors, TRAINING_ROWS, seed=seed).vectors.astype(np.float32)
    index = train_inverted_file(sample, vectors.num_rows, seed=seed)
    for block in range(vectors.num_blocks):
        rows, values = vectors.read(block)
        if len(rows):
            add_to_inverted_file(index, values.astype(np.float32), rows)
    save_index(index, work, INDEX_KEY)


def scored_candidates(
    queries: Operand, candidates: NDArray[np.int64], database: Vectors
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """(query position, row, exact similarity) of (Q, k) candidate rows; -1 is left out. Reads every block of the database
    once."""
    query = np.repeat(np.arange(len(queries)), candidates.shape[1])
    row = candidates.ravel()
    order = np.argsort(row, kind="stable")
    order = order[row[order] >= 0]
    query, row = query[order], row[order]
    similarity = np.empty(len(row), np.float32)
    for block in range(database.num_blocks):
        rows, values = database.read(block)
        if not len(rows):
            continue
        here = slice(*np.searchsorted(row, [rows[0], rows[-1] + 1]))
        position = np.searchsorted(rows, row[here])
        similarity[here] = exact_similarities(queries.stored, values, (query[here], position))
    return query, row, similarity


@dataclass(frozen=True)
class InvertedPairs:
    """Task: the pairs of the images of one strip with those that the index names."""

    vectors: Vectors
    work: Store
    config: JoinConfig
    first_new_row: int

    def __call__(self, task: Mapping[str, Any]) -> Mapping[str, Any]:
        config = self.config
        strip = strip_operand(self.vectors, (task["strip"][0], task["strip"][1]))
        index = load_index(self.work, INDEX_KEY, self.vectors.dimension)
        candidates = np.empty((0, 1), np.int64)
        if len(strip):
            wanted = CANDIDATES_PER_NEIGHBOR * (config.neighbors + 1)  # an image finds itself, too
            candidates = search_inverted_file(index, strip.stored.astype(np.float32), wanted, num_probes=config.num_probes)
        query, row, similarity = scored_candidates(strip, candidates, self.vectors)
        first = strip.rows[query]
        kept = (similarity >= np.float32(config.floor)) & (first != row)
        kept &= np.maximum(first, row) >= self.first_new_row
        pairs = distinct_pairs(Pairs(first[kept], row[kept], similarity[kept]))
        write_pairs(self.work, str(task["key"]), pairs, num_rows=self.vectors.num_rows, rows_per_range=config.rows_per_range)
        return {"done": task["done"]}


def inverted_join(
    vectors: Vectors, *, work: Store, pieces: str, config: JoinConfig, run: TaskMap, first_new_row: int, seed: int
) -> None:
    """Leave the pairs found through the index as pieces for `merge_edges`."""
    strips = strips_of(vectors, config.rows_per_strip)
    if not strips or not len(sample_rows(vectors, 1, seed=seed).rows):
        return
    write_inverted_file(vectors, work, seed=seed)
    tasks = []
    for number, strip in enumerate(strips):
        key = f"{pieces}{number:06d}"
        tasks.append({"strip": strip, "key": key, "done": key + DONE})
    function = InvertedPairs(vectors, work, config, first_new_row)
    run_missing(run, function, tasks, store=work, prefix=pieces, label="join by inverted file")

"""The self-join: every pair of similar images of a pool, written as edges of the copy graph.

    exact      this file: every pair of strips is one task
    buckets    buckets.py: every overlapping bucket is one task, cost linear in the pool
    faiss      inverted.py: an inverted file, searched by one task per strip

All write the same edges with the same similarities as far as they find them (products.py), and the audit says how far that is.
Each task writes one object named by the task, so a run that was stopped goes on where it was.
"""

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from heliostat.curation.audit import Audit, audit_edges
from heliostat.curation.buckets import bucket_join
from heliostat.curation.copies_config import JoinConfig
from heliostat.curation.edges import edge_keys, merge_edges, write_pairs
from heliostat.curation.inverted import inverted_join
from heliostat.curation.products import NO_PAIRS, Pairs, similar_pairs
from heliostat.curation.slices import DONE, run_missing
from heliostat.curation.strips import blocks_before, strip_operand, strips_of
from heliostat.curation.tasks import TaskMap
from heliostat.curation.vectors import Vectors
from heliostat.storage import Store, one_line_if_damaged


@dataclass(frozen=True)
class JoinSummary:
    """What a self-join did. via: how; floor: smallest similarity stored; num_edges: pairs stored; seconds: of this run alone;
    audit: the share of edges found, from exact search of a sample."""

    via: str
    num_rows: int
    first_new_row: int
    floor: float
    num_edges: int
    seconds: float
    audit: Audit

    def to_json(self) -> dict[str, Any]:
        """For a record or a report."""
        return asdict(self)


@dataclass(frozen=True)
class ExactPairs:
    """Task: all pairs between two strips, or within one."""

    vectors: Vectors
    work: Store
    config: JoinConfig
    first_new_row: int

    def __call__(self, task: Mapping[str, Any]) -> Mapping[str, Any]:
        config, (top, left) = self.config, task["strips"]
        first = strip_operand(self.vectors, (top[0], top[1]))
        same = top == left
        second = first if same else strip_operand(self.vectors, (left[0], left[1]))
        pairs = NO_PAIRS
        if len(second) and int(second.rows[-1]) >= self.first_new_row:
            pairs = similar_pairs(first, second, config.floor, neighbors=config.neighbors, same=same)
        pairs = new_pairs(pairs, self.first_new_row)
        key = str(task["key"])
        write_pairs(self.work, key, pairs, num_rows=self.vectors.num_rows, rows_per_range=config.rows_per_range)
        return {"done": task["done"]}


def new_pairs(pairs: Pairs, first_new_row: int) -> Pairs:
    """Pairs with a row of the new crawl; those between two old rows were stored when the old rows were joined.

    They were counted among the best of an image all the same: what is left out for them is not among the best of all either.
    """
    if first_new_row == 0:
        return pairs
    new = (pairs.first >= first_new_row) | (pairs.second >= first_new_row)
    return Pairs(pairs.first[new], pairs.second[new], pairs.similarity[new])


def exact_join(vectors: Vectors, *, work: Store, pieces: str, config: JoinConfig, run: TaskMap, first_new_row: int = 0) -> None:
    """Leave the pairs of every two strips as pieces for `merge_edges`; N squared / 2 products of length D."""
    strips = strips_of(vectors, config.rows_per_strip)
    old_blocks = blocks_before(vectors, first_new_row)
    tasks = []
    for left, second in enumerate(strips):
        if second[1] > old_blocks:
            for top, first in enumerate(strips[: left + 1]):
                key = f"{pieces}{top:05d}-{left:05d}"
                tasks.append({"strips": [first, second], "key": key, "done": key + DONE})
    function = ExactPairs(vectors, work, config, first_new_row)
    run_missing(run, function, tasks, store=work, prefix=pieces, label="exact join")


def self_join(
    vectors: Vectors,
    *,
    files: Store,
    prefix: str,
    work: Store,
    config: JoinConfig,
    run: TaskMap,
    first_new_row: int = 0,
    seed: int = 0,
) -> JoinSummary:
    """Find the pairs of similar images and write them as Parquet under `prefix` of `files` (`edges.iterate_edges`).

    Stored are pairs with similarity >= config.floor that are among the config.neighbors best of either image. first_new_row:
    rows below it were joined before; pairs of two of them are not looked for, and `merge_edge_files` puts old and new together.
    seed: of the centroids and of the audit's sample. work: where unfinished work lies; it may go once the join is done.
    """
    started = time.perf_counter()
    via = config.via
    if via == "auto":
        via = "exact" if vectors.num_rows <= config.exact_max_rows else "buckets"
    folder = f"join-{_digest(vectors, config, via, first_new_row, seed)}"
    work = work.child(folder)
    if via == "exact":
        exact_join(vectors, work=work, pieces="pairs/", config=config, run=run, first_new_row=first_new_row)
    elif via == "buckets":
        bucket_join(vectors, work=work, pieces="pairs/", config=config, run=run, first_new_row=first_new_row, seed=seed)
    else:
        inverted_join(vectors, work=work, pieces="pairs/", config=config, run=run, first_new_row=first_new_row, seed=seed)
    merge_edges(
        work,
        "pairs/",
        files,
        prefix,
        run,
        num_rows=vectors.num_rows,
        rows_per_range=config.rows_per_range,
        neighbors=config.neighbors,
    )
    audit = audit_edges(
        vectors, files=files, prefix=prefix, work=work, config=config, run=run, first_new_row=first_new_row, seed=seed
    )
    return JoinSummary(
        via=via,
        num_rows=vectors.num_rows,
        first_new_row=first_new_row,
        floor=config.floor,
        num_edges=count_edges(files, prefix),
        seconds=time.perf_counter() - started,
        audit=audit,
    )


def count_edges(files: Store, prefix: str) -> int:
    """Edges stored under a prefix, from the footers of the files."""
    count = 0
    for key in edge_keys(files, prefix):
        data = files.read(key)
        with one_line_if_damaged(files, key):
            count += pq.read_metadata(pa.BufferReader(data)).num_rows
    return count


def _digest(vectors: Vectors, config: JoinConfig, via: str, first_new_row: int, seed: int) -> str:
    """What the intermediate objects depend on; other settings work in another folder."""
    facts = [config.model_dump(mode="json"), config.floor, via, vectors.num_rows, vectors.num_blocks, vectors.dimension]
    return hashlib.sha256(json.dumps([*facts, first_new_row, seed]).encode()).hexdigest()[:12]

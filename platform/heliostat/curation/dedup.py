"""Dedup: features -> which images go because nobody may use them, which are copies of which, and which show test images.

decode -> forgotten -> nsfw -> exact -> hash -> copies -> decontaminate. Vectors stay in their files; edges go to Parquet.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from heliostat.curation.config import DedupConfig
from heliostat.curation.contamination import decontaminate
from heliostat.curation.copies import find_copies
from heliostat.curation.copies_config import CopyLimits, JoinConfig
from heliostat.curation.copies_report import describe_copies
from heliostat.curation.copies_rows import CopiesRows
from heliostat.curation.edges import Edges, edge_keys, merge_edge_files, read_edges, write_edges
from heliostat.curation.forget_list import ForgetList
from heliostat.curation.hash_copies import hash_copies
from heliostat.curation.join import JoinSummary, self_join
from heliostat.curation.ledger import FORGOTTEN, Decisions, named_reasons, same_reason
from heliostat.curation.pca_hash import HashColumns
from heliostat.curation.pool import FeatureFiles, Pool, PoolColumns, check_same_spaces, read_columns
from heliostat.curation.tasks import TaskMap
from heliostat.curation.vectors import Vectors
from heliostat.storage import Store

# Shapes: N rows of the pool, n rows that reach a stage.

EDGES = "edges/"
_MASKS = "masks/"
_NEW_EDGES = "new-edges/"
_OLD_EDGES = "old-edges/"


@dataclass(frozen=True)
class DedupInputs:
    """What a dedup reads. references: evaluation sets by name. forgotten: what nobody may use any more. old_rows: rows at the
    beginning whose edges are known already; old_edges: the store and prefix that hold them."""

    pool: Pool
    references: Mapping[str, FeatureFiles]
    forgotten: ForgetList
    old_rows: int = 0
    old_edges: tuple[Store, str] | None = None


@dataclass(frozen=True)
class Deduplicated:
    """What a dedup found: the rows, the decisions so far, the thresholds in force, and figures for copies.json."""

    rows: CopiesRows
    decisions: Decisions
    settings: Mapping[str, float | None]
    statistics: Mapping[str, Any]


@dataclass(frozen=True)
class _Places:
    """files: where the result goes. work: where unfinished work lies."""

    files: Store
    work: Store
    run: TaskMap
    seed: int


def dedup(inputs: DedupInputs, config: DedupConfig, *, files: Store, work: Store, run: TaskMap, seed: int = 0) -> Deduplicated:
    """Judge every image of the pool; edges are written below `edges/` of `files`.

    Raises DataError for features of different embedders or an empty pool.
    """
    pool, places = inputs.pool, _Places(files, work, run, seed)
    check_same_spaces([*pool.members, *inputs.references.values()])
    columns = read_columns(pool)
    found = CopiesRows.empty(columns.num_rows)
    decisions, statistics = Decisions.of(columns.num_rows), dict[str, Any]()
    _judge_content(inputs, columns, config, decisions)
    rank = columns.quality_rank()
    if config.exact.enabled:
        _exact(columns, decisions, found)
    if config.hash.enabled:
        _hash(columns, rank, config, decisions, found)
    limits = config.copies.limits(pool.members[0].info.copy_space.name)
    if config.copies.enabled:
        statistics |= _copies(inputs, config, rank, limits, places=places, decisions=decisions, found=found)
    if inputs.references:
        statistics["decontaminate"] = _decontaminate(inputs, limits, places=places, decisions=decisions, found=found)
    found["cause"] = decisions.cause
    return Deduplicated(CopiesRows(**found), decisions, _settings(inputs, config, limits), statistics)


def _settings(inputs: DedupInputs, config: DedupConfig, limits: CopyLimits) -> dict[str, float | None]:
    """Thresholds by the names that the ledger quotes; None for what was not asked."""
    on = config.copies.enabled
    return {
        "max_nsfw_score": config.max_nsfw_score,
        "dup_threshold": limits.threshold if on else None,
        "min_similarity_to_representative": limits.min_similarity_to_representative if on else None,
        "decontamination_threshold": limits.decontamination_threshold if inputs.references else None,
    }


def _judge_content(inputs: DedupInputs, columns: PoolColumns, config: DedupConfig, decisions: Decisions) -> None:
    """decode, forgotten, nsfw."""
    names = [table.combine_chunks() for _, table in inputs.pool.blocks(["reason"])]
    reasons = pa.concat_tables(names)["reason"]
    reasons = pc.if_else(pc.equal(reasons, FORGOTTEN), "", reasons)  # features that `forget` has blanked since
    decisions.judge(named_reasons("decode", decisions.rows, reasons))
    gone = forgotten_rows(inputs.pool, columns.ids, inputs.forgotten)
    if gone.any() or not inputs.forgotten.is_empty:
        decisions.judge(same_reason("forgotten", decisions.rows, gone[decisions.rows], "asked_to_forget"))
    if not np.isnan(columns.nsfw).all():
        above = columns.nsfw[decisions.rows] > config.max_nsfw_score  # NaN is not above
        decisions.judge(same_reason("nsfw", decisions.rows, above, "above_nsfw_threshold"))


def forgotten_rows(pool: Pool, ids: NDArray[np.uint8], forgotten: ForgetList) -> NDArray[np.bool_]:
    """bool (N,): images of the pool that the list knows, or that `forget` has blanked. ids: (N, 32) uint8, theirs."""
    gone = forgotten.matches(ids, None)
    names = ["reason"] if forgotten.is_empty else ["reason", "source"]  # names of a billion images are long to read
    for start, table in pool.blocks(names):
        here = np.asarray(pc.equal(table["reason"], FORGOTTEN).to_numpy(), np.bool_)
        gone[start : start + len(here)] |= here
        if "source" in names:
            gone[start : start + len(here)] |= forgotten.matches(None, table["source"])
    return gone


def _exact(columns: PoolColumns, decisions: Decisions, found: dict[str, NDArray[Any]]) -> None:
    """Of files with the same bytes the first row stays: their quality is the same, and old images stay what they were."""
    rows = decisions.rows
    words = np.ascontiguousarray(columns.ids[rows]).view(">u8").astype(np.uint64)
    order = np.lexsort((rows, words[:, 3], words[:, 2], words[:, 1], words[:, 0]))
    ordered = words[order]
    starts = np.ones(len(rows), np.bool_)
    starts[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = np.flatnonzero(starts)[np.cumsum(starts) - 1] if len(rows) else np.empty(0, np.int64)
    survivor = np.empty(len(rows), np.int64)
    survivor[order] = rows[order[first]]
    distance = np.zeros(len(rows), np.float32)
    _drop_duplicates("exact", "exact_duplicate", survivor, distance=distance, decisions=decisions, found=found)


def _hash(
    columns: PoolColumns, rank: NDArray[np.int64], config: DedupConfig, decisions: Decisions, found: dict[str, NDArray[Any]]
) -> None:
    rows, hashes = decisions.rows, columns.hashes
    own = HashColumns(hashes.code[rows], hashes.coarse[rows], hashes.contrast[rows])
    own_rank = np.empty(len(rows), np.int64)
    own_rank[np.argsort(rank[rows])] = np.arange(len(rows))
    copies = hash_copies(own, own_rank, config.hash)
    survivor = rows[copies.survivor]
    _drop_duplicates("hash", "hash_copy", survivor, distance=copies.distance, decisions=decisions, found=found)


def _drop_duplicates(
    stage: str,
    reason: str,
    survivor: NDArray[np.int64],
    *,
    distance: NDArray[np.float32],
    decisions: Decisions,
    found: dict[str, NDArray[Any]],
) -> None:
    """survivor: the row that stays for each row that is still in; distance: to it, by hash."""
    rows = decisions.rows
    dropped = survivor != rows
    found["duplicate_of"][rows[dropped]] = survivor[dropped]
    found["hash_distance"][rows[dropped]] = distance[dropped]
    decisions.judge(same_reason(stage, rows, dropped, reason))


def _copies(
    inputs: DedupInputs,
    config: DedupConfig,
    rank: NDArray[np.int64],
    limits: CopyLimits,
    *,
    places: _Places,
    decisions: Decisions,
    found: dict[str, NDArray[Any]],
) -> dict[str, Any]:
    """Join what is left, find components; every dropped duplicate gets the component of the image that stays for it."""
    pool, rows = inputs.pool, decisions.rows
    present = np.zeros(pool.num_rows, np.bool_)
    present[rows] = True
    vectors = pool.vectors("copy", pool.write_masks(places.work, _MASKS, present))
    join = config.join.resolved(pool.members[0].info.copy_space.name)
    summary = _join(inputs, join, vectors, present, places)
    copies = find_copies(
        (places.files, EDGES),
        vectors,
        rank,
        limits,
        edge_floor=join.floor,
        work=places.work.child("copies"),
        run=places.run,
        present=present,
    )
    has_nearest = copies.nearest >= 0
    found["nearest"][has_nearest] = copies.nearest[has_nearest]
    found["similarity"][has_nearest] = copies.nearest_similarity[has_nearest]
    stays = _followed(found["duplicate_of"])
    judged = copies.component[stays] >= 0
    found["component"][judged] = copies.component[stays[judged]]
    found["representative"][judged] = copies.representative[stays[judged]]
    found["similarity_to_representative"][:] = np.nan  # of a duplicate it is not known
    found["similarity_to_representative"][rows] = copies.similarity_to_representative[rows]
    decisions.judge(same_reason("copies", rows, copies.dropped[rows], "copy"))
    joined = {
        name: value for name, value in summary.to_json().items() if name != "seconds"
    }  # a repeated run gives the same file
    return {"join": joined, "components": describe_copies(copies).to_json()}


def _followed(duplicate_of: NDArray[np.int64]) -> NDArray[np.int64]:
    """(N,) the row that stays for each row: exact duplicates lead to one that may itself be a hash copy of another."""
    stays = np.arange(len(duplicate_of))
    while True:
        further = np.where(duplicate_of[stays] >= 0, duplicate_of[stays], stays)
        if np.array_equal(further, stays):
            return stays
        stays = further


def _join(
    inputs: DedupInputs, config: JoinConfig, vectors: Vectors, present: NDArray[np.bool_], places: _Places
) -> JoinSummary:
    """Edges among the present rows, below `edges/`: all of them found now, or the new ones put to those of an earlier crawl."""
    is_new = inputs.old_edges is None
    files, prefix = (places.files, EDGES) if is_new else (places.work, _NEW_EDGES)
    summary = self_join(
        vectors,
        files=files,
        prefix=prefix,
        work=places.work.child("join"),
        config=config,
        run=places.run,
        first_new_row=inputs.old_rows,
        seed=places.seed,
    )
    if inputs.old_edges is None:
        return summary
    _keep_present(*inputs.old_edges, places.work, present)
    merge_edge_files(
        [(places.work, _OLD_EDGES), (places.work, _NEW_EDGES)],
        files=places.files,
        prefix=EDGES,
        work=places.work.child("merge"),
        run=places.run,
        num_rows=vectors.num_rows,
        rows_per_range=config.rows_per_range,
        neighbors=config.neighbors,
    )
    return summary


def _keep_present(files: Store, prefix: str, work: Store, present: NDArray[np.bool_]) -> None:
    """Old edges without the images that are out now: forgotten, or a duplicate of a better new one."""
    done = {entry.key for entry in work.list(_OLD_EDGES)}
    for number, key in enumerate(edge_keys(files, prefix)):
        target = f"{_OLD_EDGES}{number:06d}.parquet"
        if target not in done:
            edges = read_edges(files, key)
            both = present[edges.first] & present[edges.second]
            write_edges(work, target, Edges(edges.first[both], edges.second[both], edges.similarity[both]))


def _decontaminate(
    inputs: DedupInputs, limits: CopyLimits, *, places: _Places, decisions: Decisions, found: dict[str, NDArray[Any]]
) -> dict[str, Any]:
    """Look at every image that is not forbidden, dropped duplicates too: one of them may be what shows the evaluation image."""
    pool, rows = inputs.pool, decisions.rows
    looked_at = found["component"] >= 0
    component = found["component"]
    if not looked_at.any():  # copies were not looked for: each image alone
        looked_at[rows] = True
        component = np.where(looked_at, np.arange(pool.num_rows), -1)
    masks = pool.write_masks(places.work, "masks-of-all/", looked_at)
    touched = decontaminate(
        pool.vectors("copy", masks),
        {name: features.vectors("copy") for name, features in inputs.references.items()},
        limits.decontamination_threshold,
        component,
        run=places.run,
        work=places.work.child("contamination"),
    )
    found["reference"][:], found["similarity_to_reference"][:] = touched.reference, touched.similarity
    decisions.judge(same_reason("decontaminate", rows, touched.dropped[rows], "shows_evaluation_image"))
    return {name: asdict(count) for name, count in touched.sets.items()}

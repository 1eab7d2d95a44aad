"""Curate: of the images that dedup kept, those that curated sets bring in, evened out over clusters.

retrieval -> balance, over vectors that stay in their files. What is decided goes on in the Decisions that dedup began.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heliostat.curation.balance import balance
from heliostat.curation.composition import CompositionRow, total_row
from heliostat.curation.config import CurateConfig
from heliostat.curation.hierarchy import Hierarchy, hierarchy
from heliostat.curation.ledger import Decisions, Verdicts, same_reason
from heliostat.curation.ledger_facts import RetrievedBy
from heliostat.curation.pool import FeatureFiles, Pool, check_same_spaces, id_bytes
from heliostat.curation.retrieval import REASONS, Retrieved, retrieve
from heliostat.curation.tasks import TaskMap
from heliostat.errors import DataError
from heliostat.storage import Store

# Shapes: N rows of the pool, L levels of clusters, M curated images of all sets.


@dataclass(frozen=True)
class Curation:
    """What curate found. cluster_levels: (N, L) int32, -1 for rows that reached no cluster. matched: (N,) int32 matched cluster
    of retrieval, -1 for none, or None. statistics: JSON-ready."""

    decisions: Decisions
    cluster_levels: NDArray[np.int32]
    retrieved_by: RetrievedBy | None = None
    matched: NDArray[np.int32] | None = None
    composition: tuple[CompositionRow, ...] = ()
    statistics: dict[str, Any] = field(default_factory=dict)


def curate(
    pool: Pool,
    decisions: Decisions,
    sets: Mapping[str, FeatureFiles],
    config: CurateConfig,
    *,
    work: Store,
    run: TaskMap,
    seed: int = 0,
) -> Curation:
    """Go on with the decisions of dedup: which images stay because of the curated sets, and which for the balance.

    sets: features of the curated sets, in the order of the recipe. work: of this pool, these sets and this configuration alone.
    seed: of every draw but those of k-means, which has its own. Raises DataError when no image is left, when no set brings one,
    or for features of different embedders.
    """
    check_same_spaces([*pool.members, *sets.values()], semantic=True)
    if len(decisions.rows) == 0:
        raise DataError("dedup leaves no image; look at its funnel, and loosen copies.threshold or max_nsfw_score")
    retrieved, statistics = None, dict[str, Any]()
    if sets:
        retrieved = _retrieve(pool, decisions, sets, config, work=work.child("retrieval"), run=run, seed=seed)
        statistics["retrieval"] = _retrieval_statistics(retrieved)
    rows = decisions.rows
    masks = pool.write_masks(work, "masks/balance/", _mask(pool.num_rows, rows))
    tree = hierarchy(pool.vectors("semantic", masks), config.clusters, work=work.child("clusters"), run=run, rows=rows)
    balanced = balance(tree, config.balance, seed=seed)
    decisions.judge(same_reason("balance", rows, ~balanced.kept[rows], "over_cluster_level"))
    statistics["balance"] = {
        "target_images": config.balance.target_images,
        "kept_images": balanced.target,
        "levels": balanced.levels,
    }
    return Curation(
        decisions,
        _levels(tree),
        _retrieved_by(retrieved, sets) if retrieved is not None else None,
        _matched(retrieved) if retrieved is not None else None,
        retrieved.composition if retrieved is not None else (),
        statistics,
    )


def _mask(num_rows: int, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    mask = np.zeros(num_rows, np.bool_)
    mask[rows] = True
    return mask


def _retrieve(
    pool: Pool,
    decisions: Decisions,
    sets: Mapping[str, FeatureFiles],
    config: CurateConfig,
    *,
    work: Store,
    run: TaskMap,
    seed: int,
) -> Retrieved:
    rows = decisions.rows
    masks = pool.write_masks(work, "masks/", _mask(pool.num_rows, rows))
    found = retrieve(
        pool.vectors("semantic", masks),
        {name: features.vectors("semantic") for name, features in sets.items()},
        config.retrieval,
        clusters=config.clusters,
        seed=seed,
        work=work,
        run=run,
        rows=rows,
    )
    if all(one.mode == "none" for one in found.sets):
        return found  # sets that only join as they are say nothing about the pool
    codes = found.reason[rows].astype(np.uint8)
    decisions.judge(Verdicts("retrieval", rows, ~found.kept[rows], REASONS, codes))
    return found


def _retrieval_statistics(found: Retrieved) -> dict[str, Any]:
    coverage = []
    for position, one in enumerate(found.sets):
        mine = found.links.set == position
        images = next((row.images for row in found.composition if row.dataset == one.name), 0)
        reached = len(np.unique(found.links.curated[mine]))
        coverage.append(
            {
                "set": one.name,
                "mode": one.mode,
                "images": images,
                "images_that_retrieved": reached,
                "coverage": reached / images if images else 0.0,
                "mean_similarity": float(found.links.similarity[mine].mean()) if mine.any() else None,
                "why_nothing": found.unmatched.get(one.name, ""),
            }
        )
    return {
        "sets": coverage,
        "composition": [row._asdict() for row in found.composition],
        "total": dict(total_row(found.composition)),
        "num_matched_clusters": 0 if found.matched is None else len(np.unique(found.matched.cluster)),
        "settings": [dict(one._asdict()) for one in found.sets],
    }


def _retrieved_by(found: Retrieved, sets: Mapping[str, FeatureFiles]) -> RetrievedBy:
    """The links with the ids of the curated images, numbered over all sets."""
    ids, first = list[NDArray[np.uint8]](), dict[str, int]()
    for name, features in sets.items():
        first[name] = sum(len(one) for one in ids)
        ids += [id_bytes(features.read(block, ["id"])["id"]) for block in range(len(features.keys))]
    links = found.links
    starts = np.array([first[one.name] for one in found.sets], np.int64)
    return RetrievedBy(
        pool=links.pool,
        curated=links.curated + starts[links.set],
        rank=links.rank,
        similarity=links.similarity,
        set_code=links.set.astype(np.uint8),
        sets=tuple((one.name, one.mode) for one in found.sets),
        curated_ids=np.concatenate(ids) if ids else np.empty((0, 32), np.uint8),
    )


def _matched(found: Retrieved) -> NDArray[np.int32] | None:
    """The matched cluster of each row that lies in one."""
    if found.matched is None or found.cluster is None:
        return None
    return np.where(np.isin(found.cluster, found.matched.cluster), found.cluster, np.int32(-1)).astype(np.int32)


def _levels(tree: Hierarchy) -> NDArray[np.int32]:
    return np.stack([tree.clusters_of(level) for level in range(1, tree.num_levels + 1)], axis=1)

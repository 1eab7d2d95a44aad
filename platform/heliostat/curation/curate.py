"""Curate: exact -> copies -> decontaminate -> retrieval -> clusters -> balance, as one plain function over arrays.

Rows are first put in the order of (id, source), so that the outcome does not depend on the order in which shards were written.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from heliostat.curation.balance import balanced_sample, resolve_target
from heliostat.curation.clusters import Clusters, assign_clusters, entropy, evenness
from heliostat.curation.config import BalanceConfig, ClustersConfig, CopyLimits, CurateConfig, RetrievalConfig
from heliostat.curation.copies import decontaminate, find_copies
from heliostat.curation.hashing import group_exact
from heliostat.curation.ledger import FunnelStep, Verdicts, build_ledger, funnel, same_reason, spread
from heliostat.curation.retrieval import Links, Retrieved, retrieve_by_cluster, retrieve_by_sample
from heliostat.errors import DataError

# Shapes: N manifest rows, M curated images, R rows that reached a stage, D dimension.

MANIFEST_COLUMNS = ("id", "shard", "offset", "length", "width", "height", "format", "source", "label")
REJECTED_COLUMNS = ("source", "reason", "detail")


@dataclass(frozen=True)
class _ReferenceSet:
    """Images from outside the pool: a curated set to retrieve by, or evaluation images to stay clear of."""

    embeddings: NDArray[np.float32]
    ids: Sequence[str]


@dataclass(frozen=True)
class Curation:
    """What curate found. kept_ids are sorted; statistics is JSON-ready; ledger and funnel are described in ledger.py."""

    ledger: pa.Table
    kept_ids: list[str]
    funnel: list[FunnelStep]
    statistics: dict[str, Any]


@dataclass
class _Progress:
    """The run so far: the sorted manifest, rows still in, and what stages found. Lives inside one call of `curate`."""

    manifest: pa.Table
    rows: NDArray[np.int64]
    verdicts: list[Verdicts] = field(default_factory=list)
    facts: dict[str, pa.Array] = field(default_factory=dict)
    statistics: dict[str, Any] = field(default_factory=dict)

    @property
    def ids(self) -> pa.ChunkedArray:
        return self.manifest["id"]

    def judge(self, verdicts: Verdicts) -> None:
        self.verdicts.append(verdicts)
        self.rows = verdicts.kept_rows

    def note(self, rows: NDArray[np.int64], **columns: pa.Array) -> None:
        """Record facts about `rows`; every other row has null."""
        for name, values in columns.items():
            self.facts[name] = spread(values, rows, self.manifest.num_rows)


def curate(
    manifest: pa.Table,
    *,
    rejected: pa.Table,
    embeddings: NDArray[np.float32],
    config: CurateConfig,
    curated_embeddings: NDArray[np.float32] | None = None,
    curated_ids: Sequence[str] = (),
    semantic_embeddings: NDArray[np.float32] | None = None,
    evaluation_embeddings: NDArray[np.float32] | None = None,
    evaluation_ids: Sequence[str] = (),
    seed: int = 0,
) -> Curation:
    """Decide which images of a manifest to keep, and say why for each.

    manifest: one row per decodable file, columns MANIFEST_COLUMNS. rejected: files that could not be decoded, columns
    REJECTED_COLUMNS. embeddings: (N, D) in manifest order, for copies. semantic_embeddings: (N, D'), for retrieval and
    clusters; `embeddings` when left out. curated_embeddings, curated_ids: images to retrieve by, embedded as the semantic
    embeddings. evaluation_embeddings, evaluation_ids: images to decontaminate against, embedded as `embeddings`. seed: of
    every draw except k-means, which has its own.
    Raises DataError when shapes disagree, a column is missing, or retrieval is asked for without curated images.
    """
    _check(manifest, rejected, embeddings, semantic_embeddings)
    curated = _reference_set("curated", curated_embeddings, curated_ids)
    evaluation = _reference_set("evaluation", evaluation_embeddings, evaluation_ids)
    order = np.lexsort((_strings(manifest["source"]), _strings(manifest["id"])))
    manifest, embeddings = manifest.take(order).combine_chunks(), embeddings[order]
    semantic = embeddings if semantic_embeddings is None else semantic_embeddings[order]
    rejected = rejected.sort_by("source")

    progress = _Progress(manifest, np.arange(manifest.num_rows))
    survivor_N = _exact(progress, enabled=config.exact.enabled)
    if config.copies.enabled:
        limits = config.copies.limits(config.embed.embedder)
        component_N = _copies(progress, embeddings, survivor_N, limits, num_neighbors=config.copies.neighbors)
        if evaluation is not None:
            _decontaminate(progress, embeddings, component_N, evaluation, threshold=limits.decontamination_threshold)
    elif evaluation is not None:
        raise DataError("decontamination drops whole components of copies; set copies.enabled=true")
    if config.retrieval.mode != "none":
        _retrieve(progress, semantic, curated, config.retrieval, clusters=config.clusters, seed=seed)
    clusters = _cluster(progress, semantic, config.clusters)
    _balance(progress, clusters, config.balance, seed=seed)

    ledger = build_ledger(manifest, rejected, progress.verdicts, progress.facts)
    kept_ids = sorted(set(progress.ids.take(progress.rows).to_pylist()))
    return Curation(ledger, kept_ids, funnel(ledger), progress.statistics)


def _reference_set(name: str, embeddings: NDArray[np.float32] | None, ids: Sequence[str]) -> _ReferenceSet | None:
    """None when there are no such images."""
    count = 0 if embeddings is None else len(embeddings)
    if count != len(ids):
        raise DataError(f"{count} {name} embeddings for {len(ids)} {name} ids; give one id per embedding")
    return _ReferenceSet(embeddings, ids) if embeddings is not None and count else None


def _strings(column: pa.ChunkedArray) -> NDArray[np.str_]:
    return np.array(column.to_pylist(), dtype=np.str_)


def _check(
    manifest: pa.Table,
    rejected: pa.Table,
    embeddings: NDArray[np.float32],
    semantic_embeddings: NDArray[np.float32] | None,
) -> None:
    for name, table, columns in (("manifest", manifest, MANIFEST_COLUMNS), ("rejected", rejected, REJECTED_COLUMNS)):
        if missing := [column for column in columns if column not in table.column_names]:
            raise DataError(f"the {name} has no column {missing[0]!r}; it has {', '.join(table.column_names)}")
    for array in (embeddings, semantic_embeddings):
        if array is not None and len(array) != manifest.num_rows:
            raise DataError(f"{len(array)} embeddings for {manifest.num_rows} images; embed every image of the manifest once")


def _exact(progress: _Progress, *, enabled: bool) -> NDArray[np.int64]:
    """Returns the row that stays for each row (itself when exact is off)."""
    if not enabled:
        return progress.rows
    groups = group_exact(_strings(progress.ids), _strings(progress.manifest["source"]))
    progress.judge(same_reason("exact", progress.rows, groups.dropped, "exact_duplicate"))
    progress.statistics["exact"] = {"num_dropped": groups.num_dropped}
    return groups.survivor


def _copies(
    progress: _Progress,
    embeddings: NDArray[np.float32],
    survivor_N: NDArray[np.int64],
    limits: CopyLimits,
    *,
    num_neighbors: int,
) -> NDArray[np.int64]:
    """Returns the component of every row; a dropped exact duplicate has that of its survivor."""
    rows, num_rows = progress.rows, progress.manifest.num_rows
    quality = progress.manifest.select(["id", "width", "height", "format"]).append_column("bytes", progress.manifest["length"])
    found = find_copies(embeddings[rows], quality.take(rows), limits, num_neighbors=num_neighbors)
    position_N = np.empty(num_rows, np.int64)
    position_N[rows] = np.arange(len(rows))
    at_N = position_N[survivor_N]  # where each row, or the twin that stayed for it, is among `rows`
    twin_N = survivor_N != np.arange(num_rows)
    nearest_N = np.where(twin_N, at_N, found.nearest[at_N])
    progress.note(
        np.arange(num_rows),
        component=pa.array(found.component[at_N]),
        representative=_take_ids(progress.ids, rows[found.representative[at_N]]),
        similarity_to_representative=pa.array(found.similarity_to_representative[at_N]),
        nearest_copy=_take_ids(progress.ids, np.where(nearest_N < 0, -1, rows[nearest_N])),
        similarity=pa.array(np.where(twin_N, np.float32(1.0), found.nearest_similarity[at_N]), mask=nearest_N < 0),
        threshold=pa.array(np.full(num_rows, limits.threshold, np.float32), mask=twin_N),
    )
    progress.judge(same_reason("copies", rows, found.dropped, "copy"))
    sizes = np.bincount(found.component) if len(rows) else np.zeros(1, np.int64)
    progress.statistics["copies"] = {
        "num_components": int((sizes > 0).sum()),
        "num_components_of_copies": int((sizes > 1).sum()),
        "largest_component": int(sizes.max()),
        "num_dropped": int(found.dropped.sum()),
        "limits": asdict(limits),
        "guard": {"num_split_components": found.num_split_components, "num_images_saved": found.num_saved},
    }
    return found.component[at_N]


def _take_ids(ids: pa.ChunkedArray | Sequence[str], rows: NDArray[np.int64]) -> pa.Array:
    """ids[rows], null where a row is negative."""
    return _as_array(ids).take(pa.array(rows, mask=rows < 0))


def _as_array(ids: pa.ChunkedArray | Sequence[str]) -> pa.Array:
    return pa.array(ids.to_pylist() if isinstance(ids, pa.ChunkedArray) else list(ids), pa.string())


def _decontaminate(
    progress: _Progress,
    embeddings: NDArray[np.float32],
    component_N: NDArray[np.int64],
    evaluation: _ReferenceSet,
    *,
    threshold: float,
) -> None:
    """Judges the representatives, but looks at every member: a dropped copy may be the one that shows the evaluation image."""
    found = decontaminate(embeddings, evaluation.embeddings, threshold, component=component_N)
    rows = np.arange(progress.manifest.num_rows)
    progress.note(
        rows,
        nearest_reference=_take_ids(evaluation.ids, found.reference),
        similarity_to_reference=pa.array(found.similarity, mask=found.reference < 0),
    )
    progress.judge(same_reason("decontaminate", progress.rows, found.dropped[progress.rows], "shows_evaluation_image"))
    progress.statistics["decontaminate"] = {"num_dropped": int(progress.verdicts[-1].dropped.sum())}


def _retrieve(
    progress: _Progress,
    semantic: NDArray[np.float32],
    curated: _ReferenceSet | None,
    config: RetrievalConfig,
    *,
    clusters: ClustersConfig,
    seed: int,
) -> None:
    if curated is None:
        raise DataError(f"retrieval.mode={config.mode} needs curated images; give them or set retrieval.mode=none")
    rows = progress.rows
    if config.mode == "sample":
        found = retrieve_by_sample(semantic[rows], curated.embeddings, config)
    else:
        found = retrieve_by_cluster(semantic[rows], curated.embeddings, config, clusters=clusters, seed=seed)
    progress.note(rows, retrieved_by=_retrieved_by(found.links, len(rows), curated.ids))
    progress.judge(Verdicts("retrieval", rows, ~found.kept, found.reason))
    progress.statistics["retrieval"] = _retrieval_statistics(found, len(curated.ids))


def _retrieved_by(links: Links, num_rows: int, curated_ids: Sequence[str]) -> pa.Array:
    """One list of (curated_id, rank, similarity) per pool row."""
    offsets = np.searchsorted(links.pool, np.arange(num_rows + 1))
    values = pa.StructArray.from_arrays(
        [_take_ids(curated_ids, links.curated), pa.array(links.rank), pa.array(links.similarity)],
        names=["curated_id", "rank", "similarity"],
    )
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)


def _retrieval_statistics(found: Retrieved, num_curated: int) -> dict[str, Any]:
    return {
        "num_curated": num_curated,
        "num_curated_that_retrieved": len(np.unique(found.links.curated)),
        "num_retrieved": int(found.kept.sum()),
        "num_matched_clusters": found.num_matched_clusters,
    }


def _cluster(progress: _Progress, semantic: NDArray[np.float32], config: ClustersConfig) -> Clusters:
    if len(progress.rows) == 0:
        raise DataError("no image is left to cluster; loosen copies.threshold or retrieval, or add images")
    clusters = assign_clusters(semantic[progress.rows], config.num_clusters, iterations=config.iterations, seed=config.seed)
    progress.note(progress.rows, cluster=pa.array(clusters.assignment.astype(np.int32)))
    return clusters


def _balance(progress: _Progress, clusters: Clusters, config: BalanceConfig, *, seed: int) -> None:
    before_K = clusters.sizes
    target = resolve_target(config.target_images, before_K)
    kept = balanced_sample(clusters.assignment, len(before_K), target, seed=seed)
    after_K = np.bincount(clusters.assignment[kept], minlength=len(before_K)).astype(np.int64)
    progress.judge(same_reason("balance", progress.rows, ~kept, "over_cluster_level"))
    progress.statistics["clusters"] = {"num_clusters": len(before_K), "num_empty": int((before_K == 0).sum())}
    progress.statistics["balance"] = {
        "target_images": config.target_images,
        "target_images_resolved": target,
        "largest_cluster_before": int(before_K.max()),
        "largest_cluster_after": int(after_K.max()),
        "entropy_before_nats": entropy(before_K),
        "entropy_after_nats": entropy(after_K),
        "evenness_before": evenness(before_K),
        "evenness_after": evenness(after_K),
    }

"""What a ledger and the stored edges say of every image of a pool, as arrays: what `what_if` judges again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from heliostat.curation.edges import NO_EDGES, Edges, iterate_edges
from heliostat.curation.ledger import FORGOTTEN
from heliostat.curation.ledger_facts import hex_to_ids
from heliostat.curation.ledger_read import Ledger
from heliostat.curation.pool import LOSSLESS_FORMATS
from heliostat.errors import DataError
from heliostat.storage import Store

# Shapes: N rows of the pool, E edges.

_COLUMNS = ("row", "id", "width", "height", "format", "length", "nsfw", "similarity_to_reference", "stage", "decision")


@dataclass(frozen=True)
class PoolFacts:
    """What the ledger says of every image of the pool, by its row.

    ids: (N, 32) uint8. rank: int64 (N,), quality, 0 the best. nsfw, similarity_to_reference: float32 (N,), NaN for none.
    stage: uint8 (N,), who dropped it: an index into stages, 0 if kept. settings: thresholds that were in force.
    """

    ids: NDArray[np.uint8]
    rank: NDArray[np.int64]
    nsfw: NDArray[np.float32]
    similarity_to_reference: NDArray[np.float32]
    stage: NDArray[np.uint8]
    stages: tuple[str, ...]
    settings: Mapping[str, float | None]

    def dropped_by(self, stages: Sequence[str]) -> NDArray[np.bool_]:
        """bool (N,): rows that one of the stages dropped."""
        codes = [code for code, stage in enumerate(self.stages) if stage in stages]
        return np.asarray(np.isin(self.stage, codes), np.bool_)


def read_pool_facts(ledger: Ledger) -> PoolFacts:
    """Read what `what_if` needs: about 70 bytes an image stay in memory."""
    stages = list(dict.fromkeys(["", *(count.stage for count in ledger.stages), FORGOTTEN]))
    parts = []
    for chunks in ledger.rows(_COLUMNS, pc.field("row").is_valid()):
        table = chunks.combine_chunks()
        stage = pc.if_else(pc.equal(table["decision"], FORGOTTEN), FORGOTTEN, pc.fill_null(table["stage"], ""))
        stage = pc.index_in(stage, value_set=pa.array(stages))
        lossless = pc.fill_null(pc.is_in(table["format"], pa.array(sorted(LOSSLESS_FORMATS))), False)
        pixels = pc.multiply(pc.cast(pc.fill_null(table["width"], 0), "int64"), pc.fill_null(table["height"], 0))
        parts.append(
            (
                table["row"].to_numpy(),
                hex_to_ids(table["id"]),
                np.stack([pixels.to_numpy(), pc.fill_null(table["length"], 0).to_numpy(), lossless.to_numpy()], axis=1),
                pc.fill_null(table["nsfw"], float("nan")).to_numpy(),
                pc.fill_null(table["similarity_to_reference"], float("nan")).to_numpy(),
                pc.fill_null(stage, 0).to_numpy().astype(np.uint8),
            )
        )
    if not parts or not sum(len(part[0]) for part in parts):
        raise DataError(f"the ledger in {ledger.files.uri} holds no image; there is nothing to ask")
    rows, ids, quality, nsfw, similarity, stage_code = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(rows)
    if not np.array_equal(rows[order], np.arange(len(rows))):
        raise DataError(f"the ledger in {ledger.files.uri} does not hold every row of its pool once; curate again")
    ids, quality = ids[order], quality[order]
    return PoolFacts(
        ids, _rank(ids, quality), nsfw[order], similarity[order], stage_code[order], tuple(stages), ledger.settings
    )


def _rank(ids: NDArray[np.uint8], quality: NDArray[np.int64]) -> NDArray[np.int64]:
    """`pool.PoolColumns.quality_rank`: most pixels, lossless, most bytes, smallest id, smallest row. quality: those three."""
    words = np.ascontiguousarray(ids).view(">u8").astype(np.uint64)
    pixels, num_bytes, lossless = quality.T
    rows = np.arange(len(ids))
    keys = (rows, words[:, 3], words[:, 2], words[:, 1], words[:, 0], -num_bytes, -lossless, -pixels)
    rank = np.empty(len(ids), np.int64)
    rank[np.lexsort(keys)] = rows
    return rank


def read_edges_above(store: Store, prefix: str, threshold: float) -> Edges:
    """All stored edges with a similarity above a threshold; file by file, so that the others never lie in memory together."""
    parts = [edges.above(threshold) for edges in iterate_edges(store, prefix)]
    return Edges(*(np.concatenate(column) for column in zip(*parts, strict=True))) if parts else NO_EDGES

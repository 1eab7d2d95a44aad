"""The score of a curation against copies that were planted in its pool, with other descriptors beside it."""

import json
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from heliostat.artifacts import Artifact
from heliostat.curation.copies_rows import CopiesRows
from heliostat.curation.planted_baselines import MAX_IMAGES, Descriptor, baseline_descriptors, baseline_table
from heliostat.curation.planted_score import PlantedScore, score_planted
from heliostat.curation.vectors import read_all
from heliostat.data.config import DecodeConfig
from heliostat.data.decode import ImageRejected, decode
from heliostat.data.shard_reader import ShardReader
from heliostat.runtime.stage_ingest import TRUTH

if TYPE_CHECKING:
    from heliostat.runtime.stage_dedup import CopiesArtifact

PLANTED = "planted.json"
OURS = "this curation"


def truth_of(raws: tuple[Artifact, ...]) -> dict[str, Any] | None:
    """What was planted; None where nothing was, or where the pool has several members, of which names may repeat."""
    if len(raws) != 1 or raws[0].files.size(TRUTH) is None:
        return None
    found: dict[str, Any] = json.loads(raws[0].files.read(TRUTH))
    return found


def representatives(rows: CopiesRows, decoded: NDArray[np.bool_]) -> NDArray[np.int64]:
    """(N,) the row that stays for each image once exact, hash and embedding copies are merged; -1 for what does not decode."""
    own = np.arange(rows.num_rows)
    followed = np.where(rows.representative >= 0, rows.representative, own)
    return np.where(decoded, followed, -1)


def planted_scores(copies: "CopiesArtifact", rows: CopiesRows, decoded: NDArray[np.bool_]) -> dict[str, Any]:
    """JSON-ready scores by method, ours first; empty where nothing was planted."""
    truth = truth_of(copies.raws)
    if truth is None:
        return {}
    member = copies.pool.members[0]
    sources = [source for _, table in copies.pool.blocks(["source"]) for source in table["source"].to_pylist()]
    causes = copies.facts["causes"]
    contaminated = np.isin(rows.cause, [code for code, (stage, _) in enumerate(causes) if stage == "decontaminate"])
    ours: PlantedScore = score_planted(
        truth, sources=sources, representative_N=representatives(rows, decoded), decontaminated_N=contaminated
    )
    scores: dict[str, Any] = {OURS: ours.as_dict()}
    at = np.flatnonzero(decoded)
    if len(at) > MAX_IMAGES:
        return scores
    images, shown = list[NDArray[np.uint8]](), list[int]()
    table = copies.pool.columns_at(at, ["shard", "offset", "length"])
    read = ShardReader(copies.raws[0].files)
    for row, shard, offset, length in zip(at.tolist(), *(table[name].to_pylist() for name in table.column_names), strict=True):
        try:
            images.append(decode(read(shard, offset, length), DecodeConfig()))
            shown.append(row)
        except ImageRejected:  # the recipe's own limits on decoding are looser
            continue
    vectors = read_all(member.vectors("copy"))
    stored = vectors.vectors[np.searchsorted(vectors.rows, shown)].astype(np.float32)
    name = f"{member.info.copy_space.name} alone"
    embedding = Descriptor(
        lambda _: (stored, np.ones(len(stored), np.bool_)), "cosine", copies.facts["settings"]["dup_threshold"]
    )
    methods = {name: embedding, **baseline_descriptors()}
    found = baseline_table(images, truth, methods, sources=[sources[row] for row in shown])
    return scores | {method: score.as_dict() for method, score in found.items()}

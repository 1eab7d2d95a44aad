"""What people read of a curation: ledger, contact sheets, report, and the score of planted copies where there are some."""

import functools
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from heliostat.artifacts import Artifact, Draft
from heliostat.curation.composition import composition_table
from heliostat.curation.curation_report import ReportData, write_report
from heliostat.curation.dedup import EDGES
from heliostat.curation.edges import iterate_edges
from heliostat.curation.image_statistics import ImageStatistics
from heliostat.curation.ledger import FunnelStep
from heliostat.curation.ledger_write import write_ledger
from heliostat.curation.pool import FeatureFiles, Pool
from heliostat.curation.report import render_funnel
from heliostat.curation.sheet_choice import choose_sheets
from heliostat.curation.sheets import Pairs, Review, write_sheets
from heliostat.data.shard_reader import ShardReader
from heliostat.errors import ObjectNotFoundError
from heliostat.runtime.ledger_rows import PoolRows, fetch_log_of, rows_outside
from heliostat.runtime.pipelines import Context
from heliostat.runtime.planted import OURS, PLANTED, planted_scores
from heliostat.runtime.recipe import CurateStage
from heliostat.runtime.shards import RayTasks
from heliostat.runtime.step_times import TIMES, StepTimes

if TYPE_CHECKING:
    from heliostat.runtime.stage_curate import Curated

FUNNEL = "funnel.json"
STATISTICS = "statistics.json"
_MAX_SHEET_PAIRS = 2_000_000  # pairs near the threshold to choose from; the nearest to it stay


def write_review(context: Context, config: CurateStage, draft: Draft, curated: "Curated", times: StepTimes) -> int:
    """Write the ledger, the sheets and the report of a curation that is decided; returns the rows that came in."""
    result, copies = curated.result, curated.copies
    run_tasks = RayTasks(context.progress, times)
    outside, before = rows_outside(copies.raws, copies.pool)
    settings = dict(copies.facts["settings"])
    with times.step("ledger", images=copies.pool.num_rows):
        funnel = write_ledger(
            draft.files,
            PoolRows(copies.pool, tuple(fetch_log_of(raw) for raw in copies.raws)),
            curated.facts,
            result.decisions,
            outside=outside,
            before=before,
            settings=settings,
            run_tasks=run_tasks,
            rows_per_file=config.ledger_rows_per_file,
        )
    draft.put(FUNNEL, json.dumps([step.as_dict() for step in funnel], indent=1).encode())
    draft.put(STATISTICS, json.dumps(result.statistics, indent=1).encode())
    for line in render_funnel(funnel).splitlines():
        context.progress.say(f"          {line}")
    if result.composition:
        for line in composition_table(result.composition).splitlines():
            context.progress.say(f"          {line}")
    sheets = _sheets(config, draft, curated, settings, times)
    planted = _planted(context, draft, curated, times)
    draft.put(TIMES, json.dumps(times.rows("curate"), indent=1).encode())
    with times.step("report"):
        write_report(
            draft.files,
            _report_data(draft, curated, funnel, sheets=sheets, planted=planted, core_hour_price=config.core_hour_price),
        )
    return funnel[0].rows_in


def _planted(context: Context, draft: Draft, curated: "Curated", times: StepTimes) -> dict[str, Any]:
    with times.step("planted copies"):
        scores = planted_scores(curated.copies, curated.rows, curated.columns.decoded)
    if scores:
        draft.put(PLANTED, json.dumps(scores, indent=1).encode())
        ours = scores[OURS]
        context.progress.say(
            f"          planted copies: recall {_ratio(ours['recall'])}, precision {_ratio(ours['precision'])}, "
            f"{ours['num_wrong']} wrong merges; evaluation images found: {_ratio(ours['decontamination'])}"
        )
    return scores


def _ratio(share: dict[str, Any]) -> str:
    return "none" if share["ratio"] is None else f"{share['ratio']:.3f}"


def _sheets(
    config: CurateStage, draft: Draft, curated: "Curated", settings: dict[str, Any], times: StepTimes
) -> list[dict[str, Any]]:
    if not config.sheets.enabled:
        return []
    pool, columns = curated.copies.pool, curated.columns
    review = Review(
        facts=curated.facts,
        decisions=curated.result.decisions,
        columns=lambda rows: pool.columns_at(rows, ["source", "label", "width", "height", "format"]),
        read_image=_reader(pool, curated.copies.raws),
        read_kept=_kept_reader(draft, curated),
        read_reference=_reference_reader(curated),
        settings=settings,
        pairs=_margin_pairs(curated, settings, config.sheets.margin),
        nsfw=columns.nsfw,
        num_faces=columns.num_faces,
        matched=curated.result.matched,
    )
    with times.step("contact sheets"):
        return write_sheets(draft.files, review, choose_sheets(review, config.sheets), config.sheets)


def _reader(pool: Pool, raws: tuple[Artifact, ...]) -> Callable[[int], bytes | None]:
    """The bytes of a pool row as they came; None for what is gone."""

    def read(row: int) -> bytes | None:
        for number, member in enumerate(pool.members):
            if row < member.num_rows:
                return _read_row(member, raws[number], row)
            row -= member.num_rows
        raise IndexError(row)

    return read


def _read_row(features: FeatureFiles, raw: Artifact, row: int) -> bytes | None:
    block = int(np.searchsorted(features.info.starts, row, side="right")) - 1
    place = _places(features, block).slice(row - features.info.starts[block], 1).to_pylist()[0]
    if not place["shard"]:  # it was forgotten
        return None
    try:
        return ShardReader(raw.files)(place["shard"], place["offset"], place["length"])
    except ObjectNotFoundError:
        return None


@functools.lru_cache(maxsize=256)
def _places(features: FeatureFiles, block: int) -> pa.Table:
    """Where the images of one block lie; a sheet shows many of the same block."""
    return features.read(block, ["shard", "offset", "length"])


def _kept_reader(draft: Draft, curated: "Curated") -> Callable[[int], bytes | None]:
    """The bytes of a pool row as they were kept: the manifest lists the kept rows of the pool first, in their order."""
    kept = curated.result.decisions.rows
    manifest = curated.manifest

    def read(row: int) -> bytes | None:
        at = int(np.searchsorted(kept, row))
        if at >= len(kept) or kept[at] != row:
            return None
        place = manifest.slice(at, 1).to_pylist()[0]
        return ShardReader(draft.files)(place["shard"], place["offset"], place["length"])

    return read


def _reference_reader(curated: "Curated") -> Callable[[int], bytes | None]:
    """The bytes of an evaluation image by its number over all sets."""

    def read(reference: int) -> bytes | None:
        for name, features in curated.copies.evaluation.items():
            if reference < features.num_rows:
                return _read_row(features, curated.copies.evaluation_raws[name], reference)
            reference -= features.num_rows
        return None

    return read


def _margin_pairs(curated: "Curated", settings: dict[str, Any], margin: float) -> Pairs | None:
    """Stored pairs at most `margin` from the threshold; of very many, those nearest to it."""
    threshold = settings["dup_threshold"]
    if threshold is None:
        return None
    parts, held = list[tuple[np.ndarray, np.ndarray, np.ndarray]](), 0
    for edges in iterate_edges(curated.copies.artifact.files, EDGES):
        near = np.abs(edges.similarity - threshold) <= margin
        parts.append((edges.first[near], edges.second[near], edges.similarity[near]))
        held += int(near.sum())
        if held > 2 * _MAX_SHEET_PAIRS:
            parts = [_nearest(parts, threshold)]
            held = len(parts[0][0])
    return Pairs(*_nearest(parts, threshold)) if parts else None


def _nearest(
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]], threshold: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    first, second, similarity = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    order = np.lexsort((second, first, np.abs(similarity - threshold)))[:_MAX_SHEET_PAIRS]
    return first[order], second[order], similarity[order]


def _report_data(
    draft: Draft,
    curated: "Curated",
    funnel: list[FunnelStep],
    *,
    sheets: list[dict[str, Any]],
    planted: dict[str, Any],
    core_hour_price: float,
) -> ReportData:
    statistics, facts = curated.result.statistics, curated.copies.facts
    found = facts["statistics"]
    retrieval = statistics.get("retrieval", {})
    return ReportData(
        title=str(draft.ref),
        funnel=funnel,
        statistics=_image_statistics(curated),
        planted=planted,
        edges=found.get("join", {}).get("audit", {}).get("bands", ()),
        components=found.get("components", {}),
        balance=statistics["balance"]["levels"],
        composition=retrieval.get("composition", ()),
        coverage=[
            {"set": row["set"], "num_images": row["images"], "num_that_retrieved": row["images_that_retrieved"]}
            for row in retrieval.get("sets", ())
        ],
        times=_times(curated, draft),
        cost_per_cpu_hour=core_hour_price,
        sheets=sheets,
        settings={**facts["settings"], "target_images": statistics["balance"]["target_images"]},
        notes=tuple(
            f"{row['set']} brings in nothing: {row['why_nothing']}." for row in retrieval.get("sets", ()) if row["why_nothing"]
        ),
    )


def _image_statistics(curated: "Curated") -> dict[str, Any]:
    before, after = ImageStatistics(), ImageStatistics()
    kept, decoded = curated.result.decisions.cause == 0, curated.columns.decoded
    for start, table in curated.copies.pool.blocks(["source", "length", "width", "height", "format"]):
        before.add(table, decoded[start : start + table.num_rows])  # a header that lies would count for megapixels
        after.add(table, kept[start : start + table.num_rows])
    return {"before": before.as_dict(), "after": after.as_dict()}


def _times(curated: "Curated", draft: Draft) -> list[dict[str, Any]]:
    """Steps of all stages that led here, in their order."""
    rows = list[dict[str, Any]]()
    made = [*curated.copies.raws, *curated.copies.features, curated.copies.artifact]
    for artifact in made:
        if artifact.files.size(TIMES) is not None:
            rows += artifact.read_json(TIMES)
    rows += json.loads(draft.files.read(TIMES))
    return [{**row, "stage": _named(row)} for row in rows]


def _named(row: dict[str, Any]) -> str:
    """Stage and step, and what took most of it where the workers told."""
    name = f"{row['stage']}: {row['step']}"
    if not row["parts"]:
        return name
    slowest = max(row["parts"], key=row["parts"].__getitem__)
    return f"{name} ({slowest} {row['parts'][slowest] / sum(row['parts'].values()):.0%})"

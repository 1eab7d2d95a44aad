"""curate: copies -> a relevant, balanced training set with original bytes, a ledger, contact sheets and a report."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from heliostat.artifacts import WORK, Artifact, ArtifactRef, Draft, FileRecord
from heliostat.curation.copies_rows import CopiesRows
from heliostat.curation.curate import Curation, curate
from heliostat.curation.dedup import forgotten_rows
from heliostat.curation.features_config import FaceBlurConfig
from heliostat.curation.forget_list import read_forget_list
from heliostat.curation.ledger import Decisions, same_reason
from heliostat.curation.ledger_facts import LedgerFacts
from heliostat.curation.pool import FeatureFiles, PoolColumns, id_bytes, read_columns
from heliostat.curation.repack import PLAN_COLUMNS, RepackPlan, RepackShard, ShardSize, first_seen, has_faces_to_blur
from heliostat.data.manifest import MANIFEST_SCHEMA, join_manifests, manifest_to_bytes, read_manifest
from heliostat.errors import DataError
from heliostat.runtime.curation_review import write_review
from heliostat.runtime.pipelines import Context, Summary, config_of, make
from heliostat.runtime.recipe import CurateStage
from heliostat.runtime.relay import Gauges
from heliostat.runtime.revised_inputs import start_again_if_revised
from heliostat.runtime.shards import RayTasks
from heliostat.runtime.stage_dedup import CopiesArtifact, features_of_set, open_copies
from heliostat.runtime.stage_embed import open_features
from heliostat.runtime.stage_ingest import MANIFEST
from heliostat.runtime.step_times import StepTimes
from heliostat.tracking import Run

_SEED = 0  # of every draw but those of k-means
_PLAN = f"{WORK}plan/"
_ROWS = f"{WORK}rows/"


@dataclass(frozen=True)
class Curated:
    """Everything that is known about a curation once it is decided, for packing, ledger, sheets and report."""

    copies: CopiesArtifact
    rows: CopiesRows
    columns: PoolColumns
    sets: dict[str, FeatureFiles]
    raws: dict[str, Artifact]
    result: Curation
    facts: LedgerFacts
    manifest: pa.Table


def run_curate(context: Context, config: CurateStage) -> Artifact:
    """Make the recipe's curated artifact."""
    recipe = context.recipe
    copies = context.load(ArtifactRef.parse(config.copies) if config.copies else recipe.ref("copies"))
    inputs = {"copies": copies}
    names = list(recipe.curated_sets())
    for name in names:
        pool = ArtifactRef.parse(copies.record.inputs["features"])
        inputs[f"set_{name}"] = context.load(features_of_set(pool, name))
    settings = config_of(config, without=("copies", "sheets", "ledger_rows_per_file", "core_hour_price"))

    def work(draft: Draft, run: Run) -> Summary:
        context.need_ray()
        times = StepTimes()
        run_tasks = RayTasks(context.progress, times)
        opened = open_copies(context, copies)
        start_again_if_revised(context, draft, [*opened.features, *inputs.values()])
        rows = opened.rows
        decisions = opened.decisions(rows)
        with times.step("reading the pool", images=opened.pool.num_rows):
            columns = read_columns(opened.pool)
        _leave_out_forgotten(context, opened, columns, decisions)
        sets = {name: open_features(inputs[f"set_{name}"]) for name in names}
        raws = {name: context.load(ArtifactRef.parse(inputs[f"set_{name}"].record.inputs["raw"])) for name in names}
        with times.step("retrieval and balance", images=opened.pool.num_rows):
            result = curate(
                opened.pool,
                decisions,
                sets,
                config,
                work=draft.files.child(f"{WORK}curate"),
                run=run_tasks,
                seed=_SEED,
            )
        facts = _facts(opened, rows, columns, result, faces=config.faces)
        curated = Curated(opened, rows, columns, sets, raws, result, facts, MANIFEST_SCHEMA.empty_table())
        curated = replace(curated, manifest=_repack(config, draft, curated, run_tasks))
        rows_in = write_review(context, config, draft, curated, times)
        totals = {"curate/rows_in": float(rows_in), "curate/rows_kept": float(curated.manifest.num_rows)}
        run.log_metrics(totals, 0)
        Gauges().set(str(draft.ref), totals)
        return Summary({"images": curated.manifest.num_rows, "images_in": rows_in})

    return make(context, recipe.ref("curated"), stage="curate", config=settings, inputs=inputs, work=work)


def _leave_out_forgotten(context: Context, copies: CopiesArtifact, columns: PoolColumns, decisions: Decisions) -> None:
    """Drop what was forgotten since the dedup."""
    gone = forgotten_rows(copies.pool, columns.ids, read_forget_list(context.artifacts.store))
    if gone[decisions.rows].any():
        decisions.judge(same_reason("forgotten_since", decisions.rows, gone[decisions.rows], "asked_to_forget"))


def _facts(
    copies: CopiesArtifact, rows: CopiesRows, columns: PoolColumns, result: Curation, *, faces: FaceBlurConfig
) -> LedgerFacts:
    """What is known about every row, for the ledger and the sheets."""
    reference_ids, codes = list[NDArray[np.uint8]](), list[NDArray[np.uint8]]()
    for code, features in enumerate(copies.evaluation.values()):
        found = [id_bytes(features.read(block, ["id"])["id"]) for block in range(len(features.keys))]
        reference_ids += found
        codes.append(np.full(sum(len(one) for one in found), code, np.uint8))
    kept = result.decisions.cause == 0
    return LedgerFacts(
        ids=columns.ids,
        duplicate_of=rows.duplicate_of,
        hash_distance=rows.hash_distance,
        nearest=rows.nearest,
        similarity=rows.similarity,
        component=rows.component,
        representative=rows.representative,
        similarity_to_representative=rows.similarity_to_representative,
        reference=rows.reference if reference_ids else None,
        similarity_to_reference=rows.similarity_to_reference if reference_ids else None,
        reference_ids=np.concatenate(reference_ids) if reference_ids else None,
        evaluation_set=np.concatenate(codes) if codes else None,
        evaluation_sets=tuple(copies.evaluation),
        retrieved_by=result.retrieved_by,
        cluster_levels=result.cluster_levels,
        faces_blurred=kept & has_faces_to_blur(copies.pool, faces) if faces.enabled else None,
    )


def _kept_rows(curated: Curated) -> Iterator[tuple[int, pa.Table]]:
    """(number of the raw artifact, kept rows) in pool order, then the images of the sets that join as they are."""
    pool, kept = curated.copies.pool, curated.result.decisions.cause == 0
    first = 0
    for number, member in enumerate(pool.members):
        for block, start in enumerate(member.info.starts[:-1]):
            stop = member.info.starts[block + 1]
            here = kept[first + start : first + stop]
            if here.any():
                yield number, member.read(block, PLAN_COLUMNS).filter(pa.array(here))
        first += member.num_rows
    fresh, start = _fresh(curated, curated.columns.ids[kept]), 0
    for name in _as_is(curated):
        for block in range(len(curated.sets[name].keys)):
            rows = curated.sets[name].read(block, PLAN_COLUMNS)
            here, start = fresh[start : start + rows.num_rows], start + rows.num_rows
            yield len(pool.members) + list(curated.raws).index(name), rows.filter(pa.array(here))


def _fresh(curated: Curated, known: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Over the images of the sets that join as they are: which decode, and are neither kept already nor among those before."""
    ids, decoded = [known[:0]], [np.empty(0, np.bool_)]
    for name in _as_is(curated):
        for block in range(len(curated.sets[name].keys)):
            table = curated.sets[name].read(block, ("id", "reason"))
            ids.append(id_bytes(table["id"]))
            decoded.append(np.asarray(pc.equal(table["reason"], "").to_numpy(), np.bool_))
    fresh = np.concatenate(decoded)
    fresh[fresh] = first_seen(np.concatenate(ids)[fresh], known)
    return fresh


def _as_is(curated: Curated) -> list[str]:
    return [row.dataset for row in curated.result.composition if row.mode == "as is"]


def _repack(config: CurateStage, draft: Draft, curated: Curated, run_tasks: RayTasks) -> pa.Table:
    """Write the shards and the manifest; returns the manifest."""
    plan = RepackPlan(draft.files, _PLAN, ShardSize(config.images_per_shard, config.shard_bytes))
    for number, rows in _kept_rows(curated):
        plan.add(number, rows)
    tasks = plan.finish()
    if not tasks:
        raise DataError("the curation keeps no image; loosen the thresholds (heliostat curate RECIPE --dry-run shows them)")
    finished = {entry.key for entry in draft.files.list(_ROWS)}
    waiting = [task for task in tasks if f"{_ROWS}{task['index']:06d}.parquet" not in finished]
    raws = (*(raw.files for raw in curated.copies.raws), *(raw.files for raw in curated.raws.values()))
    function = RepackShard(raws, draft.files, _PLAN, _ROWS, config.faces if config.faces.enabled else None)
    for result in run_tasks(function, waiting, label="packing the kept"):
        draft.note(result["key"], FileRecord(**result["file"]))
    tables = [read_manifest(draft.files, f"{_ROWS}{task['index']:06d}.parquet") for task in tasks]
    manifest = join_manifests(tables)
    draft.put(MANIFEST, manifest_to_bytes(manifest))
    return manifest

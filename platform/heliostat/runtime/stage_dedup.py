"""dedup: features -> copies: edges, components, decisions, for one crawl or a chain of crawls joined one after the other."""

import json
from dataclasses import dataclass
from typing import Any

from heliostat.artifacts import WORK, Artifact, ArtifactRef, Draft, check_files
from heliostat.curation.copies_rows import COPIES_JSON, CopiesRows, decisions_of, read_copies_rows, read_facts
from heliostat.curation.dedup import EDGES, DedupInputs, Deduplicated, dedup
from heliostat.curation.forget_list import read_forget_list
from heliostat.curation.ledger import Decisions
from heliostat.curation.pool import FeatureFiles, Pool
from heliostat.errors import UsageError
from heliostat.runtime.pipelines import Context, Summary, config_of, make
from heliostat.runtime.recipe import DedupStage
from heliostat.runtime.revised_inputs import start_again_if_revised
from heliostat.runtime.shards import RayTasks
from heliostat.runtime.stage_embed import open_features
from heliostat.runtime.step_times import TIMES, StepTimes
from heliostat.tracking import Run

_SEED = 0  # of the join's sample and centroids; the result of an exact join does not depend on it


@dataclass(frozen=True)
class CopiesArtifact:
    """A copies artifact with the pool that it speaks of, oldest crawl first."""

    artifact: Artifact
    pool: Pool
    features: tuple[Artifact, ...]
    raws: tuple[Artifact, ...]
    evaluation: dict[str, FeatureFiles]
    evaluation_raws: dict[str, Artifact]
    facts: dict[str, Any]

    @property
    def rows(self) -> CopiesRows:
        """The arrays of all rows."""
        return read_copies_rows(self.artifact.files, self.pool.num_rows)

    def decisions(self, rows: CopiesRows) -> Decisions:
        """The decisions up to dedup, to be gone on with."""
        return decisions_of(rows, self.facts["causes"], self.facts["counts"])


def features_chain(context: Context, copies: Artifact) -> list[Artifact]:
    """The features artifacts that a copies artifact covers, oldest first."""
    previous = copies.record.inputs.get("previous")
    earlier = features_chain(context, context.load(ArtifactRef.parse(previous))) if previous else []
    return [*earlier, context.load(ArtifactRef.parse(copies.record.inputs["features"]))]


def open_copies(context: Context, artifact: Artifact) -> CopiesArtifact:
    """A copies artifact and everything that its rows point to. Raises ArtifactNotFoundError for what is gone."""
    features = features_chain(context, artifact)
    raws = tuple(context.load(ArtifactRef.parse(one.record.inputs["raw"])) for one in features)
    facts = read_facts(artifact)
    check_files(artifact, EDGES)
    sets = {
        name: context.load(ArtifactRef.parse(artifact.record.inputs[f"evaluation_{name}"])) for name in facts["evaluation_sets"]
    }
    return CopiesArtifact(
        artifact,
        Pool(tuple(open_features(one) for one in features)),
        tuple(features),
        raws,
        {name: open_features(one) for name, one in sets.items()},
        {name: context.load(ArtifactRef.parse(one.record.inputs["raw"])) for name, one in sets.items()},
        facts,
    )


def features_of_set(pool: ArtifactRef, name: str) -> ArtifactRef:
    """The features of a set: made beside those of the pool, so that another threshold needs no new embedding of either."""
    return ArtifactRef("features", f"{pool.name}-{name}", pool.version)


def run_dedup(context: Context, config: DedupStage) -> Artifact:
    """Make the recipe's copies artifact."""
    recipe = context.recipe
    features = context.load(ArtifactRef.parse(config.features) if config.features else recipe.ref("features"))
    inputs = {"features": features}
    if config.previous:
        inputs["previous"] = context.load(ArtifactRef.parse(config.previous))
        _check_is_new(context, features, inputs["previous"])
    sets = list(recipe.evaluation_sets())
    for name in sets:
        inputs[f"evaluation_{name}"] = context.load(features_of_set(features.ref, name))
    settings = config_of(config, without=("features", "previous", "evaluation"))
    forgotten = read_forget_list(context.artifacts.store)

    def work(draft: Draft, run: Run) -> Summary:
        context.need_ray()
        times = StepTimes()
        run_tasks = RayTasks(context.progress, times)
        earlier = open_copies(context, inputs["previous"]) if config.previous else None
        start_again_if_revised(context, draft, [*(earlier.features if earlier else ()), *inputs.values()])
        own = open_features(features)
        members = (*(earlier.pool.members if earlier else ()), own)
        given = DedupInputs(
            Pool(members),
            {name: open_features(inputs[f"evaluation_{name}"]) for name in sets},
            forgotten,
            old_rows=earlier.pool.num_rows if earlier else 0,
            old_edges=(earlier.artifact.files, EDGES) if earlier else None,
        )
        with times.step("copies and decontamination", images=given.pool.num_rows):
            found = dedup(given, config, files=draft.files, work=draft.files.child(f"{WORK}dedup"), run=run_tasks, seed=_SEED)
        found.rows.write(draft.files)
        draft.put(COPIES_JSON, json.dumps(_facts(found, sets), indent=1).encode())
        draft.put(TIMES, json.dumps(times.rows("dedup"), indent=1).encode())
        _say(context, found)
        kept = len(found.decisions.rows)
        run.log_metrics({"dedup/rows_in": float(given.pool.num_rows), "dedup/rows_kept": float(kept), **_measured(found)}, 0)
        return Summary({"images": given.pool.num_rows, "images_kept": kept})

    return make(context, recipe.ref("copies"), stage="dedup", config=settings, inputs=inputs, work=work)


def _check_is_new(context: Context, features: Artifact, previous: Artifact) -> None:
    if features.ref in [one.ref for one in features_chain(context, previous)]:
        raise UsageError(
            f"dedup.previous={previous.ref} covers {features.ref} already, and each of its images would count twice; name the "
            "features of the new crawl, or leave dedup.previous out"
        )


def _facts(found: Deduplicated, sets: list[str]) -> dict[str, Any]:
    """What copies.json holds beside the rows."""
    return {
        "causes": [list(cause) for cause in found.decisions.causes],
        "counts": [list(count) for count in found.decisions.counts],
        "settings": dict(found.settings),
        "evaluation_sets": sets,
        "statistics": dict(found.statistics),
    }


def _measured(found: Deduplicated) -> dict[str, float]:
    join = found.statistics.get("join")
    if join is None:
        return {}
    measured = {"dedup/edges": float(join["num_edges"])}
    bands = join["audit"]["bands"]
    num_true = sum(band["num_true"] for band in bands)
    if num_true:
        measured["dedup/edge_recall"] = sum(band["num_found"] for band in bands) / num_true
    return measured


def _say(context: Context, found: Deduplicated) -> None:
    for count in found.decisions.counts:
        context.progress.say(f"          {count.stage:13} {count.rows_in:,} in, {count.rows_in - count.rows_kept:,} dropped")
    measured = _measured(found)
    if "dedup/edge_recall" in measured:
        context.progress.say(
            f"          {measured['dedup/edges']:,.0f} similar pairs, {measured['dedup/edge_recall']:.1%} of a sample's found"
        )

"""evaluate: models and labelled images -> a table, pictures and one HTML page."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from heliostat.artifacts import Artifact, ArtifactRef, Draft
from heliostat.data.config import DecodeConfig
from heliostat.data.decode import ImageRejected, decode
from heliostat.data.manifest import read_manifest
from heliostat.data.shard_reader import ShardReader, image_runs, read_run
from heliostat.errors import ConfigError, DataError
from heliostat.evaluation.config import EvaluateConfig
from heliostat.evaluation.judge import (
    FROM_SCRATCH,
    Candidate,
    Judge,
    LabelledImages,
    Pixels,
    Row,
    judge_all,
    margins,
    rows_as_dicts,
    scratch_lines,
    scratch_margins,
)
from heliostat.evaluation.knn import nearest
from heliostat.evaluation.pictures import fit_size, grid_sheet, neighbor_sheet, patch_tokens, pca_colors, png
from heliostat.evaluation.report import ReportInputs, render_report
from heliostat.models.stored import HISTORY, read_backbone
from heliostat.runtime.curation_review import FUNNEL, STATISTICS
from heliostat.runtime.pipelines import Context, Summary, config_of, make
from heliostat.runtime.planted import OURS, PLANTED
from heliostat.runtime.sweep_trials import read_trials, trial_candidates
from heliostat.tracking import Run


def read_images(artifact: Artifact) -> tuple[list[Pixels], list[str | None]]:
    """Every image of an artifact, decoded, with its label. Raises DataError when one does not decode."""
    images, labels = [], []
    read, manifest = ShardReader(artifact.files), read_manifest(artifact.files)
    for run in image_runs(manifest):
        rows = manifest.slice(run.start, len(run)).to_pylist()
        found = read_run(read, rows[0]["shard"], [(row["offset"], row["length"]) for row in rows])
        for row, data in zip(rows, found, strict=True):
            try:
                images.append(decode(bytes(data), DecodeConfig(min_side_pixels=1)))
            except ImageRejected as rejected:
                raise DataError(f"{artifact.ref}: {row['source']} cannot be judged: {rejected}; remove it") from rejected
            labels.append(row["label"])
    return images, labels


def evaluate(context: Context, config: EvaluateConfig) -> Artifact:
    """Make the recipe's report."""
    inputs = _inputs(context, config)
    model_roles = [role for role in context.recipe.models if role in inputs] or ["model"]

    def work(draft: Draft, run: Run) -> Summary:
        judge = _judge(inputs, config)
        models = [_candidate(role, inputs[role]) for role in model_roles]
        sweep = inputs.get("sweep")
        rows = judge_all(judge, models, trial_candidates(sweep) if sweep else [])
        against_scratch = scratch_margins(rows)
        results = {
            "rows": rows_as_dicts(rows),
            "margins": margins(rows),
            "scratch": against_scratch,
            "scratch_lines": scratch_lines(against_scratch),
        }
        draft.put("results.json", json.dumps(results, indent=1).encode())
        for line in [*table_lines(rows), *scratch_lines(against_scratch)]:
            context.progress.say(f"          {line}")
        pictures = _pictures(judge, models[0], config, inputs)
        for name, data in pictures.items():
            draft.put(f"{name}.png", data)
            run.log_bytes(f"pictures/{name}.png", data)
        page = render_report(_report_inputs(context, results, pictures, inputs))
        draft.put("report.html", page.encode())
        run.log_bytes("report.html", page.encode())
        best = next(row for row in rows if row.name == models[0].name)
        counts = {"rows": len(rows), "heldout_images": len(judge.heldout.images)}
        scores = {"evaluate/knn_accuracy": best.knn, "evaluate/linear_accuracy": best.linear}
        run.log_metrics(scores, 0)
        return Summary(counts, scores)

    settings = config_of(config, without=("labelled", "heldout", "pictures"))
    return make(context, context.recipe.ref("report"), stage="evaluate", config=settings, inputs=inputs, work=work)


def _inputs(context: Context, config: EvaluateConfig) -> dict[str, Artifact]:
    recipe = context.recipe
    named = {"labelled": config.labelled, "heldout": config.heldout}
    inputs = {}
    for role, name in named.items():
        ref = ArtifactRef.parse(name) if name else recipe.ref("raw", f"-{role}")
        inputs[role] = context.load(ref)
    if config.pictures or (recipe.ingest is not None and recipe.ingest.pictures):
        inputs["pictures"] = context.load(
            ArtifactRef.parse(config.pictures) if config.pictures else recipe.ref("raw", "-pictures")
        )
    for role, ref in (recipe.models or {"model": recipe.ref("model")}).items():
        inputs[role] = context.load(ref)
    if recipe.sweep is not None:
        inputs["sweep"] = context.load(recipe.ref("sweep"))
    return inputs


def _judge(inputs: dict[str, Artifact], config: EvaluateConfig) -> Judge:
    bank_images, bank_labels = read_images(inputs["labelled"])
    test_images, test_labels = read_images(inputs["heldout"])
    bank = LabelledImages.from_names(bank_images, bank_labels)
    shared = set(_ids(inputs["labelled"])) & set(_ids(inputs["heldout"]))
    if shared:
        raise DataError(
            f"{len(shared)} images are both labelled and held out, first {min(shared)[:12]}; the score would be a lie"
        )
    if config.knn.neighbors > len(bank_images):
        raise ConfigError(
            f"evaluate.knn.neighbors={config.knn.neighbors} exceeds the {len(bank_images)} labelled images; lower it"
        )
    return Judge(bank, LabelledImages.from_names(test_images, test_labels, bank.names), config)


def _ids(artifact: Artifact) -> list[str]:
    ids: list[str] = read_manifest(artifact.files)["id"].to_pylist()
    return ids


def _candidate(role: str, model: Artifact) -> Candidate:
    backbone, info = read_backbone(model)
    return Candidate(row_name(role), info, backbone)


def row_name(role: str) -> str:
    """How the report calls a model: `teacher`, `teacher, <phase>`, `student`, `student from scratch` ..."""
    if role.endswith("-scratch"):
        return role.removesuffix("-scratch") + FROM_SCRATCH
    first, _, phase = role.partition("-")
    return ("teacher" if first == "model" else first) + (f", {phase}" if phase else "")


def _pictures(judge: Judge, candidate: Candidate, config: EvaluateConfig, inputs: dict[str, Artifact]) -> dict[str, bytes]:
    pictures = {}
    info = candidate.info
    if config.pca_images:
        whole = read_images(inputs["pictures"])[0] if "pictures" in inputs else list(judge.heldout.images)
        step = max(1, len(whole) // config.pca_images)
        patch = info.backbone.patch_size
        shown = [fit_size(image, config.pca_image_size, patch) for image in whole[::step][: config.pca_images]]
        tokens = patch_tokens(candidate.backbone, shown, mean=info.mean, std=info.std, patch_size=patch)
        pictures["pca"] = png(grid_sheet([shown, pca_colors(tokens)], side=144))
    if config.sheet_queries:
        features = judge.features_of(candidate)
        bank, queries = (features(pixels) for pixels in judge.pixels["grey" if info.grayscale else "colour"])
        total = len(judge.heldout.images)
        chosen = list(range(0, total, max(1, total // config.sheet_queries)))[: config.sheet_queries]
        _, rows_QK = nearest(bank, queries[chosen], min(8, len(bank)))
        images = [judge.heldout.images[index] for index in chosen]
        sheet = neighbor_sheet(images, judge.heldout.labels_N[chosen], judge.bank.images, judge.bank.labels_N, rows_QK)
        pictures["neighbors"] = png(sheet)
    return pictures


def _report_inputs(
    context: Context, results: dict[str, Any], pictures: dict[str, bytes], inputs: dict[str, Artifact]
) -> ReportInputs:
    model = inputs[next(iter(context.recipe.models), "model")]
    histories: dict[str, list[dict[str, float]]] = {
        row_name(role): [json.loads(line) for line in inputs[role].files.read(HISTORY).decode().splitlines()]
        for role in (context.recipe.models or ["model"])
    }
    data_ref = ArtifactRef.parse(model.record.inputs["data"])
    data = context.load(data_ref)
    optional = {key: data.read_json(key) if data.files.size(key) is not None else None for key in (FUNNEL, PLANTED, STATISTICS)}
    return ReportInputs(
        title=str(context.recipe.ref("report")),
        results=results,
        pictures=pictures,
        histories=histories,
        funnel=optional[FUNNEL] or [],
        copies=_planted(optional[PLANTED]),
        statistics=optional[STATISTICS] or {},
        records={role: artifact.record for role, artifact in {**inputs, "data": data}.items()},
        trials=[asdict(trial) for trial in read_trials(inputs["sweep"])] if "sweep" in inputs else [],
    )


def _planted(scores: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the page says about planted copies; empty without any."""
    if scores is None or scores[OURS]["recall"]["ratio"] is None or scores[OURS]["precision"]["ratio"] is None:
        return {}
    ours = scores[OURS]
    return {
        "recall": ours["recall"]["ratio"],
        "precision": ours["precision"]["ratio"],
        "num_found": ours["recall"]["found"],
        "num_planted": ours["recall"]["planted"],
        "recall_by_kind": {kind: share["ratio"] for kind, share in ours["recall_by_kind"].items()},
    }


def table_lines(rows: list[Row]) -> list[str]:
    """The table as text in aligned columns."""
    lines = [f"{'weights':28} {'version':8} {'k-NN':>14} {'linear':>14} {'seeds':>6}"]
    for row in rows:
        knn = f"{100 * row.knn:.1f}" + (f" ± {100 * row.knn_std:.1f}" if row.num_seeds > 1 else "")
        linear = f"{100 * row.linear:.1f}" + (f" ± {100 * row.linear_std:.1f}" if row.num_seeds > 1 else "")
        lines.append(f"{row.name:28} {row.version:8} {knn:>14} {linear:>14} {row.num_seeds:>6}")
    return lines

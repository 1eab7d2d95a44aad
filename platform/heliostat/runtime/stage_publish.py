"""publish: a model -> a release that others can load."""

import tempfile
from pathlib import Path

from heliostat.artifacts import Artifact, ArtifactRef, Draft
from heliostat.lineage import lineage, render_lineage, total_costs
from heliostat.models.stored import read_info
from heliostat.publishing.card import render_card
from heliostat.publishing.config import PublishConfig
from heliostat.publishing.export import check_architecture, check_libraries, export_formats
from heliostat.runtime.pipelines import Context, Summary, config_of, make
from heliostat.runtime.recipe import Recipe
from heliostat.runtime.run_description import link_to
from heliostat.tracking import Run


def check_publish(recipe: Recipe) -> None:
    """Refuse, before any stage of a recipe runs, a release that could not be made at its end.

    Raises UsageError for a missing library and for several students of which none is chosen, ConfigError for a format that
    cannot hold the backbone which the recipe trains.
    """
    config = recipe.publish
    if config is None:
        return
    check_libraries(config.formats)
    backbone = recipe.backbone_of(ArtifactRef.parse(config.model) if config.model else recipe.final_model)
    if backbone is not None:
        check_architecture(config.formats, backbone)


def publish(context: Context, config: PublishConfig) -> Artifact:
    """Make the recipe's release."""
    recipe = context.recipe
    ref = ArtifactRef.parse(config.model) if config.model else recipe.final_model
    inputs = {"model": context.load(ref)}
    if recipe.evaluate is not None:
        inputs["report"] = context.load(recipe.ref("report"))
    check_libraries(config.formats)
    check_architecture(config.formats, read_info(inputs["model"]).backbone)

    def work(draft: Draft, run: Run) -> Summary:
        model = inputs["model"]
        with tempfile.TemporaryDirectory() as folder:
            differences = export_formats(model, config, Path(folder))
            files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
            for path in files:
                draft.put(path.relative_to(folder).as_posix(), path.read_bytes())
        rows = inputs["report"].read_json("results.json")["rows"] if "report" in inputs else []
        card = render_card(
            record=model.record,
            info=read_info(model),
            config=config,
            lineage=render_lineage(lineage(context.artifacts, model.ref)),
            rows=rows,
            differences=differences,
            total_costs=total_costs(lineage(context.artifacts, model.ref)),
        )
        draft.put("README.md", card.encode())
        for name, difference in differences.items():
            context.progress.say(f"          {name}: parity with the model, largest difference {difference:g}")
        metrics = {"publish/largest_difference": max(differences.values())}
        run.log_metrics(metrics, 0)
        _register(run, context, model, config, card)
        return Summary({"files": len(files) + 1}, metrics)

    settings = config_of(config, without=("model", "aliases"))
    return make(context, recipe.ref("release"), stage="publish", config=settings, inputs=inputs, work=work)


def _register(run: Run, context: Context, model: Artifact, config: PublishConfig, card: str) -> None:
    """A version of the recipe's registered model, which links to what the model was made from."""
    tags = {f"heliostat.input.{role}": target for role, target in model.record.inputs.items()}
    tags |= {"heliostat.release": str(context.recipe.ref("release")), "heliostat.code": model.record.code_version}
    run.register_model(
        link_to(model), context.recipe.name, aliases=config.aliases, tags=tags, description=card.partition("---\n\n")[2]
    )

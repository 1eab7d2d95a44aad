"""publish: a model -> a release that others can load."""

from heliostat.artifacts import Artifact, ArtifactRef, Draft, lineage, render_lineage
from heliostat.models.stored import read_info
from heliostat.publishing.card import render_card
from heliostat.publishing.config import PublishConfig
from heliostat.publishing.export import export_safetensors
from heliostat.runtime.pipelines import Context, Summary, config_of, make
from heliostat.tracking import Run


def publish(context: Context, config: PublishConfig) -> Artifact:
    """Make the recipe's release."""
    recipe = context.recipe
    if config.model:
        ref = ArtifactRef.parse(config.model)
    else:
        ref = recipe.ref("model", "-student" if recipe.distill is not None else "")
    inputs = {"model": context.load(ref)}
    if recipe.evaluate is not None:
        inputs["report"] = context.load(recipe.ref("report"))

    def work(draft: Draft, run: Run) -> Summary:
        model = inputs["model"]
        files, difference = export_safetensors(model, config.parity_tolerance)
        for name, data in files.items():
            draft.put(name, data)
        rows = inputs["report"].read_json("results.json")["rows"] if "report" in inputs else []
        card = render_card(
            record=model.record,
            info=read_info(model),
            config=config,
            lineage=render_lineage(lineage(context.artifacts, model.ref)),
            rows=rows,
            difference=difference,
        )
        draft.put("README.md", card.encode())
        context.progress.say(f"          parity with the model: largest difference {difference:g}")
        run.log_metrics({"publish/largest_difference": difference}, 0)
        return Summary({"files": len(files) + 1}, {"publish/largest_difference": difference})

    settings = config_of(config, without=("model",))
    return make(context, recipe.ref("release"), stage="publish", config=settings, inputs=inputs, work=work)

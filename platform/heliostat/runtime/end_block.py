"""What a run says at its end: where things are, and commands that work as they are printed."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from heliostat.artifacts import Artifact, ArtifactRef
from heliostat.models.stored import read_info
from heliostat.runtime.pipelines import Context
from heliostat.runtime.recipe import Recipe, scope_overrides
from heliostat.tracking import program, ui_command, without_secrets


def end_lines(
    context: Context, last: Artifact, *, recipe_name: str = "", stage: str = "", overrides: Sequence[str] = ()
) -> list[str]:
    """Commands about what a run made, each on a line of its own below a word about it.

    recipe_name, stage and overrides are those of the command line; a stage that was run by itself names the next one. An empty
    recipe_name is a recipe without a file, which has no next command.
    """
    recipe = context.recipe
    own_store = [] if recipe.store == Recipe.model_fields["store"].default else [f"store={recipe.store}"]
    lines = ["where it comes from:", f"  {heliostat_command(['lineage', str(last.ref), *own_store])}"]
    following = _next_stage(recipe, stage) if recipe_name and stage else ""
    if following:
        lines += [f"the next stage of the recipe, {following}:"]
        lines += [f"  {heliostat_command(_words_of(following, recipe_name, stage, overrides))}"]
    model = _model(context, last)
    if model is not None:
        lines += ["the model in Python:", *(f"  {line}" for line in python_lines(model, recipe.store))]
    uri = context.tracker.uri
    if uri.startswith("sqlite"):
        return [*lines, "the curves of all runs:", f"  {ui_command(uri)}"]
    return [*lines, f"the curves of all runs: {without_secrets(uri) or 'not recorded, tracking.uri is none'}"]


def heliostat_command(words: Sequence[str]) -> str:
    """A command line of ours that a shell takes as it is."""
    script = Path(sys.executable).with_name("heliostat")
    ours = program("heliostat") if script.exists() else f"{shlex.quote(sys.executable)} -m heliostat"
    return f"{ours} {shlex.join(words)}"


def python_lines(model: Artifact, store: str) -> list[str]:
    """Three lines that load a model and compute a cls token of a black image at its own size."""
    size = read_info(model).backbone.img_size
    return [
        "import torch; from heliostat.models.stored import open_backbone",
        f"backbone, info = open_backbone({str(model.ref)!r}, store={store!r})",
        f"print(backbone(torch.zeros(1, 3, {size}, {size})).cls_BD.shape)  # pixels in 0..1, minus info.mean, over info.std",
    ]


def _next_stage(recipe: Recipe, stage: str) -> str:
    stages = recipe.stages
    later = stages[stages.index(stage) + 1 :] if stage in stages else []
    return later[0] if later else ""


def _words_of(following: str, recipe_name: str, stage: str, overrides: Sequence[str]) -> list[str]:
    """The words of the next stage's command: the same settings, whose keys are those of another section there."""
    scoped = scope_overrides(tuple(overrides), stage)
    if scope_overrides(tuple(scoped), following) == scoped:
        return [following, recipe_name, *scoped]
    return ["run", recipe_name, *scoped]  # a key that the next section has too would change its meaning


def _model(context: Context, last: Artifact) -> Artifact | None:
    """The model to show: what was made, or what the release or the report is of. A sweep makes none."""
    if last.ref.kind == "model":
        return last
    if last.ref.kind not in ("report", "release"):
        return None
    ref = ArtifactRef.parse(last.record.inputs["model"]) if "model" in last.record.inputs else context.recipe.ref("model")
    return context.artifacts.find(ref)

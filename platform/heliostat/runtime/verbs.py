"""What the verbs of the command line do."""

import os
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from heliostat.artifacts import Artifact, ArtifactRef, ArtifactStore
from heliostat.config import apply_overrides, find_recipe, shipped_recipes, validate
from heliostat.costs import cost_text
from heliostat.errors import ArtifactError, UsageError
from heliostat.lineage import lineage, render_lineage, render_page, total_costs
from heliostat.runtime.pipelines import Context
from heliostat.runtime.progress import Progress
from heliostat.runtime.recipe import SETS, Recipe, read_recipe, scope_overrides
from heliostat.runtime.weight_names import names_artifact, weights_path
from heliostat.storage import open_store
from heliostat.tracking import without_secrets

if TYPE_CHECKING:
    from heliostat.runtime.own_images import Choice

OWN_IMAGES = "(own images)"
_DEFAULT_STORE = "./heliostat-store"
_SMALLEST_SECTIONS = {"crawl": "crawl.contact=... crawl.urls=[...]", "ingest": "ingest.pool=..."}
"""Of sections in which every key has a default, and some must be given all the same."""


def print_recipes() -> None:
    """List the shipped recipes with their first comment line."""
    for name in shipped_recipes():
        first = find_recipe(name).read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        print(f"{name:16} {first}")


def _store_of(overrides: Sequence[str]) -> ArtifactStore:
    """The store of verbs without a recipe: `store=...`, else the default one."""
    uri = _DEFAULT_STORE
    for override in overrides:
        key, _, value = override.partition("=")
        if key != "store":
            raise UsageError(f"unknown key: {key}. This verb takes store=PATH-OR-URI only")
        uri = value
    return ArtifactStore(open_store(uri))


def print_artifacts(overrides: Sequence[str]) -> None:
    """List the complete artifacts of a store."""
    artifacts, damaged = _store_of(overrides), 0
    for ref in artifacts.list():
        try:
            record = artifacts.load(ref).record
        except ArtifactError as error:
            damaged += 1
            print(f"{ref!s:40} damaged: {error}")
            continue
        counts = ", ".join(f"{value:,} {name}" for name, value in record.counts.items())
        print(f"{ref!s:40} {record.created}  {counts}")
    if damaged:
        raise ArtifactError(f"{damaged} records are damaged, see above; restore them, or remove their folders")


def print_lineage(artifact: str, overrides: Sequence[str], *, html: str = "") -> None:
    """Print the lineage tree of an artifact and what its training has cost; with `html` also write it as a page."""
    tree = lineage(_store_of(overrides), ArtifactRef.parse(artifact))
    print("\n".join(render_lineage(tree)))
    if cost := cost_text(total_costs(tree)):
        print(f"\ntraining:  {cost}")
    if html:
        try:
            Path(html).write_text(render_page(tree), encoding="utf-8")
        except OSError as error:
            raise UsageError(
                f"--html {html}: cannot be written ({error.strerror}); name a file in a folder that exists"
            ) from error
        print(f"page:      {html}")


def print_why(artifact: str, image: str, overrides: Sequence[str]) -> None:
    """Tell the story of one image by its id or source. artifact: a curated one; empty asks all of the store, newest first."""
    from heliostat.runtime.review_verbs import why

    for line in why(_store_of(overrides), artifact, image):
        print("".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in line))  # strangers name files


def print_what_if(artifact: str, words: Sequence[str]) -> None:
    """Print what other thresholds would have kept. artifact: a curated one; empty takes the newest of the store."""
    from heliostat.runtime.review_verbs import what_would_be

    stores = [word for word in words if word.startswith("store=")]
    asked = [word for word in words if not word.startswith("store=")]
    print("\n".join(what_would_be(_store_of(stores), artifact, asked)))


def forget_images(target: str, overrides: Sequence[str], *, dry_run: bool = False) -> None:
    """Remove an image, a URL or a domain from every artifact of a store, and remember not to take it again."""
    from heliostat.curation.forget import forget
    from heliostat.runtime.review_verbs import spellings

    artifacts = _store_of(overrides)
    reports = [forget(artifacts, text, is_dry_run=dry_run, notify=Progress().say) for text in spellings(target)]
    told = [report for report in reports if report.has_found] or reports[:1]
    print("\n".join(line for report in told for line in report.lines()))


def shard_recipe(source: str, overrides: Sequence[str]) -> Recipe:
    """The recipe that `heliostat shard` stands for: a name and a source. Raises UsageError and ConfigError.

    With a store that is not local nothing is tracked unless tracking.uri says where.
    """
    given = dict(word.partition("=")[::2] for word in overrides)
    mapping = {"name": given.get("name", ""), "ingest": {"pool": source}}
    if "name" not in given:
        raise UsageError(f"give the artifact a name: heliostat shard {source} name=photos")
    if "://" in given.get("store", "") and "tracking.uri" not in given:
        mapping["tracking"] = {"uri": "none"}
    return validate(Recipe, apply_overrides(mapping, scope_overrides(tuple(overrides), "ingest")), "shard")


def _as_yaml(recipe: Recipe) -> str:
    """A resolved recipe as YAML, without the users and passwords of its URIs."""
    text: str = yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True), sort_keys=False, width=120)
    return without_secrets(text)


def shard(source: str, overrides: Sequence[str], *, dry_run: bool = False) -> None:
    """Make raw/NAME@VERSION of a source by the ingest stage, or print its recipe."""
    recipe = shard_recipe(source, overrides)
    if dry_run:
        print(_as_yaml(recipe), end="")
        return
    progress = Progress()
    with closing(Context(recipe, progress)) as context:
        artifact = run_stage(context, "ingest")
    progress.say(f"train on it:  heliostat pretrain RECIPE data={artifact.ref} store={recipe.store}")


def run_recipe(name: str, overrides: Sequence[str], *, stage: str = "", dry_run: bool = False) -> None:
    """Run one stage of a recipe, or all of them; with `dry_run` print what it would be and cost."""
    recipe, choices = _recipe(name, overrides, stage)
    stages = [stage] if stage and not choices else recipe.stages
    if "publish" in stages:
        _check_publish(recipe)
    if dry_run:
        from heliostat.runtime.dry_run import cost_lines

        lines = cost_lines(recipe, stages)  # first, for it may refuse
        print(_as_yaml(recipe), end="")
        for line in lines:
            print(line)
        return
    _check_weights(recipe, stages)
    from heliostat.runtime.end_block import end_lines

    progress = Progress()
    for choice in choices:
        progress.say(f"chosen: {choice.what}  ({choice.why})")
    started = time.monotonic()
    with closing(Context(recipe, progress)) as context:
        _check_sets(context, stages)
        _check_previous(context, stages)
        last = None
        for each in stages:
            last = run_stage(context, each)
    progress.say(f"finished in {time.monotonic() - started:.0f} s")
    if last is not None:
        _print_end(context, last)
        said = overrides if stage and not choices else ()
        for line in end_lines(context, last, recipe_name="" if choices else name, stage=stage, overrides=said):
            progress.say(line)


def _check_publish(recipe: Recipe) -> None:
    """Refuse, before any stage runs, a release that could not be made at the end. Raises UsageError or ConfigError."""
    if recipe.publish is None:
        return
    if not recipe.publish.model:
        _ = recipe.final_model  # one student, or the recipe has to say which
    if set(recipe.publish.formats) != {"fair"}:
        # Our own format takes every backbone and needs no library; the others import torch, 4 s that a dry run can do without.
        from heliostat.runtime.stage_publish import check_publish

        check_publish(recipe)


def _check_weights(recipe: Recipe, stages: Sequence[str]) -> None:
    """Refuse, before any stage runs, weights that are no file here. Artifacts may be made by the run. Raises UsageError."""
    named = []
    if "pretrain" in stages and recipe.pretrain is not None:
        named.append(recipe.pretrain.init.weights)
    if "distill" in stages and recipe.distill is not None:
        named.append(recipe.distill.teacher)
    for weights in named:
        if weights and not names_artifact(weights):
            weights_path(weights)
    if "embed" in stages and recipe.embed is not None:
        for key in ("copy_embedder", "semantic_embedder"):
            name = getattr(recipe.embed, key)
            if name not in ("", "copy", "thumbnail") and not names_artifact(name) and not Path(name).exists():
                raise UsageError(
                    f"embed.{key}={name}: no such file or folder; give thumbnail, copy, model/NAME@VERSION or a path"
                )


def _check_sets(context: Context, stages: Sequence[str]) -> None:
    """Refuse, before any stage runs, sets to embed that neither the recipe makes nor the store holds. Raises UsageError."""
    recipe = context.recipe
    if "embed" not in stages:
        return
    made = {str(recipe.ref("raw", f"-{name}")) for name in SETS if recipe.ingest is not None and getattr(recipe.ingest, name)}
    for name, raw in recipe.embedded_sets().items():
        if raw in made or context.artifacts.find(ArtifactRef.parse(raw)) is not None:
            continue
        own = {str(recipe.ref("raw", f"-{each}")): each for each in SETS}.get(raw)
        fix = f"give ingest.{own}=... or an artifact that is there" if own else "make it first, or name one that is there"
        raise UsageError(f"the recipe uses a set {name}, and there is no {raw} in {recipe.store}; {fix}")


def _check_previous(context: Context, stages: Sequence[str]) -> None:
    """Refuse, before any stage runs, an earlier crawl's copies that are not there. Raises ArtifactNotFoundError."""
    if "dedup" in stages and context.recipe.dedup is not None and context.recipe.dedup.previous:
        context.load(ArtifactRef.parse(context.recipe.dedup.previous))


def _recipe(name: str, overrides: Sequence[str], stage: str) -> tuple[Recipe, "list[Choice]"]:
    """The recipe that is named, or the one that is chosen for a folder, with the reasons."""
    if name == OWN_IMAGES:
        from heliostat.runtime.own_images import choose_recipe

        return choose_recipe(overrides)
    recipe = read_recipe(name, tuple(overrides), stage)
    if stage and getattr(recipe, stage) is None:
        has = ", ".join(recipe.stages) or "no stage"
        raise UsageError(f"recipe {name} has no section {stage}; it has {has}. To add it give {_smallest_section(stage)}")
    return recipe, []


def _smallest_section(stage: str) -> str:
    """The overrides that add a section with nothing but what it must have."""
    if stage in _SMALLEST_SECTIONS:
        return _SMALLEST_SECTIONS[stage]
    section = Recipe.model_fields[stage].annotation
    (model,) = (one for one in getattr(section, "__args__", ()) if one is not type(None))
    required = [key for key, field in model.model_fields.items() if field.is_required()]
    return f"{stage}.{required[0]}=..." if required else f"{stage}={{}}"


def run_stage(context: Context, stage: str) -> Artifact:
    """Run one stage of the context's recipe and return its (main) artifact."""
    from heliostat.runtime import (
        stage_crawl,
        stage_curate,
        stage_dedup,
        stage_embed,
        stage_evaluate,
        stage_ingest,
        stage_publish,
        stage_sweep,
        stage_train,
    )

    functions = {
        "crawl": stage_crawl.crawl,
        "ingest": stage_ingest.ingest,
        "embed": stage_embed.embed,
        "dedup": stage_dedup.run_dedup,
        "curate": stage_curate.run_curate,
        "pretrain": stage_train.pretrain,
        "sweep": stage_sweep.sweep,
        "distill": stage_train.distill,
        "evaluate": stage_evaluate.evaluate,
        "publish": stage_publish.publish,
    }
    artifact: Artifact = functions[stage](context, getattr(context.recipe, stage))  # type: ignore[operator]
    return artifact


def _print_end(context: Context, last: Artifact) -> None:
    """The lineage of the last artifact, and where its files are."""
    say = context.progress.say
    say()
    for line in render_lineage(lineage(context.artifacts, last.ref)):
        say(line)
    say()
    report = context.artifacts.find(context.recipe.ref("report"))
    if report is not None:
        say(f"report:  {_near(report.files.uri)}/report.html")
    say(f"files:   {_near(last.files.uri)}")
    say()


def _near(uri: str) -> str:
    """A path below the working folder without that folder; anything else as it is."""
    relative = uri if "://" in uri else os.path.relpath(uri)
    return uri if relative.startswith("..") else relative

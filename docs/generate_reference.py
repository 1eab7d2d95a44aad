"""Writes docs/reference/ from the code: every key of a recipe, the shipped recipes with their costs, and every metric.

    python docs/generate_reference.py

tests/docs/test_reference.py renders the same pages in memory and fails when the committed ones are stale.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from heliostat.config import find_recipe, shipped_recipes, walk_fields
from heliostat.metrics import METRICS
from heliostat.runtime.dry_run import TrainingRun, gpu_hours, training_runs
from heliostat.runtime.recipe import STAGES, Recipe, read_recipe
from heliostat.training.memory import GIB

REFERENCE = Path(__file__).parent / "reference"
_WORDS = {bool: "true or false", int: "integer", float: "number", str: "text", NoneType: "null"}
_BOUNDS = {
    "ge": "at least {}",
    "gt": "above {}",
    "le": "at most {}",
    "lt": "below {}",
    "min_length": "not empty",
    "pattern": "{}",
}
_HEADER = "| key | type | default | limits | meaning |\n| --- | --- | --- | --- | --- |\n"
_KEYS_INTRODUCTION = """# Keys of a recipe

<!-- Written by docs/generate_reference.py; change the code, then run it. -->

One section per stage, see [recipes](../concepts/recipes.md). A section that is left out is a stage that is not run. On the
command line a key is written as here, `heliostat run RECIPE pretrain.optim.lr=2e-4`; a stage verb looks in its own section
first, `heliostat pretrain RECIPE optim.lr=2e-4`.
"""
_METRICS_INTRODUCTION = """# Metrics

<!-- Written by docs/generate_reference.py; change the code, then run it. -->

MLflow shows the first name. A metric with a Prometheus name is also exported while its stage runs, labelled with the
artifact; see [dashboards](../../dashboards/README.md).

| metric | unit | Prometheus | meaning |
| --- | --- | --- | --- |
"""

_RECIPES_INTRODUCTION = """# Shipped recipes

<!-- Written by docs/generate_reference.py; change the code, then run it. -->

`heliostat recipes` lists them, `heliostat run NAME --dry-run` prints one with all its settings and the figures below in detail.
Figures are formulas, not measurements: [large models](../guides/large_models.md) says how they are made and how far to trust
them. Batch is images per step over all GPUs, GiB is the memory of one. The file of a recipe says where its values come from.

| recipe | run | model | steps | batch | GPUs | A100-hours | H100-hours | GiB |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def model_of(annotation: Any) -> type[BaseModel] | None:
    """The section that an annotation names, None for a plain value."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def type_text(annotation: Any) -> str:
    """The type of a value in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if model_of(annotation) is not None:
        words = "section"
    elif origin is Annotated:
        words = type_text(arguments[0])
    elif origin is Literal:
        words = " or ".join(f"`{value}`" for value in arguments)
    elif origin in (Union, UnionType):
        words = " or ".join(type_text(argument) for argument in arguments)
    elif origin is tuple:
        is_list = arguments[-1] is Ellipsis
        words = f"list of {type_text(arguments[0])}" if is_list else f"{len(arguments)} {type_text(arguments[0])}s"
    elif origin is dict:
        words = f"mapping of {type_text(arguments[0])} to {type_text(arguments[1])}"
    else:
        words = _WORDS[annotation]
    return words


def bounds(annotation: Any, metadata: Any) -> Iterator[str]:
    """The limits of a field, those inside of a union included."""
    for entry in metadata:
        if isinstance(entry, FieldInfo):
            yield from bounds(None, entry.metadata)
        for name, words in _BOUNDS.items():
            value = getattr(entry, name, None)
            if value is not None and not isinstance(entry, FieldInfo):
                yield f"matches `{value}`" if name == "pattern" else words.format(number(value))
    for argument in get_args(annotation):
        if get_origin(argument) is Annotated:
            yield from bounds(None, argument.__metadata__)


def number(value: float) -> str:
    """A number without an empty fraction, thousands separated."""
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def default_text(field: FieldInfo) -> str:
    """The default as it would be written in a recipe."""
    if model_of(field.annotation) is not None:
        return "left out" if field.default is None else ""
    if field.default_factory is not None:
        return f"`{json.dumps(field.get_default(call_default_factory=True))}`"
    if field.default is PydanticUndefined:
        return "**required**"
    return f"`{json.dumps(field.default)}`"


def row(key: str, field: FieldInfo) -> str:
    """One line of a table."""
    limits = ", ".join(bounds(field.annotation, field.metadata))
    cells = [f"`{key}`", type_text(field.annotation), default_text(field), limits, prose(field.description)]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def prose(text: str | None) -> str:
    """A description on one line; `<name>` would be an HTML tag outside of code."""
    pieces = " ".join((text or "").split()).split("`")
    return "`".join(piece if position % 2 else piece.replace("<", "&lt;") for position, piece in enumerate(pieces))


def recipe_keys() -> str:
    """The page about every key of a recipe."""
    fields = dict(walk_fields(Recipe))
    pages = [_KEYS_INTRODUCTION]
    general = [row(key, field) for key, field in fields.items() if key.partition(".")[0] not in STAGES]
    pages.append("\n## For all stages\n\n" + _HEADER + "".join(general))
    for stage in STAGES:
        keys = [key for key in fields if key.startswith(f"{stage}.")]
        known = (
            {key.partition(".")[2]: fields[key] for key in fields if key.startswith("pretrain.")} if stage == "distill" else {}
        )
        shown = [key for key in keys if not _same(fields[key], known.get(key.partition(".")[2]))]
        pages.append(f"\n## {stage}\n\n{prose(fields[stage].description)}\n\n")
        if hidden := len(keys) - len(shown):
            pages.append(f"The {hidden} keys not listed here are those of [pretrain](#pretrain), with `{stage}.` in front.\n\n")
        pages.append(_HEADER + "".join(row(key, fields[key]) for key in shown))
    return "".join(pages)


def _same(field: FieldInfo, other: FieldInfo | None) -> bool:
    """True when two fields read alike."""
    return other is not None and row("", field) == row("", other)


def metrics_page() -> str:
    """The page about every metric."""
    lines = [_METRICS_INTRODUCTION]
    for metric in METRICS.values():
        exported = f"`{metric.prometheus_name}`" if metric.live else ""
        lines.append(f"| `{metric.name}` | {metric.unit} | {exported} | {metric.meaning} |\n")
    return "".join(lines)


def recipes_page() -> str:
    """The page about the shipped recipes: what each run trains and costs."""
    lines = [_RECIPES_INTRODUCTION]
    for name in shipped_recipes():
        recipe = read_recipe(name)
        runs = [run for stage in recipe.stages if stage != "sweep" for run in training_runs(recipe, stage)]
        lines += [_recipe_row(name, run) for run in runs]
    lines.append("\nWhat each is for:\n\n")
    for name in shipped_recipes():
        first = find_recipe(name).read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        lines.append(f"- [`{name}`](../../platform/heliostat/recipes/{name}.yaml): {first}\n")
    return "".join(lines)


def _recipe_row(name: str, run: TrainingRun) -> str:
    """One line of the table of recipes."""
    config, on_gpus = run.config, run.config.scaling.use_gpu
    models = [f"{one.arch}/{one.patch_size} {one.ffn_layer} {one.embed_dim}x{one.depth}" for one in config.backbones.values()]
    hours = [f"{value:,.0f}" for value in gpu_hours(run.flops).values()] if on_gpus else ["", ""]
    gpus = f"{config.scaling.num_workers}" if on_gpus else "none"
    memory = f"{run.memory.total / GIB:.1f}" if on_gpus else f"{run.memory.total / GIB:.2f}"
    figures = [f"{config.train.steps:,}", f"{config.train.global_batch_size:,}", gpus, *hours, memory]
    return f"| `{name}` | {run.name} | {', '.join(models)} | {' | '.join(figures)} |\n"


PAGES = {"recipe_keys.md": recipe_keys, "recipes.md": recipes_page, "metrics.md": metrics_page}

if __name__ == "__main__":
    REFERENCE.mkdir(exist_ok=True)
    for name, render in PAGES.items():
        (REFERENCE / name).write_text(render(), encoding="utf-8")
        print(f"written: {REFERENCE / name}")

"""The best settings of a sweep as a recipe file that trains them."""

from collections.abc import Mapping
from typing import Any

import yaml

from heliostat.artifacts import Artifact
from heliostat.config import StrictModel, apply_overrides, canonical_json, validate
from heliostat.runtime.recipe import Recipe
from heliostat.runtime.sweep_config import SweepConfig
from heliostat.runtime.sweep_points import short
from heliostat.runtime.sweep_table import Group
from heliostat.training.recipe import PretrainConfig

BEST = "best.yaml"


def best_recipe(recipe: Recipe, sweep: SweepConfig, best: Group, *, inputs: Mapping[str, Artifact]) -> str:
    """A complete recipe `<name>-best`: the pretrain section with the best settings, on the artifacts that the sweep read.

    What all trials shared to be short (`sweep.overrides`) is left out, and so is the seed. Raises ConfigError when the
    settings do not fit the section at its own length.
    """
    base = recipe.pretrain
    assert base is not None, "a sweep has a pretrain section"  # noqa: S101
    plain = apply_overrides(base.model_dump(mode="json"), words(best))
    plain["data"] = base.data or str(inputs["data"].ref)
    if "labelled" in inputs:
        plain["online"]["labelled"] = str(inputs["labelled"].ref)
    sections: dict[str, Any] = {"name": f"{recipe.name}-best", "version": recipe.version, "store": recipe.store}
    pretrain = validate(PretrainConfig, plain, BEST)
    parts = {"tracking": recipe.tracking, "cluster": recipe.cluster, "pretrain": pretrain}
    sections |= {name: written for name, part in parts.items() if (written := _changed(part))}
    return _comment(sweep, best) + yaml.safe_dump(sections, sort_keys=False, width=120)


def _changed(section: StrictModel) -> dict[str, Any]:
    """What a section says that differs from its defaults."""
    plain: dict[str, Any] = section.model_dump(mode="json", exclude_defaults=True)
    return plain


def words(best: Group) -> list[str]:
    """The best settings as overrides of a command line."""
    return [f"{key}={canonical_json(value)}" for key, value in best.trials[0].point.settings.items()]


def _comment(sweep: SweepConfig, best: Group) -> str:
    first = best.trials[0]
    spread = f" ± {short(best.spread)}" if len(best.counted) > 1 else ""
    lines = [
        f"The best of a sweep: {sweep.metric} {short(best.value)}{spread} over {len(best.counted)} seeds, at step {best.step}."
    ]
    if len(best.counted) == 1:
        lines = [f"The best of a sweep: {sweep.metric} {short(best.value)} of one trial, at step {best.step}."]
    lines.append(f"Settings: {' '.join(words(best)) or 'those of the recipe'}" + (f" ({first.label})" if first.label else ""))
    if sweep.overrides:
        shared = " ".join(f"{key}={canonical_json(value)}" for key, value in sweep.overrides.items())
        lines.append(f"The trials also had {shared}, which is left out here.")
    return "".join(f"# {line}\n" for line in lines)

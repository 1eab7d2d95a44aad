"""Overrides of a stage verb find their section; every shipped recipe is valid and can say what it costs."""

from pathlib import Path

import pytest

from heliostat.cli import main
from heliostat.config import shipped_recipes
from heliostat.errors import ConfigError
from heliostat.runtime.recipe import STAGES, Recipe, read_recipe, scope_overrides


@pytest.mark.parametrize(
    ("stage", "override", "scoped"),
    [
        ("pretrain", "optim.lr=1", "pretrain.optim.lr=1"),
        ("pretrain", " optim.lr=1", "pretrain.optim.lr=1"),
        ("pretrain", "pretrain.optim.lr=1", "pretrain.optim.lr=1"),
        ("pretrain", "store=./x=y", "store=./x=y"),
        ("pretrain", "distill.optim.lr=1", "distill.optim.lr=1"),
        ("pretrain", "data=curated/x@1", "pretrain.data=curated/x@1"),
        ("pretrain", "unknown=1", "pretrain.unknown=1"),
        ("ingest", "pool=./x", "ingest.pool=./x"),
        ("curate", "curated=raw/x@1", "curate.curated=raw/x@1"),
        ("curate", "version=2", "version=2"),
        ("", "optim.lr=1", "optim.lr=1"),
    ],
)
def test_a_key_belongs_to_the_section_of_its_verb_unless_it_is_one_of_the_recipe(stage, override, scoped) -> None:
    assert scope_overrides((override,), stage) == [scoped]


def test_no_section_has_a_key_that_a_verb_could_not_reach() -> None:
    """A key of a section that is also one of the recipe is read as the section's: the recipe's must then not be needed."""
    top = set(Recipe.model_fields)
    for stage in STAGES:
        for candidate in Recipe.model_fields[stage].annotation.__args__:
            assert not set(getattr(candidate, "model_fields", {})) & top, stage


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_is_valid_and_prints_its_costs(name: str, capsys, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", name, "--dry-run"]) == 0
    output = capsys.readouterr().out
    recipe = read_recipe(name)
    for stage in ("pretrain", "distill"):
        assert (f"# {stage}: " in output) == (getattr(recipe, stage) is not None)
    for stage in recipe.stages:
        assert main([stage, name, "--dry-run"]) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_stage_key_at_the_top_of_a_whole_run_is_not_guessed() -> None:
    with pytest.raises(ConfigError, match=r"unknown key: optim\. Did you mean"):
        read_recipe("laptop", ("optim.lr=1",))


def test_the_artifacts_of_a_recipe_bear_its_name_and_version() -> None:
    recipe = read_recipe("laptop", ("name=birds", "version=2024-05"))
    assert str(recipe.ref("model")) == "model/birds@2024-05"
    assert str(recipe.ref("raw", "-heldout")) == "raw/birds-heldout@2024-05"


def test_a_version_that_looks_like_a_number_is_a_name() -> None:
    assert str(read_recipe("laptop", ("version=2",)).ref("model")) == "model/demo@2"
    with pytest.raises(ConfigError, match=r"version=True: input should be a valid string"):
        read_recipe("laptop", ("version=true",))

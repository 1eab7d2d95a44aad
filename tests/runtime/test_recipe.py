"""Overrides of a stage verb find their section; every shipped recipe is valid and can say what it costs."""

from pathlib import Path

import pytest

from heliostat.cli import main
from heliostat.config import shipped_recipes, validate
from heliostat.data.config import CropsConfig
from heliostat.errors import ConfigError
from heliostat.runtime.recipe import STAGES, Recipe, read_recipe, scope_overrides
from heliostat.training.config import MethodConfig, OptimConfig
from heliostat.training.recipe import TrainConfig
from heliostat.training.schedules import step_values


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
def test_every_stage_of_a_shipped_recipe_can_be_asked_for_by_itself(name: str, capsys, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for stage in read_recipe(name).stages:
        assert main([stage, name, "--dry-run"]) == 0
        assert capsys.readouterr().out.startswith("name: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", sorted(set(shipped_recipes()) - {"laptop", "distill_vitg14"}))
def test_a_recipe_for_own_images_needs_nothing_but_where_they_lie(name: str) -> None:
    recipe = read_recipe(name, ("ingest.pool=s3://bucket/images",))
    assert recipe.stages[0] == "ingest"
    assert recipe.pretrain.data == ""
    assert recipe.curate is None or (recipe.curate.retrieval.mode == "none" and recipe.curate.balance.target_images == "all")


def test_the_long_recipes_share_the_schedule_of_the_paper() -> None:
    """Table 16 of arXiv 2304.07193 and DINOv2's configuration: learning rate, decay and momentum at known steps."""
    for name in ("vits14", "vitb14", "vitl14", "vitg14"):
        config = read_recipe(name).pretrain
        values = [
            step_values(
                step,
                optim=config.optim,
                teacher=config.method.teacher,
                total_steps=config.train.steps,
                global_batch_size=config.train.global_batch_size,
            )
            for step in (0, 1250, 100_000, 312_500, 624_999)
        ]
        expected = [0, 4.33e-6, 3.464e-4, 2.246e-4, 1e-6]
        assert [value.lr for value in values] == pytest.approx(expected, rel=1e-3, abs=1e-9)
        assert [values[0].weight_decay, values[3].weight_decay, values[4].weight_decay] == pytest.approx([0.04, 0.12, 0.2])
        assert [values[0].momentum, values[3].momentum, values[4].momentum] == pytest.approx([0.994, 0.997, 1.0])


def test_the_short_recipe_is_made_of_our_defaults_except_where_the_original_has_no_registers() -> None:
    config = read_recipe("vitl16_short").pretrain
    assert config.method == MethodConfig()
    assert config.optim == OptimConfig()
    assert config.crops == CropsConfig(local_crops_size=96)
    assert config.train.steps == TrainConfig().steps == 125_000
    assert config.student.num_register_tokens == 0


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


SMALL = {"arch": "vit_tiny", "img_size": 56}


@pytest.mark.parametrize(
    ("sections", "made"),
    [
        ({"students": {"a": SMALL, "a-hr": SMALL}, "phases": [{"name": "hr", "steps": 2, "global_crops_size": 224}]}, "a-hr"),
        ({"students": {"a": SMALL, "a-scratch": SMALL}, "compare_with_scratch": True}, "a-scratch"),
        ({"students": {"a": SMALL, "teacher": SMALL}, "teacher": "w.pth", "teacher_head_steps": 5}, "teacher"),
        ({"students": {"highres": SMALL}}, "highres"),
    ],
)
def test_two_models_of_one_name_are_refused(sections, made) -> None:
    phases = [{"name": "highres", "steps": 2, "global_crops_size": 224}]
    plain = {"name": "x", "pretrain": {"phases": phases}, "distill": {"train": {"steps": 125_000}} | sections}
    with pytest.raises(ConfigError, match=f"model/x-{made}@1 would be made twice"):
        validate(Recipe, plain, "x")

"""Overrides of a stage verb find their section; every shipped recipe is valid and can say what it costs."""

from pathlib import Path

import pytest

from heliostat.cli import main
from heliostat.config import shipped_recipes, validate
from heliostat.data.config import CropsConfig
from heliostat.errors import ConfigError
from heliostat.runtime.recipe import STAGES, DedupStage, Recipe, read_recipe, scope_overrides
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


def recipe_of(**sections: object) -> Recipe:
    """A recipe of these sections, as its file would be read."""
    return validate(Recipe, {"name": "x", **sections}, "x.yaml")


@pytest.mark.parametrize(
    ("sections", "stages"),
    [
        ({"ingest": {"pool": "./lake"}, "curate": {}}, ["ingest", "embed", "dedup", "curate"]),
        ({"curate": {}}, ["embed", "dedup", "curate"]),
        ({"curate": {"copies": "copies/y@1"}}, ["curate"]),
        ({"dedup": {"features": "features/y@1"}, "curate": {}}, ["dedup", "curate"]),
        ({"dedup": {}}, ["embed", "dedup"]),
        ({"embed": {"batch_size": 8}, "curate": {}}, ["embed", "dedup", "curate"]),
        ({"crawl": {"contact": "a@b.example", "urls": ["u.txt"]}, "curate": {}}, ["crawl", "embed", "dedup", "curate"]),
        ({"ingest": {"pool": "./lake"}, "pretrain": {"train": {"steps": 125_000}}}, ["ingest", "pretrain"]),
    ],
)
def test_a_recipe_that_curates_has_the_stages_before_it_with_their_defaults(sections, stages) -> None:
    recipe = recipe_of(**sections)
    assert recipe.stages == stages
    for stage in ("embed", "dedup"):
        if stage in stages and stage not in sections:
            assert getattr(recipe, stage) == type(getattr(recipe, stage))()
    # What a dry run prints is the same recipe.
    assert (
        recipe_of(**{name: section for name, section in recipe.model_dump(exclude_none=True).items() if name != "name"})
        == recipe
    )


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            {"crawl": {"contact": "a@b.example"}, "ingest": {"pool": "./lake"}},
            "crawl and ingest.pool both make the raw images; leave one of them out",
        ),
        ({"ingest": {"curated": "./own"}}, "ingest.pool is missing; give a folder, an s3:// prefix"),
        ({"ingest": {}}, "ingest.pool is missing"),
        ({"dedup": {"evaluation": {"a b": "raw/y@1"}}}, "dedup.evaluation: 'a b' cannot name an artifact; use letters"),
        (
            {"dedup": {"evaluation": {"val": "./photos"}}},
            "dedup.evaluation.val: './photos' is not an artifact; write kind/name",
        ),
        (
            {"dedup": {"evaluation": {"val": "features/y@1"}}},
            "dedup.evaluation.val=features/y@1 is of another kind; name raw/NAME",
        ),
        (
            {"ingest": {"pool": "./lake", "evaluation": "./val"}, "dedup": {"evaluation": {"evaluation": "raw/y@1"}}},
            "evaluation names two sets, raw/x-evaluation@1 and raw/y@1; rename one of them",
        ),
        (
            {
                "dedup": {"evaluation": {"birds": "raw/y@1"}},
                "curate": {"retrieval": {"mode": "auto", "sets": {"birds": {"artifact": "raw/z@1"}}}},
            },
            "birds names two sets, raw/y@1 and raw/z@1; rename one of them",
        ),
        (
            {"curate": {"retrieval": {"mode": "auto", "sets": {"../birds": {}}}}},
            "curate.retrieval.sets: '../birds' cannot name an artifact",
        ),
        (
            {"curate": {"retrieval": {"mode": "auto", "sets": {"birds": {"artifact": "curated/z@1"}}}}},
            "curate.retrieval.sets.birds.artifact=curated/z@1 is of another kind; name raw/NAME@VERSION",
        ),
        ({"embed": {"raw": "features/y@1"}}, "embed.raw=features/y@1 is of another kind; name raw/NAME@VERSION"),
        ({"dedup": {"features": "raw/y@1"}}, "dedup.features=raw/y@1 is of another kind; name features/NAME@VERSION"),
        ({"dedup": {"previous": "features/y@1"}}, "dedup.previous=features/y@1 is of another kind; name copies/NAME@VERSION"),
        ({"curate": {"copies": "copies/y"}}, "curate.copies: 'copies/y' is not an artifact; write kind/name@version"),
    ],
)
def test_sections_that_cannot_go_together_are_refused_when_the_recipe_is_read(sections, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        recipe_of(**sections)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_crawl_brings_the_pool_and_ingest_the_sets_beside_it() -> None:
    recipe = recipe_of(crawl={"contact": "a@b.example", "urls": ["u.txt"]}, ingest={"curated": "./own", "evaluation": "./val"})
    assert recipe.stages == ["crawl", "ingest"]
    assert recipe.evaluation_sets() == {"evaluation": "raw/x-evaluation@1"}


def test_the_sets_to_embed_are_those_that_dedup_and_curate_look_at() -> None:
    plain = recipe_of(ingest={"pool": "./lake", "curated": "./own", "evaluation": "./val"}, curate={})
    assert plain.curated_sets() == {}
    assert plain.embedded_sets() == {"evaluation": "raw/x-evaluation@1"}
    retrieval = {"mode": "auto", "sets": {"birds": {"artifact": "raw/birds@2"}, "own": {}, "val": {"artifact": "raw/val@1"}}}
    recipe = recipe_of(
        ingest={"pool": "./lake", "curated": "./own", "evaluation": "./val"},
        dedup={"evaluation": {"val": "raw/val@1"}},
        curate={"retrieval": retrieval},
    )
    assert recipe.curated_sets() == {"birds": "raw/birds@2", "own": "raw/x-curated@1", "val": "raw/val@1"}
    assert list(recipe.evaluation_sets()) == ["evaluation", "val"]
    assert recipe.embedded_sets() == {  # val serves both, and is embedded once
        "evaluation": "raw/x-evaluation@1",
        "val": "raw/val@1",
        "birds": "raw/birds@2",
        "own": "raw/x-curated@1",
    }
    sampled = recipe_of(curate={"retrieval": {"mode": "sample"}})
    assert sampled.curated_sets() == {"curated": "raw/x-curated@1"}


@pytest.mark.parametrize(
    ("stage", "override"),
    [("dedup", "copies.threshold=0.7"), ("dedup", "dedup.copies.threshold=0.7"), ("", "dedup.copies.threshold=0.7")],
)
def test_a_key_of_an_implied_section_can_be_set(stage: str, override: str) -> None:
    recipe = read_recipe("laptop", (override,), stage)
    assert recipe.dedup.copies.threshold == 0.7
    assert recipe.dedup.copies.limits("copy").threshold == 0.7
    assert (
        recipe.dedup.copies.limits("copy").decontamination_threshold
        == DedupStage().copies.limits("copy").decontamination_threshold
    )


def test_a_verb_sets_the_keys_of_its_own_section_and_a_whole_recipe_those_of_any(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.yaml").write_text("name: own\ningest: {pool: ./lake}\ncurate: {}\n")
    recipe = read_recipe(
        "own.yaml", ("embed.batch_size=3", "dedup.evaluation.val=raw/val@1", "retrieval.mode=sample"), "curate"
    )
    assert recipe.embed.batch_size == 3
    assert recipe.dedup.evaluation == {"val": "raw/val@1"}
    assert recipe.curate.retrieval.mode == "sample"
    assert read_recipe("own.yaml", ("crawl.contact=a@b.example", "ingest.pool=''")).crawl is not None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dedup.copies.threshold=-1", "dedup.copies.threshold -1 is below dedup.join.edge_floor 0.5"),
        ("dedup.join.edge_floor=0.9", "dedup.copies.threshold 0.74 is below dedup.join.edge_floor 0.9"),
        ("dedup.previous=copies/photos@1", "dedup.previous=copies/photos@1 is what this recipe makes"),
        ("curate.balance.target_images=0", "target_images 0 keeps no image; give 1 or more"),
    ],
)
def test_thresholds_that_dedup_would_refuse_at_its_end_are_refused_before_anything_runs(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_recipe("vits14", ("ingest.pool=s3://bucket/images", "name=photos", override))


def test_thresholds_are_not_compared_where_copies_are_not_looked_for() -> None:
    overrides = ("ingest.pool=s3://bucket/images", "dedup.copies.threshold=-1", "dedup.copies.enabled=false")
    assert read_recipe("vits14", overrides).dedup is not None

"""Recipes are strict, and every mistake is one line that says what to do."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field, ValidationError, model_validator

from heliostat.config import (
    RECIPES,
    StrictModel,
    apply_overrides,
    canonical_json,
    changed_fields,
    find_recipe,
    flatten,
    load_mapping,
    load_recipe,
    parse_yaml,
    shipped_recipes,
    validate,
    walk_fields,
)
from heliostat.errors import ConfigError


class Optim(StrictModel):
    """Settings of an optimizer."""

    lr: float = Field(default=1e-3, gt=0)
    """Learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_steps: int | None = None


class Crops(StrictModel):
    image_size: int
    name: str
    flip: bool = False


class Probe(StrictModel):
    k: int = 10


class Recipe(StrictModel):
    optim: Optim = Optim()
    crops: Crops
    probes: tuple[Probe, ...] = ()

    @model_validator(mode="after")
    def _even(self) -> "Recipe":
        if self.crops.image_size % 2:
            raise ValueError(f"crops.image_size {self.crops.image_size} is odd; use {self.crops.image_size + 1}")
        return self


BASE: dict[str, Any] = {"crops": {"image_size": 32, "name": "photos"}}


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(Recipe, apply_overrides(BASE, overrides), "r.yaml")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == 2
    return str(caught.value)


def test_overrides_reach_any_depth_and_leave_the_recipe_alone() -> None:
    before = json.dumps(BASE)
    recipe = validate(Recipe, apply_overrides(BASE, ["optim.lr=2e-4", "crops.flip=true", "optim.betas=[0.5, 1]"]), "r.yaml")
    assert recipe.optim == Optim(lr=2e-4, betas=(0.5, 1.0))
    assert recipe.crops.flip is True
    assert recipe.crops.name == "photos"
    assert json.dumps(BASE) == before


def test_the_last_of_two_overrides_wins_and_a_section_can_be_replaced_whole() -> None:
    mapping = apply_overrides(
        BASE, ["optim.lr=1.0", "optim.lr=2.0", "crops={image_size: 8, name: a=b}", "probes=[{k: 1}, {k: 5}]"]
    )
    recipe = validate(Recipe, mapping, "r.yaml")
    assert recipe.optim.lr == 2.0
    assert recipe.crops == Crops(image_size=8, name="a=b")
    assert [probe.k for probe in recipe.probes] == [1, 5]


def test_an_override_can_open_a_section_that_the_recipe_leaves_out_or_empty() -> None:
    assert apply_overrides({"optim": None}, ["optim.lr=1", "model.depth=2"]) == {"optim": {"lr": 1}, "model": {"depth": 2}}


def test_an_empty_value_is_null() -> None:
    assert apply_overrides(BASE, ["optim.warmup_steps="])["optim"] == {"warmup_steps": None}


def test_an_override_of_a_section_that_an_anchor_shares_changes_only_that_one() -> None:
    recipe = parse_yaml("teacher: &vit {depth: 4}\nstudent: *vit\n", "r.yaml")
    assert apply_overrides(recipe, ["student.depth=2"]) == {"teacher": {"depth": 4}, "student": {"depth": 2}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.rl=1", "r.yaml: unknown key: optim.rl. Did you mean optim.lr?"),
        ("optm.lr=1", "r.yaml: unknown key: optm. Did you mean optim?"),
        ("lr=1", "r.yaml: unknown key: lr. Did you mean optim.lr?"),
        ("optim.image_size=1", "r.yaml: unknown key: optim.image_size. Did you mean crops.image_size?"),
        ("optim.momentum=1", "r.yaml: unknown key: optim.momentum. Known here: lr, betas, warmup_steps"),
        ("probes=[{kk: 3}]", "r.yaml: unknown key: probes.0.kk. Did you mean probes.k?"),
        ("crops.image_size=3.5", "r.yaml: crops.image_size=3.5: input should be a valid integer"),
        ("crops.image_size='32'", "r.yaml: crops.image_size='32': input should be a valid integer"),
        ("crops.name=3", "r.yaml: crops.name=3: input should be a valid string"),
        ("crops.flip=1", "r.yaml: crops.flip=1: input should be a valid boolean"),
        ("optim.lr=-1", "r.yaml: optim.lr=-1: input should be greater than 0"),
        ("optim.lr=.inf", "r.yaml: optim.lr=inf: input should be a finite number"),
        ("optim.lr=fast", "r.yaml: optim.lr='fast': input should be a valid number"),
        ("crops=3", "r.yaml: crops=3: input should be an object"),
        ("crops.image_size=33", "r.yaml: crops.image_size 33 is odd; use 34"),
        (
            "crops={image_size: 32}",
            "r.yaml: missing key: crops.name; add it to the recipe or give crops.name=...",
        ),
        (
            "crops={}",
            "r.yaml: missing key: crops.image_size; add it to the recipe or give crops.image_size=... (and 1 more)",
        ),
        (
            "crops.name=2026-11-22",
            "r.yaml: Object of type date is not JSON serializable; "
            "a recipe holds numbers, strings, booleans, lists and mappings",
        ),
        (
            "optim.warmup_steps=9223372036854775808",
            "r.yaml: optim.warmup_steps=9223372036854775808 is outside of -2^63 to 2^63; whole numbers have 64 bits",
        ),
        (
            "probes=[{k: 99999999999999999999999}]",
            "r.yaml: probes.0.k=99999999999999999999999 is outside of -2^63 to 2^63; whole numbers have 64 bits",
        ),
        ("crops.name=2026-13-45", "override crops.name: not valid YAML: month must be in 1..12"),
        ("crops={a: 1, a: 2}", "override crops:1: key 'a' is given twice; keep one"),
        ("crops.image_size.x=1", "crops.image_size is a value, not a section; crops.image_size.x cannot be set"),
        ("crops", "'crops' is not an override; write key.path=value"),
        ("=3", "'=3' is not an override; write key.path=value"),
    ],
)
def test_a_wrong_override_is_refused_with(override: str, message: str) -> None:
    assert refusal(override) == message


@pytest.mark.parametrize("text", ["[1, 2", "{a: 1", "a: b: c", "'open", "\x01", "&a *b", "--- 1\n--- 2"])
def test_text_that_is_not_yaml_is_one_line(text: str) -> None:
    assert refusal(f"crops.name={text}").startswith("override crops.name: not valid YAML: ")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4),
        ("1E6", 1e6),
        ("+1e6", 1e6),
        ("-5e-1", -0.5),
        ("1.", 1.0),
        (".5", 0.5),
        ("-.5e1", -5.0),
        ("1_000.5", 1000.5),
        (".inf", math.inf),
        ("-.inf", -math.inf),
        ("7", 7),
        ("-7", -7),
        ("1_000", 1000),
        ("'2e-4'", "2e-4"),
        ("e5", "e5"),
        ("1e", "1e"),
        ("1.2.3", "1.2.3"),
        ("v1.2", "v1.2"),
        (".", "."),
        ("true", True),
        ("~", None),
    ],
)
def test_numbers_follow_yaml_1_2(text: str, value: object) -> None:
    parsed = parse_yaml(text, "text")
    assert (type(parsed), parsed) == (type(value), value)


def test_every_way_to_print_a_float_reads_back_as_that_float() -> None:
    generator = random.Random(7)
    for _ in range(500):
        value = generator.uniform(-10, 10) * 10.0 ** generator.randint(-30, 30)
        for text in (repr(value), f"{value:.17e}", f"{value:.17E}"):
            parsed = parse_yaml(text, "text")
            assert isinstance(parsed, float)
            assert parsed == value, text


def test_any_leaf_can_be_set_by_the_override_that_flatten_names() -> None:
    generator = random.Random(11)

    def tree(depth: int) -> dict[str, Any]:
        leaves: list[Any] = [3, -2.5, 1e-9, True, None, "text", "2e-4", "with = and: colon", [1, [2, "x"]], {}]
        grow = depth < 3
        return {
            f"key{number}": tree(depth + 1) if grow and generator.random() < 0.4 else generator.choice(leaves)
            for number in range(generator.randint(1, 4))
        }

    for _ in range(100):
        wanted = tree(0)
        overrides = [f"{key}={json.dumps(value)}" for key, value in flatten(wanted).items()]
        generator.shuffle(overrides)
        built = apply_overrides({}, overrides)
        assert built == wanted
        assert changed_fields(built, wanted) == []
        assert canonical_json(built) == canonical_json(wanted)


def test_a_key_given_twice_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("optim:\n  lr: 1\n  betas: [1, 2]\n  lr: 2\n")
    with pytest.raises(ConfigError) as caught:
        load_mapping(path)
    assert str(caught.value) == f"{path}:4: key 'lr' is given twice; keep one"


@pytest.mark.parametrize(("content", "kind"), [("- 1\n- 2\n", "list"), ("", "NoneType"), ("hello\n", "str")])
def test_a_recipe_that_is_no_mapping_is_refused(tmp_path: Path, content: str, kind: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_mapping(path)
    assert str(caught.value) == f"{path}: a recipe is a mapping of sections, this is a {kind}"


def test_a_recipe_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=f"^cannot read recipe {path}: "):
        load_mapping(path)


def test_a_recipe_is_found_by_path_first_and_by_name_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe("laptop") == RECIPES / "laptop.yaml"
    assert find_recipe("recipes/laptop.yaml") == RECIPES / "laptop.yaml"
    (tmp_path / "laptop.yaml").write_text("{}\n")
    assert find_recipe("laptop.yaml") == Path("laptop.yaml")


def test_an_unknown_recipe_names_the_nearest_or_all() -> None:
    with pytest.raises(ConfigError) as caught:
        find_recipe("latpop")
    assert str(caught.value) == "no recipe at latpop. Did you mean laptop?"
    with pytest.raises(ConfigError) as caught:
        find_recipe("somewhere/qqqqqqqq.yaml")
    assert str(caught.value) == f"no recipe at somewhere/qqqqqqqq.yaml. Shipped recipes: {', '.join(shipped_recipes())}"


def test_every_shipped_recipe_is_a_mapping() -> None:
    assert "laptop" in shipped_recipes()
    for name in shipped_recipes():
        assert load_mapping(find_recipe(name)), name


def test_a_recipe_file_with_overrides_becomes_a_frozen_model(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("crops: {image_size: 16, name: a}\noptim: {lr: 5e-4}\n")
    recipe = load_recipe(Recipe, str(path), ["crops.name=b"])
    assert recipe == Recipe(crops=Crops(image_size=16, name="b"), optim=Optim(lr=5e-4))
    with pytest.raises(ValidationError, match="frozen"):
        recipe.optim = Optim()  # type: ignore[misc]


class Ranges(StrictModel):
    values: dict[str, Probe | tuple[float, ...]] = Field(default_factory=dict)
    limit: int | str | None = None


@pytest.mark.parametrize(
    ("plain", "key"),
    [({"values": {"optim.lr": {"k": "x"}}}, "values.optim.lr"), ({"limit": []}, "limit=[]"), ({"values": {"str": []}}, None)],
)
def test_an_error_names_the_key_without_the_branches_of_a_union(plain: dict[str, Any], key: str | None) -> None:
    if key is None:  # a key that is named as a branch is
        assert validate(Ranges, plain, "r.yaml").values == {"str": ()}
        return
    with pytest.raises(ConfigError) as caught:
        validate(Ranges, plain, "r.yaml")
    assert str(caught.value).startswith(f"r.yaml: {key}")
    assert "Probe" not in str(caught.value)


def test_a_written_model_validates_to_itself() -> None:
    recipe = Recipe(crops=Crops(image_size=16, name="b"), optim=Optim(lr=5e-4, warmup_steps=3), probes=(Probe(k=2),))
    assert validate(Recipe, recipe.model_dump(mode="json"), "r.yaml") == recipe


def test_the_fields_of_a_recipe_are_walked_with_their_sections_and_documentation() -> None:
    fields = dict(walk_fields(Recipe))
    assert list(fields)[:3] == ["optim", "optim.lr", "optim.betas"]
    assert {"crops.image_size", "probes.k"} <= set(fields)
    assert fields["optim.lr"].description == "Learning rate."


def test_changed_fields_shows_what_differs_and_nothing_else() -> None:
    old = {"optim": {"lr": 1e-3, "wd": 0.1}, "crops": [1, 2], "gone": 1, "same": {"a": {"b": None}}}
    new = {"optim": {"lr": 2e-3, "wd": 0.1}, "crops": [1, 3], "fresh": "x", "same": {"a": {"b": None}}}
    assert changed_fields(old, new) == [
        "crops: [1, 2] -> [1, 3]",
        "fresh: absent -> x",
        "gone: 1 -> absent",
        "optim.lr: 0.001 -> 0.002",
    ]
    assert changed_fields(old, old) == []


def test_canonical_json_ignores_the_order_of_keys_and_refuses_what_json_cannot_hold() -> None:
    assert canonical_json({"b": 1, "a": [1.5, None]}) == '{"a":[1.5,null],"b":1}' == canonical_json({"a": [1.5, None], "b": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"a": math.nan})

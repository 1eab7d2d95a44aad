"""The publish stage: a release with everything in it, or nothing."""

import io
from pathlib import Path

import pytest
import torch
import yaml
from random_backbone import random_model, tiny_config

from heliostat.artifacts import ArtifactRef, verify
from heliostat.config import validate
from heliostat.errors import ConfigError, PublishError, UsageError
from heliostat.models.public import read_public_weights
from heliostat.publishing.torchvision_operators import import_torchvision
from heliostat.runtime.pipelines import Context
from heliostat.runtime.progress import Progress
from heliostat.runtime.recipe import Recipe
from heliostat.runtime.stage_publish import check_publish, publish

RELEASE = ArtifactRef("release", "tiny", "1")


def context_of(store: Path, **publishing) -> tuple[Context, io.StringIO]:
    stream = io.StringIO()
    sections = {"name": "tiny", "store": str(store), "tracking": {"uri": "none"}, "publish": publishing}
    recipe = validate(Recipe, sections, "tiny")
    return Context(recipe, Progress(stream)), stream


def test_a_release_holds_what_was_asked_for_and_the_card_says_how_near_it_is(tmp_path: Path) -> None:
    random_model(tmp_path, tiny_config("mlp_registers"))
    context, stream = context_of(tmp_path, formats=["fair", "huggingface"], license="mit")
    release = publish(context, context.recipe.publish)
    verify(release)
    assert sorted(release.record.files) == [
        "README.md",
        "config.json",
        "huggingface/config.json",
        "huggingface/model.safetensors",
        "huggingface/preprocessor_config.json",
        "model.safetensors",
        "parity.json",
    ]
    parity = release.read_json("parity.json")["largest_difference"]
    assert release.record.metrics == {"publish/largest_difference": max(parity.values())}
    card = release.files.read("README.md").decode()
    for name, difference in parity.items():
        assert f"| {name} | {difference:g} |" in card
        assert f"{name}: parity with the model, largest difference {difference:g}" in stream.getvalue()
    assert read_public_weights(tmp_path / "release/tiny@1").config == tiny_config("mlp_registers")
    assert read_public_weights(tmp_path / "release/tiny@1/huggingface").config == tiny_config("mlp_registers")


def test_an_export_that_fails_its_parity_check_leaves_nothing_to_be_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_torchvision()
    import timm

    real = timm.create_model

    def load(*arguments, **options):
        model = real(*arguments, **options)
        torch.nn.init.constant_(model.norm.bias, 1.0)
        return model

    random_model(tmp_path, tiny_config("mlp"))
    context, _ = context_of(tmp_path, formats=["fair", "timm"])
    with monkeypatch.context() as patch:
        patch.setattr(timm, "create_model", load)
        with pytest.raises(PublishError, match=r"^timm of model/tiny@1 gives features that differ by"):
            publish(context, context.recipe.publish)
    assert context.artifacts.find(RELEASE) is None
    assert [entry.key for entry in context.artifacts.files(RELEASE).list()] == ["draft.json"]
    assert "timm/model.safetensors" in publish(context, context.recipe.publish).record.files


def test_what_a_format_cannot_hold_is_refused_before_anything_is_begun(tmp_path: Path) -> None:
    random_model(tmp_path, tiny_config("mlp_registers", proj_bias=False))
    context, stream = context_of(tmp_path, formats=["timm"])
    with pytest.raises(ConfigError, match=r"publish\.formats has timm, which cannot hold this backbone"):
        publish(context, context.recipe.publish)
    assert list(context.artifacts.files(RELEASE).list()) == []
    assert stream.getvalue() == ""


def test_a_recipe_whose_release_could_not_be_made_is_refused_before_it_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    from heliostat.runtime.recipe import read_recipe

    check_publish(read_recipe("laptop"))
    changes = ("publish.formats=[fair,huggingface]", "distill.student.proj_bias=false")
    with pytest.raises(ConfigError, match=r"has huggingface, .*proj_bias=False"):
        check_publish(read_recipe("laptop", changes))
    check_publish(read_recipe("laptop", (*changes, "publish.model=model/other@1")))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"needs transformers: pip install 'heliostat\[export\]'"):
        check_publish(read_recipe("laptop", ("publish.formats=[huggingface]",)))


TWO_STUDENTS = "distill.students={small: {embed_dim: 64, depth: 2, num_heads: 2, patch_size: 8, img_size: 32}, "
TWO_STUDENTS += "large: {embed_dim: 128, depth: 2, num_heads: 2, patch_size: 8, img_size: 32, proj_bias: false}}"


@pytest.mark.parametrize("formats", ["[fair]", "[fair,huggingface]"])
def test_several_students_of_which_none_is_chosen_are_refused_at_once(
    formats: str, tmp_path: Path, capsys, monkeypatch
) -> None:
    from heliostat.cli import main

    text = (Path(__file__).parents[2] / "platform/heliostat/recipes/laptop.yaml").read_text(encoding="utf-8")
    own = yaml.safe_load(text)
    del own["distill"]["student"]
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    words = ["run", "own.yaml", TWO_STUDENTS, f"publish.formats={formats}"]
    for more in ([], ["--dry-run"]):
        assert main([*words, *more]) == 2
        assert capsys.readouterr().err == (
            "heliostat: recipe demo makes several students (model/demo-small@1, model/demo-large@1); "
            "give publish.model=... to choose one\n"
        )
    assert main([*words, "--dry-run", "publish.model=model/demo-small@1"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["own.yaml"]
    capsys.readouterr()
    chosen = main([*words, "--dry-run", "publish.model=model/demo-large@1"])
    assert chosen == (2 if "huggingface" in formats else 0)


def test_the_backbone_of_a_phase_is_the_one_that_is_checked() -> None:
    from heliostat.runtime.recipe import read_recipe

    recipe = read_recipe("vitl14")
    assert recipe.backbone_of(recipe.final_model).img_size == 518
    assert recipe.backbone_of(recipe.ref("model")) == recipe.pretrain.student
    assert recipe.backbone_of(ArtifactRef("model", "other", "1")) is None
    laptop = read_recipe("laptop")
    for suffix in ("-student", "-student-scratch"):
        assert laptop.backbone_of(laptop.ref("model", suffix)) == laptop.distill.student


def test_the_command_says_so_before_it_starts_anything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from heliostat.cli import main

    words = ["run", "laptop", f"store={tmp_path / 'store'}", "publish.formats=[timm]", "distill.student.ffn_bias=false"]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "publish.formats has timm, which cannot hold this backbone" in error
    assert not (tmp_path / "store").exists()

"""Nothing is published that its own library does not read back as the model."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from random_backbone import random_model, tiny_config
from tiny_training import job, settings, train

from heliostat.artifacts import Artifact, ArtifactRef, ArtifactStore
from heliostat.config import validate
from heliostat.errors import ConfigError, PublishError, UsageError
from heliostat.models.weights import save_file as real_save_file
from heliostat.publishing.config import PublishConfig
from heliostat.publishing.export import FORMATS, check_architecture, check_libraries, export_formats
from heliostat.publishing.torchvision_operators import import_torchvision
from heliostat.storage import LocalStore

ALL = PublishConfig(formats=("fair", "huggingface", "timm", "onnx"))
FILES = {
    "fair": ["config.json", "model.safetensors"],
    "huggingface": ["huggingface/config.json", "huggingface/model.safetensors", "huggingface/preprocessor_config.json"],
    "timm": ["timm/config.json", "timm/model.safetensors"],
    "onnx": ["onnx/model.onnx", "onnx/preprocessing.json"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return random_model(tmp_path_factory.mktemp("store"), tiny_config("swiglu_registers"))


def files_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_every_format_is_written_and_says_how_near_it_is(model: Artifact, tmp_path: Path) -> None:
    differences = export_formats(model, ALL, tmp_path)
    assert list(differences) == list(FORMATS) == list(FILES)
    assert max(differences.values()) < 1e-4
    assert differences["fair"] == 0.0
    assert files_below(tmp_path) == sorted([*(name for names in FILES.values() for name in names), "parity.json"])
    parity = json.loads((tmp_path / "parity.json").read_text())
    assert parity["largest_difference"] == differences
    assert parity["images"] == {"shape": [4, 3, 32, 32], "pixels": "normal", "seed": 0}
    assert parity["tolerance"] == 1e-4
    assert parity["libraries"]["torch"] == torch.__version__
    assert sorted(parity["libraries"]) == ["onnx", "onnxruntime", "onnxscript", "timm", "torch", "transformers"]


@pytest.mark.parametrize("name", ["fair", "huggingface", "timm"])
def test_one_format_alone_leaves_its_own_files_only(model: Artifact, tmp_path: Path, name) -> None:
    assert list(export_formats(model, PublishConfig(formats=(name,)), tmp_path)) == [name]
    assert files_below(tmp_path) == sorted([*FILES[name], "parity.json"])


def test_a_trained_model_without_registers_is_published_too(tmp_path: Path) -> None:
    artifacts = ArtifactStore(LocalStore(tmp_path / "store"))
    draft = artifacts.begin(ArtifactRef("model", "tiny", "1"), config={}, inputs={}, notify=print)
    released = ("student.num_register_tokens=0", "student.interpolate_antialias=false", "student.interpolate_offset=0.1")
    train(job(draft.files, settings("train.steps=5", *released)))
    model = draft.commit(counts={"steps": 5}, code_version="0.1.0")
    (tmp_path / "release").mkdir()
    formats = PublishConfig(formats=("fair", "huggingface", "timm"))
    assert max(export_formats(model, formats, tmp_path / "release").values()) < 1e-4


def altered(parameter: torch.Tensor) -> None:
    with torch.no_grad():
        parameter.view(-1)[0] += 0.1


def damage_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    import_torchvision()
    from transformers import AutoModel

    real = AutoModel.from_pretrained

    def load(*arguments, **options):
        model, report = real(*arguments, **options)
        altered(model.encoder.layer[1].attention.k_proj.weight)
        return model, report

    monkeypatch.setattr(AutoModel, "from_pretrained", load)


def damage_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    import_torchvision()
    import timm

    real = timm.create_model

    def load(*arguments, **options):
        model = real(*arguments, **options)
        altered(model.reg_token)
        return model

    monkeypatch.setattr(timm, "create_model", load)


def damage_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    class Session(onnxruntime.InferenceSession):
        def run(self, *arguments):
            first, *rest = super().run(*arguments)
            return [first * float("nan"), *rest]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)


def damage_safetensors(monkeypatch: pytest.MonkeyPatch) -> None:
    def save(tensors, path, metadata):
        real_save_file(tensors | {"norm.bias": tensors["norm.bias"] + 0.001}, path, metadata)

    monkeypatch.setattr("heliostat.models.weights.save_file", save)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("fair", damage_safetensors),
        ("huggingface", damage_transformers),
        ("timm", damage_timm),
        ("onnx", damage_onnx),
    ],
)
def test_a_library_that_gives_other_features_stops_the_export(
    model: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name, damage
) -> None:
    damage(monkeypatch)
    message = rf"^{name} of model/tiny@1 gives features that differ by \S+, the limit publish\.parity_tolerance is 0\.0001;"
    with pytest.raises(PublishError, match=message) as refused:
        export_formats(model, PublishConfig(formats=(name,)), tmp_path)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "parity.json").exists()


def test_whatever_a_library_raises_becomes_one_line(model: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_torchvision()
    import timm

    class RefusedError(Exception):
        """Libraries have exceptions of their own that derive from nothing nearer, as onnxruntime's do."""

    def refuse(*arguments, **options):
        raise RefusedError("layer 3 is not known\nmore")

    monkeypatch.setattr(timm, "create_model", refuse)
    message = r"^timm of model/tiny@1 cannot be written and read back: RefusedError: layer 3 is not known; are the libraries"
    with pytest.raises(PublishError, match=message) as refused:
        export_formats(model, PublishConfig(formats=("timm",)), tmp_path)
    assert "\n" not in str(refused.value)
    assert isinstance(refused.value.__cause__, RefusedError)


def test_a_backbone_that_a_format_cannot_hold_is_refused_with_the_formats_that_can() -> None:
    config = tiny_config("mlp_registers", proj_bias=False)
    check_architecture(("fair", "onnx"), config)
    with pytest.raises(ConfigError, match=r"has huggingface, which cannot hold .* \(proj_bias=False.*these can: fair, onnx$"):
        check_architecture(("fair", "huggingface"), config)
    with pytest.raises(ConfigError, match=r"has timm, which cannot hold"):
        check_architecture(("timm",), config)


def test_a_missing_library_is_named_with_the_command_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    check_libraries(tuple(FORMATS))
    real = importlib.util.find_spec
    absent = {"timm", "onnxscript", "onnxruntime"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else real(name))
    check_libraries(("fair", "huggingface"))
    with pytest.raises(UsageError, match=r"has timm, which needs timm: pip install 'heliostat\[export\]'$"):
        check_libraries(("fair", "timm"))
    with pytest.raises(UsageError, match=r"has onnx, which needs onnxscript, onnxruntime: pip"):
        check_libraries(("onnx",))


@pytest.mark.parametrize(
    ("formats", "message"),
    [
        ([], "formats=.*at least 1 item"),
        (["fair", "fair"], r"formats: a format is named twice; use \[fair\]"),
        (["coreml"], "formats.0='coreml': input should be 'fair', 'huggingface', 'timm' or 'onnx'"),
    ],
)
def test_formats_that_make_no_sense_are_refused_in_the_recipe(formats, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(PublishConfig, {"formats": formats}, "publish")

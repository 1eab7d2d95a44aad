"""A release is read back before it counts; the snippet of its card runs as it stands."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_training import job, settings, train

from heliostat.artifacts import Artifact, ArtifactRef, ArtifactStore
from heliostat.errors import CheckpointError, PublishError
from heliostat.models.stored import read_backbone, read_info, tensors_from_bytes, tensors_to_bytes
from heliostat.publishing.card import render_card
from heliostat.publishing.config import PublishConfig
from heliostat.publishing.export import config_json, export_safetensors, parity
from heliostat.storage import LocalStore


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A model artifact of five training steps."""
    artifacts = ArtifactStore(LocalStore(tmp_path_factory.mktemp("store")))
    draft = artifacts.begin(ArtifactRef("model", "tiny", "1"), config={}, inputs={}, notify=print)
    train(job(draft.files, settings("train.steps=5")))
    return draft.commit(counts={"steps": 5}, code_version="0.1.0")


def card(model: Artifact, **changes) -> str:
    values = {"lineage": ["model/tiny@1"], "rows": [], "difference": 0.0, "config": PublishConfig(license="mit")} | changes
    return render_card(record=model.record, info=read_info(model), **values)


def test_an_exported_file_gives_the_models_features_exactly(model: Artifact) -> None:
    files, difference = export_safetensors(model, 1e-5)
    assert sorted(files) == ["config.json", "model.safetensors"]
    assert difference == 0.0
    config = json.loads(files["config.json"])
    assert config["architecture"]["embed_dim"] == 32
    assert config["preprocessing"] == {
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "image_size": 32,
        "grayscale": False,
    }


@pytest.mark.parametrize("name", ["cls_token", "patch_embed.proj.weight", "norm.bias", "blocks.1.mlp.fc2.weight", "pos_embed"])
def test_parity_sees_a_change_in_any_part_of_the_weights(model: Artifact, name: str) -> None:
    backbone, info = read_backbone(model)
    files, _ = export_safetensors(model, 1e-5)
    tensors = tensors_from_bytes(files["model.safetensors"], "model.safetensors")
    tensors[name] = tensors[name] + 10 * torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(0))
    assert parity(backbone, info, tensors_to_bytes(tensors), files["config.json"]) > 1e-4
    tensors[name] = tensors[name] * torch.nan
    found = parity(backbone, info, tensors_to_bytes(tensors), files["config.json"])
    assert not found <= 1e-5  # NaN passes no comparison


def test_a_file_that_differs_by_more_than_the_limit_is_not_published(model: Artifact) -> None:
    with pytest.raises(PublishError, match=r"model\.safetensors of model/tiny@1 .* differ by 0, the limit is -1"):
        export_safetensors(model, -1.0)


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"", lambda data: data[:8] + b"{" + data[9:]])
def test_a_torn_file_is_refused_by_name(model: Artifact, damage) -> None:
    backbone, info = read_backbone(model)
    files, _ = export_safetensors(model, 1e-5)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        parity(backbone, info, damage(files["model.safetensors"])[:-1], files["config.json"])


def test_the_snippet_of_the_card_loads_the_release_and_gives_the_models_features(model: Artifact, tmp_path: Path) -> None:
    files, _ = export_safetensors(model, 1e-5)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    (snippet,) = [part.partition("```")[0] for part in card(model).split("```python\n")[1:]]
    code = (
        "import numpy, torch\nimages = torch.from_numpy(numpy.load('images.npy'))\n"
        f"{snippet}\nnumpy.save('cls.npy', features.cls_BD.detach().numpy())\n"
        "numpy.save('patches.npy', features.patches_BND.detach().numpy())\n"
    )
    images = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "images.npy", images.numpy())
    subprocess.run([sys.executable, "-W", "error", "-X", "dev", "-c", code], cwd=tmp_path, check=True, timeout=120)
    with torch.inference_mode():
        expected = read_backbone(model)[0](images)
    np.testing.assert_allclose(np.load(tmp_path / "cls.npy"), expected.cls_BD.numpy(), atol=1e-6)
    np.testing.assert_allclose(np.load(tmp_path / "patches.npy"), expected.patches_BND.numpy(), atol=1e-6)


def test_the_card_says_what_the_model_is(model: Artifact) -> None:
    rows = [{"name": "teacher", "version": "colour", "knn": 0.5, "linear": 0.625, "num_seeds": 1}]
    text = card(model, rows=rows, difference=1e-7)
    head, _, body = text.removeprefix("---\n").partition("\n---\n")
    assert "license: mit" in head.splitlines()
    for shown in ("# tiny, version 1", "vit_tiny, width 32, 2 blocks, 2 heads, patch 8", "5 steps, 40 images seen"):
        assert shown in body
    assert "| teacher | colour | 50.0 | 62.5 | 1 |" in body
    assert "Not evaluated." in card(model)
    assert model.record.fingerprint[:16] in body


def test_the_front_matter_stays_one_even_with_an_odd_licence(model: Artifact) -> None:
    import yaml

    config = PublishConfig(license="other: see\nLICENSE")
    head = card(model, config=config).split("---\n")[1]
    assert yaml.safe_load(head)["license"] == "other: see\nLICENSE"


def test_the_config_of_a_grey_model_says_so(model: Artifact) -> None:
    info = read_info(model).model_copy(update={"grayscale": True})
    assert json.loads(config_json(info))["preprocessing"]["grayscale"] is True
    record = replace(model).record
    text = render_card(record=record, info=info, config=PublishConfig(), lineage=[], rows=[], difference=0.0)
    assert "pixels: luminance in 0..1" in text

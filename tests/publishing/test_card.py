"""The card is true: its snippets run as they stand, its numbers are those of the export."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from random_backbone import random_model, tiny_config

from heliostat.artifacts import Artifact
from heliostat.models.stored import read_backbone, read_info
from heliostat.publishing.card import render_card
from heliostat.publishing.config import PublishConfig
from heliostat.publishing.export import FORMATS, export_formats

ALL = tuple(FORMATS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return random_model(tmp_path_factory.mktemp("store"), tiny_config("mlp_registers"))


@pytest.fixture(scope="module")
def release(model: Artifact, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("release")
    differences = export_formats(model, PublishConfig(formats=ALL), folder)
    return folder, card(model, differences=differences)


def card(model: Artifact, **changes) -> str:
    values = {"lineage": ["model/tiny@1"], "rows": [], "differences": {"fair": 0.0}, "config": PublishConfig(license="mit")}
    values["total_costs"] = {}
    return render_card(**({"record": model.record, "info": read_info(model)} | values | changes))


def front_matter(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


@pytest.mark.parametrize("place", range(len(ALL)), ids=ALL)
def test_the_snippet_of_a_format_loads_the_release_and_gives_the_models_features(model: Artifact, release, place: int) -> None:
    folder, text = release
    snippets = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(snippets) == len(ALL)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    np.save(folder / "images.npy", images.numpy())
    code = (
        "import numpy, torch\n"
        # Where torchvision fits torch this does nothing; see publishing/torchvision_operators.py.
        "from heliostat.publishing.torchvision_operators import import_torchvision\nimport_torchvision()\n"
        f"images = torch.from_numpy(numpy.load('images.npy'))\n{snippets[place]}\n"
        "for name, tokens in (('cls', cls), ('patches', patches)):\n"
        "    numpy.save(name + '.npy', torch.as_tensor(tokens).detach().numpy())\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    with torch.inference_mode():
        expected = read_backbone(model)[0](images)
    np.testing.assert_allclose(np.load(folder / "cls.npy"), expected.cls_BD.numpy(), atol=1e-4)
    np.testing.assert_allclose(np.load(folder / "patches.npy"), expected.patches_BND.numpy(), atol=1e-4)


def test_the_card_names_each_published_format_and_its_difference_and_no_other(model: Artifact, release) -> None:
    _, text = release
    for name in ALL:
        assert re.search(rf"^\| {name} \| [0-9.e-]+ \|$", text, re.M)
    assert front_matter(text)["library_name"] == "heliostat"
    assert front_matter(text)["tags"][-3:] == ["transformers", "timm", "onnx"]
    only = card(model, differences={"timm": 2.5e-6})
    assert front_matter(only)["library_name"] == "timm"
    assert "| timm | 2.5e-06 |" in only
    assert "transformers" not in only
    assert len(re.findall("```python", only)) == 1
    assert "timm has no mask token" in only


def test_the_card_says_what_the_model_is(model: Artifact) -> None:
    rows = [{"name": "teacher", "version": "colour", "knn": 0.5, "linear": 0.625, "num_seeds": 1}]
    text = card(model, rows=rows)
    assert front_matter(text)["license"] == "mit"
    for shown in ("# tiny, version 1", "vit_small, width 128, 2 blocks, 2 heads, patch 8", "5 steps, 40 images seen"):
        assert shown in text
    assert "| teacher | colour | 50.0 | 62.5 | 1 |" in text
    assert "Not evaluated." in card(model)
    assert model.record.fingerprint[:16] in text


def test_the_front_matter_stays_one_even_with_an_odd_licence(model: Artifact) -> None:
    text = card(model, config=PublishConfig(license="other: see\nLICENSE"))
    assert front_matter(text)["license"] == "other: see\nLICENSE"


def test_the_card_of_a_grey_model_says_so(model: Artifact) -> None:
    info = read_info(model).model_copy(update={"grayscale": True})
    text = card(model, info=info, differences={"fair": 0.0, "huggingface": 0.0})
    assert "pixels: luminance in 0..1" in text
    assert "The image processor cannot make luminance" in text


def test_the_card_says_what_training_has_cost_alone_and_with_its_ancestors(model: Artifact) -> None:
    names = ("gpu_hours", "worker_hours", "wasted_worker_hours", "energy_kwh", "energy_measured_ratio", "co2_kg", "dollars")
    own = dict(zip((f"cost/{name}" for name in names), (2.0, 2.0, 0.0, 0.88, 0.0, 0.34, 4.0), strict=True))
    total = {name: 10 * value for name, value in own.items()}
    text = card(model, record=model.record.model_copy(update={"costs": own}), total_costs=total)
    assert "- this model: 2.0 GPU-hours, 0.88 kWh (modelled), 0.34 kg CO2, 4.0 dollars\n" in text
    assert "- with the models that it was made from: 20 GPU-hours, 8.8 kWh (modelled), 3.4 kg CO2, 40 dollars\n" in text
    assert "Costs of training" not in card(model)


@pytest.mark.parametrize(("alias", "reason"), [("latest", "MLflow keeps for itself"), ("v3", "itself"), ("a b", "use letters")])
def test_an_alias_that_the_registry_would_refuse_is_refused_with_the_recipe(alias: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        PublishConfig(aliases=(alias,))

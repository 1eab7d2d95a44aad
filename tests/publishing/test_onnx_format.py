"""What onnxruntime computes from our graph."""

import json
import re

import onnxruntime
import pytest
import torch
from random_backbone import info_of, random_backbone, random_images, tiny_config

from heliostat.publishing import onnx_format
from heliostat.publishing.formats import Tokens, largest_difference


@pytest.fixture(scope="module", params=["mlp", "swiglu_registers"])  # an export takes seconds
def written(request, tmp_path_factory):
    config = tiny_config(request.param)
    backbone = random_backbone(config)
    folder = tmp_path_factory.mktemp(request.param)
    onnx_format.write(backbone, info_of(config), folder)
    return config, backbone, folder


def test_onnxruntime_gives_the_features_of_the_model_for_any_number_of_images(written, capfd):
    config, backbone, folder = written
    images = random_images(config, count=7)
    features = backbone(images)
    ours = Tokens(features.cls_BD, features.registers_BRD, features.patches_BND)
    assert largest_difference(ours, onnx_format.read_back(folder, images)) < 1e-4
    assert capfd.readouterr() == ("", "")


def test_the_description_names_inputs_and_outputs_of_the_graph(written):
    config, _, folder = written
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    description = json.loads((folder / "preprocessing.json").read_text())
    assert [(one.name, one.shape) for one in session.get_inputs()] == [(description["input"], description["shape"])]
    assert [one.name for one in session.get_outputs()] == description["outputs"]
    assert ("registers" in description["outputs"]) is (config.num_register_tokens > 0)
    assert description["mean"] == [0.4, 0.5, 0.6]


def test_the_graph_holds_nothing_of_the_machine_that_wrote_it(written):
    _, _, folder = written
    data = (folder / "model.onnx").read_bytes()
    assert not re.search(rb"stack_trace|\.py\b|/home|/root|/tmp|heliostat", data)


def test_the_same_backbone_gives_the_same_bytes(tmp_path):
    config = tiny_config("swiglu_registers", depth=1)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        onnx_format.write(random_backbone(config), info_of(config), tmp_path / name)
    assert (tmp_path / "a" / "model.onnx").read_bytes() == (tmp_path / "b" / "model.onnx").read_bytes()


def test_large_weights_lie_in_a_file_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_format, "_ONE_FILE_BYTES", 1000)
    config = tiny_config("mlp")
    backbone, images = random_backbone(config), random_images(config)
    onnx_format.write(backbone, info_of(config), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data", "preprocessing.json"]
    assert (tmp_path / "model.onnx").stat().st_size < 100_000
    features = backbone(images)
    read = onnx_format.read_back(tmp_path, images)
    torch.testing.assert_close(read.patches_BND, features.patches_BND, atol=1e-4, rtol=0)

"""Every way to name an embedder, what each refuses, and that the vectors are those of the network behind it."""

import json
import warnings
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from random_backbone import random_backbone, random_model, tiny_config
from safetensors.torch import save_file

from heliostat.artifacts import ArtifactStore
from heliostat.curation.embed import ThumbnailEmbedder
from heliostat.curation.open_embedder import OpenEmbedderConfig, open_embedder
from heliostat.data.photographs import photograph
from heliostat.errors import ArtifactNotFoundError, CheckpointError, DataError, UsageError
from heliostat.models.names import to_fair_names, to_huggingface_names
from heliostat.storage import LocalStore

CONFIG = OpenEmbedderConfig(image_size=32, batch_size=2)


def pictures(count: int = 5) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    image = photograph("coffee")
    return [image[top : top + 70, left : left + 90] for top, left in generator.integers(0, 280, (count, 2))]


class Pooled(torch.nn.Module):
    """The mean of each channel of each half: six numbers that tell left from right and red from green."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        left, right = images.chunk(2, dim=3)
        return torch.cat([left.mean(dim=(2, 3)), right.mean(dim=(2, 3))], dim=1)


class Unpooled(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images * 2


def write_torchscript(path: Path, network: torch.nn.Module) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and what released descriptors come in
        torch.jit.script(network).save(str(path))
    return path


def write_onnx(path: Path, shape: list, kind: int = TensorProto.FLOAT, *, axes: tuple[int, ...] = (2, 3)) -> Path:
    """Mean over the spatial axes of the input, as float."""
    names = [side if isinstance(side, int) else f"axis_{index}" for index, side in enumerate(shape)]
    nodes = [
        helper.make_node("Cast", ["pixels"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["float"], ["vector"], axes=list(axes), keepdims=0),
    ]
    output = helper.make_tensor_value_info("vector", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "mean", [helper.make_tensor_value_info("pixels", kind, names)], [output])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


def normalised(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_the_two_words_open_the_embedders_of_the_house():
    assert open_embedder("thumbnail") == ThumbnailEmbedder()
    copy = open_embedder("copy")
    assert (copy.name, copy.dimension) == ("copy", 256)
    assert len(copy.version) == 16


def test_a_model_artifact_and_its_own_files_give_the_same_vectors(tmp_path):
    store = LocalStore(tmp_path)
    model = random_model(tmp_path, tiny_config("mlp"))
    by_reference = open_embedder(str(model.ref), CONFIG, artifacts=ArtifactStore(store))
    folder = tmp_path / "model" / f"{model.ref.name}@{model.ref.version}"
    mean_and_std = json.loads((folder / "model.json").read_text())
    by_path = open_embedder(
        str(folder / "backbone.safetensors"),
        CONFIG.model_copy(update={name: tuple(mean_and_std[name]) for name in ("mean", "std")}),
    )
    np.testing.assert_allclose(by_reference(pictures()), by_path(pictures()), atol=1e-6)
    assert by_reference.name == str(model.ref)
    other_size = open_embedder(str(model.ref), OpenEmbedderConfig(image_size=40), artifacts=ArtifactStore(store))
    assert other_size.version != by_reference.version


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", "/"])
def test_a_backbone_of_others_is_opened_from_a_file_or_a_folder(tmp_path, suffix):
    backbone = random_backbone(tiny_config("mlp_registers"))
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(to_fair_names(backbone.state_dict()), path)
    elif suffix == ".safetensors":
        save_file(to_fair_names(backbone.state_dict()), path)
    else:
        path.mkdir()
        save_file(to_huggingface_names(backbone.state_dict()), path / "model.safetensors")
        config = {"model_type": "dinov2_with_registers", "num_attention_heads": 2}
        (path / "config.json").write_text(json.dumps(config))
    image = cv2.resize(photograph("chelsea"), (32, 32), interpolation=cv2.INTER_AREA)
    embedder = open_embedder(str(path), OpenEmbedderConfig(image_size=32, mean=(0.0,) * 3, std=(1.0,) * 3))
    with torch.inference_mode():
        cls = backbone(torch.from_numpy(image.transpose(2, 0, 1)[None].astype(np.float32) / 255.0)).cls_BD
    np.testing.assert_allclose(embedder([image]), normalised(cls.numpy()), atol=1e-5)
    assert embedder.dimension == 128


@pytest.mark.parametrize("fit", ["squeeze", "crop", "edge"])
def test_torchscript_sees_normalised_pixels_in_the_chosen_fit(tmp_path, fit):
    path = write_torchscript(tmp_path / "sscd.torchscript.pt", Pooled())
    embedder = open_embedder(str(path), OpenEmbedderConfig(image_size=40, fit=fit, batch_size=2))
    assert (embedder.dimension, embedder.name) == (6, "sscd.torchscript.pt")
    image = np.zeros((40, 80, 3), np.uint8)
    image[:, 10:20] = (255, 0, 0)  # in the left quarter: the middle square of 40 columns does not show it
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    red_share = {"squeeze": 0.25, "crop": 0.0, "edge": 0.25}[fit]
    expected = np.concatenate([(np.array([red_share, 0, 0]) - mean) / std, -mean / std])[None]
    np.testing.assert_allclose(embedder([image]), normalised(expected), atol=0.01)


def test_batches_of_any_size_give_the_same_vectors(tmp_path):
    torchscript = write_torchscript(tmp_path / "a.pt", Pooled())
    fixed = write_onnx(tmp_path / "fixed.onnx", [4, 3, 24, 24])
    for path in (torchscript, fixed):
        embedder = open_embedder(str(path), OpenEmbedderConfig(image_size=24, batch_size=3))
        together = embedder(pictures())
        np.testing.assert_allclose(together, np.concatenate([embedder([image]) for image in pictures()]), atol=1e-6)
        assert embedder([]).shape == (0, embedder.dimension)


@pytest.mark.parametrize(
    ("shape", "kind", "axes"),
    [
        (["n", 3, 24, 24], TensorProto.FLOAT, (2, 3)),
        (["n", 3, "h", "w"], TensorProto.FLOAT, (2, 3)),
        (["n", 24, 24, 3], TensorProto.UINT8, (1, 2)),
    ],
)
def test_onnx_is_fed_as_its_input_declares(tmp_path, shape, kind, axes):
    path = write_onnx(tmp_path / "mean.onnx", shape, kind, axes=axes)
    embedder = open_embedder(str(path), OpenEmbedderConfig(image_size=24, mean=(0.0,) * 3, std=(1.0,) * 3))
    squares = np.stack([cv2.resize(image, (24, 24), interpolation=cv2.INTER_AREA) for image in pictures()])
    np.testing.assert_allclose(embedder(pictures()), normalised(squares.mean(axis=(1, 2))), atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "config", "message"),
    [
        (["n", 1, 24, 24], {}, r"takes tensor\(float\) \['axis_0', 1, 24, 24\]; an embedder takes"),
        (["n", 3, 24], {}, "an embedder takes"),
        (["n", 3, 24, 24], {"image_size": 32}, "is made for 24 x 24 pixels, image_size is 32"),
        (["n", 3, 24, 24], {"fit": "edge"}, "fit=edge needs a file with open sides"),
    ],
)
def test_onnx_with_another_input_is_refused(tmp_path, shape, config, message):
    path = write_onnx(tmp_path / "mean.onnx", shape, axes=(2,))
    with pytest.raises(CheckpointError, match=message):
        open_embedder(str(path), OpenEmbedderConfig(**config))


def test_an_output_that_is_not_one_vector_per_image_is_refused(tmp_path):
    unpooled = write_torchscript(tmp_path / "unpooled.pt", Unpooled())
    with pytest.raises(CheckpointError, match=r"gives \(1, 3, 24, 24\) for 1 images, .*; export its pooled output"):
        open_embedder(str(unpooled), OpenEmbedderConfig(image_size=24))
    rank_three = write_onnx(tmp_path / "rank.onnx", ["n", 3, 24, 24], axes=(2,))
    with pytest.raises(CheckpointError, match=r"gives \(1, 3, 24\) for 1 images"):
        open_embedder(str(rank_three))


@pytest.mark.parametrize("name", ["none.pth", "none.onnx", "some/folder"])
def test_a_missing_file_is_named(name):
    with pytest.raises(CheckpointError, match=r"no such file or folder; give thumbnail, copy, model/NAME@VERSION"):
        open_embedder(name)


def test_a_word_that_means_nothing_is_a_mistake_of_the_caller():
    with pytest.raises(UsageError, match="embedder 'thumbnial': no such file or folder; give thumbnail, copy"):
        open_embedder("thumbnial")


def test_an_artifact_needs_a_store_and_must_be_there(tmp_path):
    with pytest.raises(UsageError, match="no store of artifacts was given"):
        open_embedder("model/vits@1")
    with pytest.raises(ArtifactNotFoundError):
        open_embedder("model/vits@1", artifacts=ArtifactStore(LocalStore(tmp_path)))


@pytest.mark.parametrize("name", ["torn.onnx", "torn.torchscript", "torn.pt", "torn.safetensors", "torn.pth"])
def test_torn_files_are_refused_in_one_line(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x02 not weights")
    with pytest.raises(CheckpointError, match="is truncated or not") as caught:
        open_embedder(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_side_that_the_patches_do_not_divide_is_refused(tmp_path):
    save_file(to_fair_names(random_backbone(tiny_config("mlp")).state_dict()), tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match="image_size 30 is not divisible by the patch size 8; use 24 or 32"):
        open_embedder(str(tmp_path / "w.safetensors"), OpenEmbedderConfig(image_size=30))


def test_what_is_no_image_is_refused(tmp_path):
    path = write_torchscript(tmp_path / "a.pt", Pooled())
    with pytest.raises(DataError, match="an image is"):
        open_embedder(str(path), CONFIG)([np.zeros((4, 4), np.uint8)])


def test_the_version_follows_weights_and_settings(tmp_path):
    first = write_onnx(tmp_path / "a.onnx", ["n", 3, "h", "w"])
    second = write_onnx(tmp_path / "b.onnx", ["n", 3, 24, "w"])
    versions = [
        open_embedder(str(path), OpenEmbedderConfig(image_size=24, fit=fit)).version
        for path, fit in ((first, "squeeze"), (first, "crop"), (second, "squeeze"))
    ]
    assert len(set(versions)) == 3
    assert open_embedder(str(first), OpenEmbedderConfig(image_size=24, batch_size=7)).version == versions[0]

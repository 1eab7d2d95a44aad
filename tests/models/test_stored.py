"""Reading a model back: the same weights, and nothing drawn at random on the way."""

from pathlib import Path

import pytest
import torch
from random_backbone import difference, random_backbone, random_images, random_model, tiny_config

from heliostat.artifacts import ArtifactRef, ArtifactStore
from heliostat.errors import ArtifactError, ArtifactNotFoundError
from heliostat.models.public import read_public_weights
from heliostat.models.stored import open_backbone, read_states
from heliostat.storage import LocalStore


def test_a_model_is_opened_by_its_name_with_the_weights_that_were_stored(tmp_path: Path) -> None:
    config = tiny_config("swiglu_registers")
    random_model(tmp_path, config)
    state = torch.get_rng_state()
    backbone, info = open_backbone("model/tiny@1", store=str(tmp_path))
    torch.testing.assert_close(torch.get_rng_state(), state, rtol=0, atol=0)
    assert info.backbone == config
    assert difference(backbone, random_backbone(config), random_images(config)) == 0
    assert not backbone.training
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactNotFoundError, match="model/other@1"):
        open_backbone("model/other@1", store=str(tmp_path))


@pytest.mark.parametrize("key", ["backbone.safetensors", "heads.safetensors", "model.json"])
def test_a_flipped_bit_in_the_weights_is_found_by_whatever_reads_them(tmp_path: Path, key: str) -> None:
    random_model(tmp_path, tiny_config("mlp"))
    path = tmp_path / "model" / "tiny@1" / key
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    damaged = pytest.raises(ArtifactError, match=f"model/tiny@1: {key} is damaged, .*; restore the file, or remove the folder")
    with damaged:
        read_public_weights(path.parent)
    if key != "heads.safetensors":
        with damaged:
            open_backbone("model/tiny@1", store=str(tmp_path))
    if key != "model.json":
        with damaged:
            read_states(ArtifactStore(LocalStore(tmp_path)).load(ArtifactRef.parse("model/tiny@1")))

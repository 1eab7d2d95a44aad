import pytest
import torch

from heliostat.errors import CheckpointError
from heliostat.models.config import BackboneConfig
from heliostat.models.vit import VisionTransformer
from heliostat.models.weights import (
    fit_pos_embed,
    load_state,
    read_weights,
    write_weights,
)

CONFIG = BackboneConfig(arch="vit_tiny", embed_dim=16, num_heads=2, depth=2, img_size=56)


def backbone_state():
    return VisionTransformer(CONFIG).state_dict()


def test_written_weights_are_read_back_with_their_metadata(tmp_path):
    state = backbone_state()
    write_weights(tmp_path / "model.safetensors", state, {"arch": "vit_tiny"})
    loaded, metadata = read_weights(tmp_path / "model.safetensors")
    assert metadata == {"arch": "vit_tiny"}
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], state[key]) for key in state)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused_at_every_length(tmp_path, share):
    path = tmp_path / "model.safetensors"
    write_weights(path, backbone_state(), {})
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match=r"model\.safetensors \(\d+ bytes\) is truncated"):
        read_weights(path)


def test_missing_files_are_reported_in_one_line(tmp_path):
    with pytest.raises(CheckpointError, match="cannot read weights"):
        read_weights(tmp_path / "absent")


def test_an_unwritable_place_is_reported(tmp_path):
    with pytest.raises(CheckpointError, match="cannot write weights"):
        write_weights(tmp_path / "absent" / "model.safetensors", backbone_state(), {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("norm.weight"), r"1 missing: norm\.weight"),
        (lambda state: state.update(extra=torch.zeros(1)), "1 unexpected: extra"),
        (lambda state: state.update(cls_token=torch.zeros(1, 1, 8)), r"cls_token \(1, 1, 8\) instead of \(1, 1, 16\)"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_the_keys_are_named(change, message):
    state = backbone_state()
    change(state)
    backbone = VisionTransformer(CONFIG)
    before = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    with pytest.raises(CheckpointError, match=f"teacher does not fit VisionTransformer: .*{message}"):
        load_state(backbone, state, "teacher")
    assert all(torch.equal(tensor, before[key]) for key, tensor in backbone.state_dict().items())


def test_a_long_list_of_keys_is_cut_short():
    backbone = VisionTransformer(CONFIG)
    with pytest.raises(CheckpointError, match=rf"{len(backbone.state_dict())} missing: (\S+, ){{5}}\.\.\.$"):
        load_state(backbone, {}, "empty state")


def test_a_position_embedding_is_fitted_to_another_native_size():
    larger = CONFIG.model_copy(update={"img_size": 84})
    load_state(VisionTransformer(larger), fit_pos_embed(backbone_state(), larger), "resized")
    with pytest.raises(CheckpointError, match="no pos_embed"):
        fit_pos_embed({}, larger)

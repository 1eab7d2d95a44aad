import pickle

import pytest
import torch

from heliostat.errors import CheckpointError
from heliostat.models.config import BackboneConfig, HeadConfig
from heliostat.models.heads import ProjectionHead
from heliostat.models.vit import VisionTransformer
from heliostat.models.weights import (
    fit_pos_embed,
    from_fair_names,
    load_state,
    read_fair_weights,
    read_weights,
    submodule_state,
    to_fair_names,
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
    for read in (read_weights, read_fair_weights):
        with pytest.raises(CheckpointError, match="cannot read weights"):
            read(tmp_path / "absent")


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


def test_fair_names_of_heads_and_chunked_blocks_are_translated():
    head = ProjectionHead(16, HeadConfig(out_dim=12, hidden_dim=10, bottleneck_dim=6))
    fair = to_fair_names(head.state_dict())
    assert {"last_layer.weight_g", "last_layer.weight_v"} <= fair.keys()
    load_state(head, from_fair_names(fair), "head")
    assert list(from_fair_names({"backbone.blocks.1.6.norm1.weight": torch.zeros(1)})) == ["backbone.blocks.6.norm1.weight"]
    assert list(from_fair_names({"blocks.6.norm1.weight": torch.zeros(1)})) == ["blocks.6.norm1.weight"]


def test_a_state_that_mixes_two_layouts_is_refused():
    with pytest.raises(CheckpointError, match="mixes two layouts"):
        from_fair_names({"blocks.0.1.norm1.weight": torch.zeros(1), "blocks.1.norm1.weight": torch.zeros(1)})


def test_released_files_and_training_checkpoints_are_read(tmp_path):
    state = backbone_state()
    torch.save(dict(state), tmp_path / "released.pth")
    load_state(VisionTransformer(CONFIG), read_fair_weights(tmp_path / "released.pth"), "released")
    torch.save({"teacher": {f"backbone.{key}": value for key, value in state.items()}}, tmp_path / "run.pth")
    teacher = read_fair_weights(tmp_path / "run.pth")
    load_state(VisionTransformer(CONFIG), submodule_state(teacher, "backbone"), "run")


class Payload:
    def __reduce__(self):
        return (print, ("code from the file was run",))


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, capsys):
    path = tmp_path / "evil.pth"
    torch.save({"weight": Payload()}, path)
    with pytest.raises(CheckpointError, match="not a file of plain tensors"):
        read_fair_weights(path)
    path.write_bytes(pickle.dumps(Payload(), protocol=2))
    with pytest.raises(CheckpointError, match="not a file of plain tensors"):
        read_fair_weights(path)
    assert "code from the file" not in capsys.readouterr().out


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_truncated_pth_is_refused(tmp_path, share):
    path = tmp_path / "released.pth"
    torch.save(dict(backbone_state()), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match="is truncated"):
        read_fair_weights(path)


def test_a_pth_that_is_not_a_state_dict_is_refused(tmp_path):
    torch.save({"step": 3}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="does not hold a state dict"):
        read_fair_weights(tmp_path / "other.pth")


def test_a_position_embedding_is_fitted_to_another_native_size():
    larger = CONFIG.model_copy(update={"img_size": 84})
    load_state(VisionTransformer(larger), fit_pos_embed(backbone_state(), larger), "resized")
    with pytest.raises(CheckpointError, match="no pos_embed"):
        fit_pos_embed({}, larger)

"""Public weights in every layout and packing give the features of the library that wrote them."""

import hashlib
import json
import pickle
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from random_backbone import VARIANTS, difference, random_backbone, random_images, tiny_config
from safetensors.torch import load_file, save_file
from tiny_training import job, settings, train

from heliostat.errors import CheckpointError
from heliostat.models.config import HeadConfig
from heliostat.models.heads import ProjectionHead
from heliostat.models.names import to_fair_names, to_huggingface_names, to_timm_names
from heliostat.models.public import read_public_weights
from heliostat.models.stored import read_backbone_files
from heliostat.models.vit import VisionTransformer
from heliostat.models.weights import load_state
from heliostat.publishing.torchvision_operators import import_torchvision
from heliostat.storage import LocalStore

TO_LAYOUT = {"fair": to_fair_names, "huggingface": to_huggingface_names, "timm": to_timm_names}
ADDED = "the file has no mask_token; it is zero, as DINOv2 initialises it"


def backbone_of(found) -> VisionTransformer:
    backbone = VisionTransformer(found.config).eval().requires_grad_(False)
    load_state(backbone, found.backbone, "found")
    return backbone


def released(variant="mlp_registers", layout="fair"):
    return TO_LAYOUT[layout](random_backbone(tiny_config(variant)).state_dict())


def huggingface_model(variant: str, **changes):
    """A model of transformers with random weights everywhere."""
    import_torchvision()
    from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    config = tiny_config(variant)
    values = {
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "image_size": config.img_size,
        "patch_size": config.patch_size,
        "use_swiglu_ffn": config.ffn_layer == "swiglufused",
    } | changes
    if config.num_register_tokens:
        values["num_register_tokens"] = config.num_register_tokens
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**values))
    else:
        model = Dinov2Model(Dinov2Config(**values))
    return randomised(model)


def timm_model(variant: str, **changes):
    """A model of timm with random weights everywhere."""
    import_torchvision()
    import timm

    config = tiny_config(variant)
    name = f"vit_{'giant' if config.ffn_layer == 'swiglufused' else 'small'}_patch14_"
    sizes = {"embed_dim": config.embed_dim, "depth": 2, "num_heads": config.num_heads, "patch_size": 8, "img_size": 32}
    if config.num_register_tokens:
        sizes["reg_tokens"] = config.num_register_tokens
    if config.ffn_layer == "swiglufused":
        sizes["mlp_ratio"] = 2 * config.mlp_hidden_dim / config.embed_dim
    name += "reg4_dinov2" if config.num_register_tokens else "dinov2"
    return randomised(timm.create_model(name, **(sizes | changes)))


def randomised(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.1 if parameter.ndim > 1 else 0.3) + offset)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", TO_LAYOUT)
@pytest.mark.parametrize("suffix", ["safetensors", "pth", "bin", "pt"])
def test_a_file_of_any_layout_gives_the_features_that_it_was_written_from(tmp_path, variant, layout, suffix):
    path = tmp_path / f"weights.{suffix}"
    state = released(variant, layout)
    if suffix == "safetensors":
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)
    else:
        torch.save(state, path)
    found = read_public_weights(path)
    config = tiny_config(variant)
    exclude = {"mlp_ratio"} if layout == "timm" else set()
    assert found.config.model_dump(exclude=exclude) == config.model_dump(exclude=exclude)
    assert (found.layout, found.heads) == (layout, {})
    assert found.notes == ((ADDED,) if layout == "timm" else ())
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert difference(random_backbone(config), backbone_of(found), random_images(config)) == 0.0


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("sharded", [False, True])
def test_a_folder_of_hugging_face_gives_the_features_of_transformers(tmp_path, variant, sharded):
    model = huggingface_model(variant)
    model.save_pretrained(tmp_path, max_shard_size="200kB" if sharded else "5GB")
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 2) is sharded
    found = read_public_weights(tmp_path)
    assert found.layout == "huggingface"
    assert found.sha256 == hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    images = random_images(found.config)
    ours = backbone_of(found)(images).prenorm_BTD
    theirs = model(images, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("variant", ["mlp_registers", "swiglu_registers"])
def test_other_sizes_are_interpolated_as_transformers_does_with_registers(tmp_path, variant):
    model = huggingface_model(variant)
    model.save_pretrained(tmp_path)
    found = read_public_weights(tmp_path)
    images = random_images(found.config, size=(56, 24))
    features = backbone_of(found)(images)
    theirs = model(images).last_hidden_state
    torch.testing.assert_close(features.cls_BD, theirs[:, 0], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(features.patches_BND, theirs[:, 1 + found.config.num_register_tokens :], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_state_dict_of_timm_gives_the_features_of_timm(tmp_path, variant):
    model = timm_model(variant)
    torch.save(model.state_dict(), tmp_path / "timm.pth")
    found = read_public_weights(tmp_path / "timm.pth")
    assert (found.layout, found.notes) == ("timm", (ADDED,))
    images = random_images(found.config)
    features = backbone_of(found)(images)
    theirs = model.forward_features(images)
    torch.testing.assert_close(features.cls_BD, theirs[:, 0], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(features.patches_BND, theirs[:, 1 + found.config.num_register_tokens :], atol=1e-4, rtol=1e-5)


def test_a_folder_of_timm_says_how_many_heads_there_are(tmp_path):
    model = timm_model("mlp_registers", num_heads=8)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": "vit_small_patch14_reg4_dinov2", "model_args": {"num_heads": 8, "img_size": 32}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = read_public_weights(tmp_path)
    assert found.config.num_heads == 8
    images = random_images(found.config)
    torch.testing.assert_close(backbone_of(found)(images).cls_BD, model.forward_features(images)[:, 0], atol=1e-4, rtol=1e-5)


def test_heads_of_hugging_face_are_taken_from_its_config_and_another_function_is_refused(tmp_path):
    huggingface_model("mlp", num_attention_heads=8).save_pretrained(tmp_path)
    assert read_public_weights(tmp_path).config.num_heads == 8
    config = json.loads((tmp_path / "config.json").read_text())
    for key, value in (
        ("layer_norm_eps", 1e-5),
        ("hidden_act", "relu"),
        ("num_attention_heads", "8"),
        ("num_attention_heads", 7),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(CheckpointError, match=str(key).removesuffix("s").replace("attention_head", ".*head")):
            read_public_weights(tmp_path)


@pytest.mark.parametrize("model_type", ["dinov3_vit", "vit", None])
def test_a_folder_of_another_model_is_refused_by_name(tmp_path, model_type):
    save_file(released(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(CheckpointError, match=rf"model_type {model_type!r}; only dinov2 and dinov2_with_registers are read"):
        read_public_weights(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architecture": "vit_base_patch16_224"}, "timm's vit_base_patch16_224; only its vit_"),
        ({"architecture": "vit_small_patch14_dinov2", "model_args": {"act_layer": "relu"}}, "sets act_layer, which may change"),
        ({"architecture": {"arch": "vit_small", "wdith": 3}}, "unknown key: wdith"),
        ({"architecture": "vit_small_patch14_dinov2", "model_args": 5}, "model_args of type int; expected a JSON object"),
        ({"architecture": "vit_small_patch14_dinov2", "model_args": {"num_heads": True}}, "num_heads True; expected a whole"),
        ([], "holds a list; expected a JSON object"),
    ],
)
def test_a_folder_whose_config_is_of_something_else_is_refused(tmp_path, config, message):
    save_file(to_timm_names(random_backbone(tiny_config("mlp")).state_dict()), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        read_public_weights(tmp_path)


def test_a_classifier_on_top_is_left_out_and_said_to_be(tmp_path):
    import_torchvision()
    from transformers import Dinov2ForImageClassification

    model = Dinov2ForImageClassification(huggingface_model("mlp", num_labels=5).config)
    model.save_pretrained(tmp_path)
    assert "classifier.weight" in load_file(tmp_path / "model.safetensors")
    found = read_public_weights(tmp_path)
    assert found.notes == ("left out: classifier",)
    backbone_of(found)


def test_the_teacher_of_a_training_checkpoint_comes_with_its_heads(tmp_path):
    heads = {
        f"{name}.{key}": tensor
        for name in ("dino_head", "ibot_head")
        for key, tensor in ProjectionHead(128, HeadConfig(out_dim=12, hidden_dim=10, bottleneck_dim=6)).state_dict().items()
    }
    state = released()
    chunked = {  # one block per chunk, numbered through, as DINOv2's FSDP training writes
        f"backbone.{key.replace('blocks.0.', 'blocks.0.0.').replace('blocks.1.', 'blocks.1.1.')}": tensor
        for key, tensor in state.items()
    }
    torch.save({"teacher": chunked | to_fair_names(heads)}, tmp_path / "teacher_checkpoint.pth")
    found = read_public_weights(tmp_path / "teacher_checkpoint.pth")
    assert found.heads.keys() == heads.keys()
    assert all(torch.equal(found.heads[key], heads[key]) for key in heads)
    config = tiny_config("mlp_registers")
    assert difference(random_backbone(config), backbone_of(found), random_images(config)) == 0.0


def test_an_image_of_another_shape_is_interpolated_by_the_released_convention(tmp_path):
    """Against the formula of the released models written out: bicubic, scale (side + 0.1) / native, no antialiasing."""
    config = tiny_config("mlp")
    torch.save(released("mlp"), tmp_path / "released.pth")
    backbone = backbone_of(read_public_weights(tmp_path / "released.pth"))
    images = random_images(config, size=(48, 16))
    stored = random_backbone(config).pos_embed
    grid = stored[:, 1:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    scale = ((6 + 0.1) / 4, (2 + 0.1) / 4)
    resized = torch.nn.functional.interpolate(grid, scale_factor=scale, mode="bicubic", antialias=False)
    patches = backbone.patch_embed(images) + resized.permute(0, 2, 3, 1).reshape(1, 12, -1)
    cls = (backbone.cls_token + stored[:, :1]).expand(len(images), -1, -1)
    tokens = torch.cat([cls, patches], dim=1)
    assert torch.equal(backbone._tokens(images, None), tokens)
    assert backbone(images).patches_BND.shape == (3, 12, config.embed_dim)


def test_our_model_artifact_and_the_files_of_our_release_are_folders_like_any_other(tmp_path):
    train(job(tmp_path / "model", settings("train.steps=5")))
    found = read_public_weights(tmp_path / "model")
    backbone, info = read_backbone_files(LocalStore(tmp_path / "model"), "model")
    assert found.config == info.backbone
    assert {key.partition(".")[0] for key in found.heads} == {"dino_head", "ibot_head", "dino_targets", "ibot_targets"}
    assert found.notes == ()
    assert difference(backbone, backbone_of(found), random_images(found.config)) == 0.0
    (tmp_path / "release").mkdir()
    save_file(to_fair_names(backbone.state_dict()), tmp_path / "release" / "model.safetensors")
    config = {"architecture": info.backbone.model_dump(mode="json")}
    (tmp_path / "release" / "config.json").write_text(json.dumps(config))
    again = read_public_weights(tmp_path / "release")
    assert (again.config, again.layout) == (info.backbone, "fair")
    (tmp_path / "model" / "model.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"model\.json: missing key: backbone"):
        read_public_weights(tmp_path / "model")


def test_half_precision_is_read_as_float32_and_said_to_be(tmp_path):
    state = {key: tensor.bfloat16() for key, tensor in released().items()}
    save_file(state, tmp_path / "half.safetensors")
    found = read_public_weights(tmp_path / "half.safetensors")
    assert found.notes == ("stored in torch.bfloat16, read as float32",)
    assert torch.equal(found.backbone["pos_embed"], state["pos_embed"].float())


def test_reading_draws_no_random_numbers(tmp_path):
    save_file(released(), tmp_path / "weights.safetensors")
    before = torch.get_rng_state()
    read_public_weights(tmp_path / "weights.safetensors")
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.update(extra=torch.zeros(1)), "1 unexpected: extra"),
        (lambda state: state.pop("norm.bias"), r"1 missing: norm\.bias"),
        (lambda state: state.update({"norm.bias": torch.zeros(3)}), r"norm\.bias \(3,\) instead of \(128,\)"),
        (lambda state: state.update({"norm.bias": torch.full((128,), torch.nan)}), r"norm\.bias .* is not finite"),
        (lambda state: state.update({"norm.bias": torch.zeros(128, dtype=torch.int64)}), r"norm\.bias \(torch\.int64\) is not"),
        (lambda state: [state.pop(key) for key in list(state) if "patch_embed" in key], "of no layout known here"),
        (
            lambda state: state.update({"norm.\nbias": torch.zeros(128)}),
            r"has a tensor named 'norm\.\\nbias'; the file is damaged",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, change, message):
    state = released()
    change(state)
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match=rf"^\S*weights\.safetensors.*{message}"):
        read_public_weights(tmp_path / "weights.safetensors")


@pytest.mark.parametrize("name", ["absent", "absent.pth", "absent.safetensors"])
def test_a_missing_file_is_said_to_be(tmp_path, name):
    with pytest.raises(CheckpointError, match=f"cannot read weights .*{name}"):
        read_public_weights(tmp_path / name)


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"has neither config\.json nor model\.json"):
        read_public_weights(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json as JSON"):
        read_public_weights(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "dinov2"}')
    with pytest.raises(CheckpointError, match=r"cannot read weights .*model\.safetensors"):
        read_public_weights(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "../model.safetensors"}}, r"names files outside its folder: \.\./model"),
        (
            {"weight_map": {"norm.bias": "weights.safetensors", "b": "weights.safetensors"}},
            "1 tensors .* are in none .* first b",
        ),
        ({"weight_map": ["a"]}, "has no weight_map"),
        ({"weight_map": {"a": "absent.safetensors"}}, r"cannot read weights .*absent\.safetensors"),
    ],
)
def test_an_index_that_does_not_agree_with_its_files_is_refused(tmp_path, index, message):
    save_file(released(), tmp_path / "weights.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "dinov2"}')
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        read_public_weights(tmp_path)


class Payload:
    def __reduce__(self):
        return (print, ("code from the file was run",))


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, capsys):
    path = tmp_path / "evil.pth"
    torch.save({"weight": Payload()}, path)
    with pytest.raises(
        CheckpointError, match=r"evil\.pth \(\d+ bytes\) is truncated or not a file of plain tensors: .*; fetch it"
    ):
        read_public_weights(path)
    for protocol in (0, 2, 5):
        path.write_bytes(pickle.dumps(Payload(), protocol=protocol))
        with pytest.raises(CheckpointError, match="not a file of plain tensors"):
            read_public_weights(path)
    assert "code from the file" not in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_torn_or_altered_file_is_refused_in_one_line_or_read_whole(tmp_path: Path, suffix: str) -> None:
    """Cut at many lengths every file is refused; with bytes altered it is refused, or gives tensors of the right shapes."""
    path = tmp_path / f"weights.{suffix}"
    state = {key: tensor.contiguous() for key, tensor in released().items()}
    if suffix == "pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    data = path.read_bytes()
    for share in (0.0, 0.0001, 0.01, 0.3, 0.5, 0.9, 0.999):
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(CheckpointError, match=rf"^\S*weights\.{suffix} \(\d+ bytes\) is truncated") as refused:
            read_public_weights(path)
        assert "\n" not in str(refused.value)
    draw = torch.Generator().manual_seed(0)
    for _ in range(60):
        altered = bytearray(data)
        for place in torch.randint(0, min(len(data), 6000), (3,), generator=draw).tolist():
            altered[place] ^= int(torch.randint(1, 256, (1,), generator=draw))
        path.write_bytes(bytes(altered))
        with suppress(CheckpointError):
            backbone_of(read_public_weights(path))


def test_a_file_that_is_not_a_state_dict_is_refused(tmp_path):
    for value in ({"step": 3}, {"teacher": [1]}, [torch.zeros(1)], {1: torch.zeros(1)}, torch.zeros(1)):
        torch.save(value, tmp_path / "other.pth")
        with pytest.raises(CheckpointError, match="does not hold a state dict"):
            read_public_weights(tmp_path / "other.pth")


def test_a_pointer_of_git_lfs_is_named_and_no_advice_to_run_code_is_passed_on(tmp_path):
    pointer = tmp_path / "weights.pth"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match="is a pointer of git-lfs, not the file; run git lfs pull"):
        read_public_weights(pointer)
    code = tmp_path / "code.pth"
    torch.save({"weight": print}, code)
    with pytest.raises(CheckpointError, match="it asks for code to be run") as error:
        read_public_weights(code)
    assert "weights_only" not in str(error.value)
    assert len(str(error.value)) < 300 + len(str(code))

"""The training stages without Ray: phases, initial weights, teachers, several students."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file
from tiny_training import SETTINGS, SHARD, shard

from heliostat.artifacts import Artifact, ArtifactRef, Draft
from heliostat.config import validate
from heliostat.data.quarantine import QUARANTINE, quarantine_from_bytes
from heliostat.data.shards import MANIFEST_SCHEMA, manifest_rows, manifest_to_bytes
from heliostat.errors import ArtifactConflictError, CheckpointError, DataError, UsageError
from heliostat.lineage import lineage, render_lineage
from heliostat.models.names import to_fair_names
from heliostat.models.stored import read_info, read_states
from heliostat.models.vit import VisionTransformer
from heliostat.runtime.pipelines import Context
from heliostat.runtime.progress import Progress
from heliostat.runtime.recipe import Recipe
from heliostat.runtime.stage_ingest import MANIFEST
from heliostat.runtime.verbs import run_stage
from heliostat.training import loop

PLAIN = {key: value for key, value in SETTINGS.items() if key != "student"}
STUDENT = SETTINGS["student"]
SMALL, OTHER = STUDENT | {"embed_dim": 16}, STUDENT | {"depth": 1}


@pytest.fixture(scope="module")
def tar() -> bytes:
    return shard(2)


class Bench:
    """A store with images in it; runs sections of a recipe in this process and keeps what was said."""

    def __init__(self, folder: Path, tar: bytes) -> None:
        self.folder, self.said = folder, io.StringIO()
        self.images("tiny", tar)

    def images(self, name: str, tar: bytes) -> Artifact:
        draft = self.context().artifacts.begin(ArtifactRef("raw", name, "1"), config={"images": name}, inputs={}, notify=print)
        assert isinstance(draft, Draft)
        draft.put(SHARD, tar)
        draft.put(MANIFEST, manifest_to_bytes(manifest_rows(SHARD, tar)))
        return draft.commit(counts={"images": 34})

    def context(self, **sections: Any) -> Context:
        plain = {"name": "tiny", "store": str(self.folder / "store"), "tracking": {"uri": "none"}} | sections
        return Context(validate(Recipe, plain, "tiny"), Progress(self.said))

    def pretrain(self, version: str = "1", **changes: Any) -> Artifact:
        section = SETTINGS | {"data": "raw/tiny@1"} | changes
        return run_stage(self.context(version=version, pretrain=section), "pretrain")

    def distill(self, version: str = "1", **changes: Any) -> Artifact:
        section = PLAIN | {"data": "raw/tiny@1", "teacher": "model/tiny@1"} | changes
        return run_stage(self.context(version=version, distill=section), "distill")

    def model(self, name: str, version: str = "1") -> Artifact:
        return self.context().artifacts.load(ArtifactRef("model", name, version))

    def artifacts(self) -> set[str]:
        return {str(ref) for ref in self.context().artifacts.list()}

    def folders(self) -> set[str]:
        return {path.name for path in (self.folder / "store" / "model").glob("*")}


@pytest.fixture
def bench(tmp_path: Path, tar: bytes) -> Bench:
    return Bench(tmp_path, tar)


def bare_weights(folder: Path, seed: int = 5) -> tuple[Path, dict[str, torch.Tensor]]:
    """A backbone in a .pth, with DINOv2's names and without heads."""
    from heliostat.models.config import BackboneConfig

    torch.manual_seed(seed)
    state = VisionTransformer(BackboneConfig.model_validate(STUDENT)).state_dict()
    path = folder / f"bare{seed}.pth"
    torch.save(to_fair_names(state), path)
    return path, state


def test_every_phase_is_an_artifact_that_descends_from_the_one_before(bench: Bench) -> None:
    phases = [
        {"name": "larger", "steps": 4, "global_crops_size": 48},
        {"name": "largest", "steps": 2, "global_crops_size": 64, "global_batch_size": 4},
    ]
    last = bench.pretrain(phases=phases)
    assert bench.artifacts() >= {"model/tiny@1", "model/tiny-larger@1", "model/tiny-largest@1"}
    assert (last.record.inputs["init"], last.record.counts["images_seen"]) == ("model/tiny-larger@1", 8)
    assert [read_info(bench.model(name)).backbone.img_size for name in ("tiny", "tiny-larger", "tiny-largest")] == [32, 48, 64]
    assert read_states(last)[0]["pos_embed"].shape == (1, 1 + 8 * 8, 32)
    tree = "\n".join(render_lineage(lineage(bench.context().artifacts, last.ref)))
    assert tree.index("model/tiny-largest@1") < tree.index("init: model/tiny-larger@1") < tree.index("init: model/tiny@1")


def test_a_phase_that_is_added_later_leaves_the_model_as_it_is(bench: Bench) -> None:
    before = bench.pretrain().record
    bench.pretrain(phases=[{"name": "larger", "steps": 2, "global_crops_size": 48}])
    assert bench.model("tiny").record == before
    assert "model/tiny@1: reused" in bench.said.getvalue()


def test_a_phase_begins_with_the_weights_of_the_one_before(bench: Bench) -> None:
    bench.pretrain()
    frozen = [{"name": "again", "steps": 1, "global_crops_size": 32, "lr": 1e-30, "overrides": ["optim.min_lr=0"]}]
    again = bench.pretrain(phases=frozen)
    for states in zip(read_states(bench.model("tiny")), read_states(again), strict=True):
        for key, value in states[0].items():
            if "targets" not in key:  # centres move without a learning rate
                torch.testing.assert_close(states[1][key], value, atol=1e-6, rtol=0, msg=lambda text, key=key: f"{key}: {text}")


def test_a_backbone_stays_as_it_is_while_heads_warm_up(bench: Bench, tmp_path: Path) -> None:
    path, state = bare_weights(tmp_path)
    model = bench.pretrain(init={"weights": str(path), "head_warmup_steps": 8})
    backbone, heads = read_states(model)
    assert all(torch.equal(backbone[key], value) for key, value in state.items())
    assert heads["dino_head.mlp.0.weight"].std() > 0
    assert "init_sha256" in model.record.config
    assert str(tmp_path) not in model.record.model_dump_json()


def test_after_the_head_warmup_the_backbone_moves_slowly(bench: Bench, tmp_path: Path) -> None:
    path, state = bare_weights(tmp_path)
    teacher = {"momentum_teacher": 0.5, "final_momentum_teacher": 0.5, "warmup_teacher_temp_steps": 0}
    method = SETTINGS["method"] | {"teacher": teacher}
    moved = []
    for version, mult in (("1", 0.1), ("2", 1.0)):
        init = {"weights": str(path), "head_warmup_steps": 3, "backbone_lr_mult": mult}
        backbone, _ = read_states(bench.pretrain(version, init=init, method=method))
        name = "blocks.0.attn.proj.weight"
        moved.append(float((backbone[name] - state[name]).abs().mean()))
    assert 0 < moved[0] < 0.2 * moved[1]


def test_fresh_heads_without_a_warmup_are_announced(bench: Bench, tmp_path: Path) -> None:
    bench.pretrain(init={"weights": str(bare_weights(tmp_path)[0])})
    assert "brings no heads and init.head_warmup_steps is 0" in bench.said.getvalue()


def test_heads_of_a_model_are_taken_or_drawn_afresh(bench: Bench) -> None:
    before = read_states(bench.pretrain())[1]
    frozen = {"lr": 1e-30, "min_lr": 0.0, "warmup_steps": 0, "freeze_last_layer_steps": 0, "scaling_rule": "none"}
    taken = bench.pretrain("2", init={"weights": "model/tiny@1"}, optim=frozen)
    fresh = bench.pretrain("3", init={"weights": "model/tiny@1", "heads": "fresh"}, optim=frozen)
    key = "dino_head.mlp.0.weight"
    torch.testing.assert_close(read_states(taken)[1][key], before[key])
    assert not torch.allclose(read_states(fresh)[1][key], before[key])
    assert taken.record.inputs["init"] == "model/tiny@1"


def test_other_weights_under_the_same_version_are_refused(bench: Bench, tmp_path: Path) -> None:
    bench.pretrain(init={"weights": str(bare_weights(tmp_path)[0])})
    with pytest.raises(ArtifactConflictError, match="init_sha256"):
        bench.pretrain(init={"weights": str(bare_weights(tmp_path, seed=6)[0])})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": STUDENT | {"depth": 3}}, r"student\.depth is 3, .*bare5\.pth has 2; set student\.depth"),
        ({"student": STUDENT | {"embed_dim": 16}}, r"student\.embed_dim is 16, .* has 32"),
        ({"student": STUDENT | {"num_register_tokens": 0}}, r"student\.num_register_tokens is 0, .* has 4"),
        ({"student": STUDENT | {"ffn_layer": "swiglufused"}}, r"student\.ffn_layer is swiglufused, .* has mlp"),
        ({"student": STUDENT | {"patch_size": 16}}, r"student\.patch_size is 16, .* has 8"),
    ],
)
def test_weights_of_another_architecture_are_refused_before_anything_is_written(bench, tmp_path, changes, message) -> None:
    init = {"weights": str(bare_weights(tmp_path)[0])}
    with pytest.raises(CheckpointError, match=message) as error:
        bench.pretrain(init=init, **changes)
    assert "\n" not in str(error.value)
    assert bench.folders() == set()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_weight_file_is_refused_before_anything_is_written(bench: Bench, tmp_path: Path, share: float) -> None:
    path, _ = bare_weights(tmp_path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(CheckpointError, match=r"bare5\.pth"):
        bench.pretrain(init={"weights": str(path)})
    assert bench.folders() == set()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("nowhere.pth", r"no weights at nowhere\.pth; give model/name@version, a file"),
        ("s3://bucket/w.pth", "copy them to this machine first"),
        ("raw/tiny@1", "holds no weights; name a model/name@version"),
    ],
)
def test_a_name_without_weights_is_refused(bench: Bench, weights: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        bench.pretrain(init={"weights": weights})


def test_several_students_are_artifacts_of_their_own_and_equal_those_trained_alone(bench: Bench) -> None:
    bench.pretrain()
    bench.distill(students={"small": SMALL, "other": OTHER})
    bench.distill("2", students={"other": OTHER})
    together, alone = bench.model("tiny-other"), bench.model("tiny-other", "2")
    assert together.record.fingerprint == alone.record.fingerprint
    for name in ("backbone.safetensors", "heads.safetensors", "history.jsonl"):
        assert together.files.read(name) == alone.files.read(name), name
    assert together.record.inputs == {"data": "raw/tiny@1", "teacher": "model/tiny@1"}
    assert read_info(bench.model("tiny-small")).backbone.embed_dim == 16
    assert "small: [" in bench.said.getvalue()


def test_a_student_that_is_added_later_is_trained_alone(bench: Bench) -> None:
    bench.pretrain()
    bench.distill(students={"small": SMALL})
    before = bench.model("tiny-small").record
    bench.distill(students={"small": SMALL, "other": OTHER})
    assert bench.model("tiny-small").record == before
    assert bench.model("tiny-other").record.counts["steps"] == 8


def test_students_have_phases_and_a_comparison_without_the_teacher(bench: Bench) -> None:
    bench.pretrain()
    phases = [{"name": "larger", "steps": 2, "global_crops_size": 48}]
    first = bench.distill(students={"small": SMALL}, phases=phases, compare_with_scratch=True)
    assert str(first.ref) == "model/tiny-small@1"
    larger, scratch = bench.model("tiny-small-larger"), bench.model("tiny-small-scratch")
    assert larger.record.inputs == {"data": "raw/tiny@1", "teacher": "model/tiny@1", "init": "model/tiny-small@1"}
    assert read_info(larger).backbone.img_size == 48
    assert scratch.record.inputs == {"data": "raw/tiny@1"}
    assert read_info(scratch).backbone == read_info(first).backbone
    assert scratch.record.counts == first.record.counts


def test_public_weights_without_heads_teach_after_heads_were_trained_on_them(bench: Bench, tmp_path: Path) -> None:
    path, state = bare_weights(tmp_path)
    with pytest.raises(CheckpointError, match="does not say num_heads, and width 32 is not divisible by 64"):
        bench.distill(teacher=str(path), student=SMALL)
    folder = tmp_path / "exported"
    folder.mkdir()
    save_file(to_fair_names(state), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": STUDENT}))
    with pytest.raises(DataError, match=r"has no heads.*give distill\.teacher_head_steps"):
        bench.distill(teacher=str(folder), student=SMALL)
    student = bench.distill(teacher=str(folder), teacher_head_steps=4, student=SMALL)
    teacher = bench.model("tiny-teacher")
    assert student.record.inputs["teacher"] == "model/tiny-teacher@1"
    assert teacher.record.counts["steps"] == 4
    assert all(torch.equal(read_states(teacher)[0][key], value) for key, value in state.items())


def test_public_weights_with_heads_teach_at_once(bench: Bench, tmp_path: Path) -> None:
    model = bench.pretrain()
    folder = tmp_path / "exported"
    folder.mkdir()
    for name in ("model.json", "backbone.safetensors", "heads.safetensors"):
        (folder / name).write_bytes(model.files.read(name))
    from_file = bench.distill("2", teacher=str(folder), student=SMALL)
    from_artifact = bench.distill(student=SMALL)
    assert from_file.files.read("backbone.safetensors") == from_artifact.files.read("backbone.safetensors")
    assert "teacher_sha256" in from_file.record.config


def test_a_checkpoint_of_other_students_is_not_taken_up(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.pretrain()
    one_step = loop.one_step

    def stop_after(trainer, state, batch):
        if state.step == 4:  # its checkpoint is on its way, and is finished before the interruption goes on
            raise KeyboardInterrupt
        one_step(trainer, state, batch)

    monkeypatch.setattr(loop, "one_step", stop_after)
    with pytest.raises(KeyboardInterrupt):
        bench.distill(students={"small": SMALL, "other": OTHER})
    monkeypatch.undo()
    bench.distill(students={"small": SMALL})
    assert "the checkpoint of step 4 is of students small, other; starting again with small" in bench.said.getvalue()
    bench.distill(students={"small": SMALL, "other": OTHER})
    bench.distill("2", students={"small": SMALL, "other": OTHER})
    for name in ("tiny-small", "tiny-other"):
        files = [bench.model(name, version).files.read("backbone.safetensors") for version in ("1", "2")]
        assert files[0] == files[1], name


def test_several_artifacts_are_mixed_by_weight_and_all_are_in_the_lineage(bench: Bench, tar: bytes) -> None:
    bench.images("more", shard(1))
    mixed = bench.pretrain(data={"raw/tiny@1": 0.75, "raw/more@1": 0.25})
    assert mixed.record.inputs == {"data": "raw/tiny@1", "data_2": "raw/more@1"}
    assert mixed.record.config["data_weights"] == [0.75, 0.25]
    with pytest.raises(ArtifactConflictError, match="data_weights"):
        bench.pretrain(data={"raw/tiny@1": 0.5, "raw/more@1": 0.5})
    with pytest.raises(ArtifactConflictError):
        bench.pretrain()
    alone = bench.pretrain(version="2")
    assert "data_weights" not in alone.record.config
    assert alone.files.read("backbone.safetensors") != mixed.files.read("backbone.safetensors")


def test_images_that_cannot_be_decoded_are_listed_with_their_reasons(bench: Bench) -> None:
    tar = bytearray(shard(1, broken=2))
    rows = manifest_rows(SHARD, bytes(tar)).to_pylist()
    cut = next(row for row in rows if row["width"])
    tar[cut["offset"] + cut["length"] // 2] ^= 0xFF  # after its manifest was made: the bytes are no longer those of the id
    draft = bench.context().artifacts.begin(ArtifactRef("raw", "bad", "1"), config={}, inputs={}, notify=print)
    assert isinstance(draft, Draft)
    draft.put(SHARD, bytes(tar))
    draft.put(MANIFEST, manifest_to_bytes(pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA)))
    draft.commit(counts={})
    model = bench.pretrain(data="raw/bad@1")
    found = quarantine_from_bytes(model.files.read(QUARANTINE))
    assert [(one.id, one.source, one.reason) for one in found] == [(cut["id"], cut["source"], "checksum_mismatch")]
    assert model.record.counts["images_turned_away"] == 1
    assert "1 images could not be used, see quarantine.parquet: 1 checksum_mismatch" in bench.said.getvalue()

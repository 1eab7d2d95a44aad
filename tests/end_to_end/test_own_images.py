"""`heliostat pretrain data=./photos`: a folder of one's own images, two of them broken, becomes a model without a recipe."""

import json
from pathlib import Path

import pytest
from demo_run import run

from heliostat.artifacts import ArtifactRef, ArtifactStore, verify
from heliostat.data.photographs import write_crops
from heliostat.models.stored import read_backbone
from heliostat.storage import LocalStore

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1500)]

SHORT = (
    "student.embed_dim=48",
    "student.depth=2",
    "student.num_heads=3",
    "method.dino.head_n_prototypes=64",
    "train.steps=6",
    "train.global_batch_size=8",
    "train.log_every_steps=2",
    "optim.warmup_steps=2",
    "optim.freeze_last_layer_steps=1",
    "method.teacher.warmup_teacher_temp_steps=2",
    "scaling.num_workers=0",
)


def test_a_folder_with_broken_files_becomes_a_model_and_the_broken_ones_are_counted(tmp_path: Path) -> None:
    photos = tmp_path / "my photos"
    files = sorted(write_crops(photos, "left", count=3, seed=0))
    for extra in files[40:]:
        (photos / extra).unlink()
    whole = (photos / files[0]).read_bytes()
    (photos / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (photos / "page.jpg").write_text("<html><body>404 Not Found</body></html>")
    (photos / "notes.txt").write_text("no image and no image's name")

    done = run(["pretrain", "data=./my photos", *SHORT], "./store", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr

    chosen = [line for line in done.stdout.splitlines() if line.startswith("chosen: ")]
    assert any("vit_" in line and "median shorter side" in line for line in chosen), chosen
    assert any("epochs of 42 images" in line for line in chosen), chosen
    artifacts = ArtifactStore(LocalStore(tmp_path / "store"))
    assert [ref.kind for ref in artifacts.list()] == ["copies", "curated", "features", "model", "raw"]
    assert {(ref.name, ref.version) for ref in artifacts.list()} == {("my-photos", "1")}
    assert all(verify(artifacts.load(ref)) for ref in artifacts.list())

    curated = artifacts.load(ArtifactRef("curated", "my-photos", "1"))
    first = curated.read_json("funnel.json")[0]
    assert (first["stage"], first["rows_in"]) == ("decode", 42)
    assert sorted(first["dropped_by_reason"].items()) == [("truncated", 1), ("unknown_format", 1)]
    assert "1  truncated" in done.stdout
    assert "1  unknown_format" in done.stdout

    backbone, info = read_backbone(artifacts.load(ArtifactRef("model", "my-photos", "1")))
    assert (backbone.embed_dim, info.steps, info.images_seen) == (48, 6, 48)
    for source, reason in (("half.jpg", "truncated"), ("page.jpg", "unknown_format")):
        told = run(["why", "curated/my-photos@1", source], "./store", tmp_path)
        assert told.returncode == 0, told.stderr
        assert reason in told.stdout
    assert json.loads(artifacts.load(ArtifactRef("model", "my-photos", "1")).files.read("model.json"))["steps"] == 6

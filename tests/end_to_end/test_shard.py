"""`heliostat shard`: a raw artifact without a recipe, from a disk and inside S3, the same after a kill, and trained on."""

import io
import os
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import pytest
from demo_run import command, environment

from heliostat.artifacts import Artifact, ArtifactRef, ArtifactStore, verify
from heliostat.data.manifest import manifest_from_bytes
from heliostat.data.photographs import write_crops
from heliostat.data.quarantine import quarantine_from_bytes
from heliostat.data.shard_image import image_id
from heliostat.data.shard_reader import ShardReader
from heliostat.storage import open_store

SHORT = (
    "student.embed_dim=48",
    "student.depth=2",
    "student.num_heads=3",
    "method.dino.head_n_prototypes=64",
    "train.steps=2",
    "train.global_batch_size=8",
    "optim.warmup_steps=1",
    "optim.freeze_last_layer_steps=0",
    "method.teacher.warmup_teacher_temp_steps=1",
    "scaling.num_workers=0",
)
pytestmark = [pytest.mark.ray, pytest.mark.timeout(1500)]


def start(words: list[str], store: str, folder: Path) -> subprocess.Popen[str]:
    aws = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    return subprocess.Popen(
        command(words, store),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        env={**environment(folder), **aws},
    )


def finish(words: list[str], store: str, folder: Path) -> str:
    """Run to the end; returns what was printed."""
    process = start(words, store, folder)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    return output


def load(store: str, name: str) -> Artifact:
    return ArtifactStore(open_store(store)).load(ArtifactRef("raw", name, "1"))


def check(artifact: Artifact, num_images: int) -> list[dict[str, object]]:
    """The artifact is whole and every row of its manifest points at the bytes of its id."""
    assert verify(artifact) > 0
    rows, read = manifest_from_bytes(artifact.files.read("manifest.parquet")).to_pylist(), ShardReader(artifact.files)
    assert len(rows) == num_images
    assert all(image_id(read(row["shard"], row["offset"], row["length"])) == row["id"] for row in rows)
    return rows


def make_photos(folder: Path, count: int) -> list[str]:
    """`count` images, a page that says it is one, and notes."""
    files = sorted(write_crops(folder, "left", count=3, seed=0))
    for extra in files[count:]:
        (folder / extra).unlink()
    (folder / "page.jpg").write_text("<html></html>")
    (folder / "notes.txt").write_text("notes")
    return files[:count]


def make_tars(folder: Path, photos: Path, files: list[str], size: int = 10) -> None:
    folder.mkdir()
    for number in range(0, len(files), size):
        with tarfile.open(folder / f"{number // size:06d}.tar", "w") as tar:
            for place, name in enumerate(files[number : number + size]):
                for extension, body in ((name.rpartition(".")[2], (photos / name).read_bytes()), ("npy", b"x")):
                    info = tarfile.TarInfo(f"{place:03d}.{extension}")
                    info.size = len(body)
                    tar.addfile(info, io.BytesIO(body))


def test_tars_are_indexed_where_they_lie_and_a_model_trains_on_them(tmp_path: Path) -> None:
    files = make_photos(tmp_path / "photos", 40)
    make_tars(tmp_path / "tars", tmp_path / "photos", files)
    output = finish(["shard", "tars/{000000..000003}.tar", "name=photos", "in_place=true"], "./store", tmp_path)
    assert "80 members in = 40 images + 40 quarantined (40 not_an_image)" in output
    artifact = load(str(tmp_path / "store"), "photos")
    rows = check(artifact, 40)
    assert {row["shard"] for row in rows} == {str(tmp_path / f"tars/{number:06d}.tar") for number in range(4)}
    assert not list(artifact.files.list("shards/"))
    finish(["pretrain", "laptop", "data=raw/photos@1", "name=model", *SHORT], "./store", tmp_path)
    model = ArtifactStore(open_store(str(tmp_path / "store"))).load(ArtifactRef("model", "model", "1"))
    assert model.record.inputs == {"data": "raw/photos@1"}


@pytest.mark.s3
def test_a_killed_run_in_a_bucket_ends_with_the_same_bytes(s3_bucket: str, tmp_path: Path) -> None:
    files = make_photos(tmp_path / "photos", 40)
    lake = open_store(f"{s3_bucket}/lake")
    for path in (tmp_path / "photos").rglob("*"):
        if path.is_file():
            lake.put(path.relative_to(tmp_path / "photos").as_posix(), path.read_bytes())
    words = ["shard", f"{s3_bucket}/lake", "name=photos", "images_per_shard=3"]
    output = finish(words, f"{s3_bucket}/whole", tmp_path)
    assert "41 files in = 40 images + 1 quarantined (1 unknown_format)" in output
    assert "1 files passed over: 1 .txt" in output
    whole = load(f"{s3_bucket}/whole", "photos")
    check(whole, 41)
    assert [one.source for one in quarantine_from_bytes(whole.files.read("quarantine.parquet"))] == ["page.jpg"]
    assert whole.record.counts == {"images": 41, "shards": 14, "quarantined": 1}

    process = start(words, f"{s3_bucket}/killed", tmp_path)
    work = open_store(f"{s3_bucket}/killed/raw/photos@1/_work/rows")
    deadline = time.monotonic() + 300
    while len(list(work.list())) < 2:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert open_store(f"{s3_bucket}/killed/raw/photos@1").size("artifact.json") is None
    assert ": resuming" in finish(words, f"{s3_bucket}/killed", tmp_path)
    killed = load(f"{s3_bucket}/killed", "photos")
    assert killed.record.files == whole.record.files
    assert verify(killed) == len(whole.record.files)

    make_tars(tmp_path / "tars", tmp_path / "photos", files)
    for path in sorted((tmp_path / "tars").iterdir()):
        open_store(f"{s3_bucket}/tars").put(path.name, path.read_bytes())
    words = ["shard", f"{s3_bucket}/tars", "name=tables", "format=parquet"]
    assert "80 members in = 40 images + 40 quarantined" in finish(words, f"{s3_bucket}/whole", tmp_path)
    rows = check(load(f"{s3_bucket}/whole", "tables"), 40)
    assert {row["id"] for row in rows} <= {row["id"] for row in check(whole, 41)}

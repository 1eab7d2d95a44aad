"""Ingest, curate and pre-train with everything in a bucket, on a real S3 server; a killed run resumes to the same weights."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from demo_run import SMALL, command, environment

from heliostat.artifacts import ArtifactRef, ArtifactStore, verify
from heliostat.storage import S3Store, Store, open_store

pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.timeout(1500)]

SHORT = (
    *(word for word in SMALL if word.partition(".")[0] in ("ingest", "curate", "pretrain")),
    "ingest.evaluation=''",
    "ingest.labelled=''",
    "ingest.heldout=''",
    "ingest.pictures=''",
    "embed.copy_embedder=thumbnail",
    "embed.detectors={}",
    "pretrain.train.steps=12",
    "pretrain.scaling.num_workers=0",
)
CHAIN = [
    "raw/demo@1",
    "raw/demo-curated@1",
    "features/demo@1",
    "features/demo-curated@1",
    "copies/demo@1",
    "curated/demo@1",
    "model/demo@1",
]


def words(verb: str, folder: Path) -> list[str]:
    return [verb, "laptop", *SHORT, f"tracking.uri=sqlite:///{folder / 'runs.db'}"]


def finish(verb: str, store: str, folder: Path) -> str:
    """Run one verb to its end; returns what it printed."""
    done = subprocess.run(
        command(words(verb, folder), store),
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
        env={**environment(folder), **aws()},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def aws() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_")}


def kill_when(condition: Callable[[], bool], verb: str, store: str, folder: Path) -> None:
    """Start a verb and kill it as soon as the condition holds."""
    log = folder / "killed.txt"
    with log.open("w") as file:
        process = subprocess.Popen(
            command(words(verb, folder), store),
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={**environment(folder), **aws()},
        )
    deadline = time.monotonic() + 200
    try:
        while not condition():
            assert process.poll() is None, f"ended too soon:\n{log.read_text()}"
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()


def copy(source: Store, target: Store, name: str) -> None:
    for entry in source.child(name).list():
        target.put(f"{name}/{entry.key}", source.read(f"{name}/{entry.key}"))


def test_the_chain_in_a_bucket_is_whole_and_a_killed_pretraining_ends_with_the_same_weights(s3_bucket, tmp_path) -> None:
    whole, killed = f"{s3_bucket}/whole", f"{s3_bucket}/killed/deep/prefix"
    for verb in ("ingest", "embed", "dedup", "curate", "pretrain"):
        finish(verb, whole, tmp_path)
    artifacts = ArtifactStore(open_store(whole))
    assert isinstance(artifacts.store, S3Store)
    assert sorted(str(ref) for ref in artifacts.list()) == sorted(CHAIN)
    for ref in artifacts.list():
        assert verify(artifacts.load(ref)) > 0
    assert [entry.key for entry in artifacts.store.list() if "/_work/" in entry.key or entry.key.endswith("draft.json")] == []
    assert (tmp_path / "runs.db").is_file()
    assert not (tmp_path / "heliostat-store").exists()

    for name in CHAIN[:-1]:
        copy(artifacts.store, open_store(killed), name)
    model = open_store(killed).child("model/demo@1")
    first = "_work/checkpoints/step-00000004/checkpoint.json"
    kill_when(lambda: model.size(first) is not None, "pretrain", killed, tmp_path)
    assert model.size("artifact.json") is None
    output = finish("pretrain", killed, tmp_path)
    assert "resuming at step " in output
    again, before = (ArtifactStore(open_store(uri)).load(ArtifactRef.parse(CHAIN[-1])).record for uri in (killed, whole))
    assert again.fingerprint == before.fingerprint
    assert again.files == before.files
    assert "model/demo@1: reused, made " in finish("pretrain", killed, tmp_path)

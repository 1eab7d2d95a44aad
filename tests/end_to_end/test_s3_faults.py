"""Ingest into a bucket with a fifth of all requests broken: the same bytes, and no credential in anything that is written."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from demo_run import environment
from faulty_proxy import faulty_proxy
from PIL import Image
from s3_server import S3Server, free_ports

from heliostat.artifacts import ArtifactRef, ArtifactStore, describe, verify
from heliostat.data.packing import Packing, pack_files
from heliostat.data.photographs import crops
from heliostat.data.shards import manifest_from_bytes
from heliostat.data.sources import open_source
from heliostat.storage import open_store

pytestmark = [pytest.mark.s3, pytest.mark.timeout(600)]
IMAGES_PER_SHARD = 4
USER, PASSWORD = "canary-user", "canary-password"
RECIPE = "name: birds\ningest: {{pool: {photos}, images_per_shard: {count}}}\ntracking: {{uri: 'sqlite:///{folder}/runs.db'}}\n"


def lay_down(folder: Path) -> Path:
    """Thirty-four photographs in folders, and a recipe for them; returns the recipe."""
    for number, crop in enumerate(crops("left", count=2, seed=0)):
        file = folder / "photos" / crop.name / f"{number:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(crop.pixels).save(file)
    recipe = folder / "birds.yaml"
    recipe.write_text(RECIPE.format(photos=folder / "photos", count=IMAGES_PER_SHARD, folder=folder))
    return recipe


def ingest(
    recipe: Path, store: str, endpoint: str, temporary: Path, *flags: str, **more: str
) -> subprocess.CompletedProcess[str]:
    """The `heliostat` command with an endpoint that holds a user and a password."""
    folder = recipe.parent
    with_password = endpoint.replace("://", f"://{USER}:{PASSWORD}@")
    return subprocess.run(
        [sys.executable, "-m", "heliostat", "ingest", str(recipe), f"store={store}", *flags],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
        env={**environment(folder), "AWS_ENDPOINT_URL": with_password, "TMPDIR": str(temporary), **more},
    )


@pytest.fixture
def temporary() -> Iterator[Path]:
    """Where Ray keeps its logs; short, for the sake of its sockets."""
    with tempfile.TemporaryDirectory(prefix="h-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def assert_nowhere(canaries: list[str], folders: list[Path], output: str) -> None:
    """No file below the folders (databases and logs of workers too) and no output holds one of the words."""
    paths = [path for folder in folders for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    written = {"the output": output.encode(), **{str(path): path.read_bytes() for path in paths}}
    for word in canaries:
        assert [name for name, data in written.items() if word.encode() in data] == [], "a credential was written"


@pytest.mark.ray
def test_shards_that_were_ingested_behind_faults_are_byte_for_byte_those_without(
    s3_server: S3Server, s3_bucket: str, tmp_path: Path, temporary: Path
) -> None:
    recipe, store = lay_down(tmp_path), f"{s3_bucket}/store"
    with faulty_proxy(s3_server.endpoint, faults=("busy", "reset before", "reset after", "short")) as proxy:
        done = ingest(recipe, store, proxy.endpoint, temporary, "--debug")
        assert done.returncode == 0, done.stdout + done.stderr
        assert proxy.num_faults >= 8, proxy.counts
    artifact = ArtifactStore(open_store(store)).load(ArtifactRef.parse("raw/birds@1"))
    assert verify(artifact) == 11  # nine shards, the manifest and the quarantine
    source, rows = open_source(str(tmp_path / "photos")), []
    for index in range(9):
        key = f"shards/{index:06d}.tar"
        files = source.files[index * IMAGES_PER_SHARD : (index + 1) * IMAGES_PER_SHARD]
        written: dict[str, bytes] = {}
        rows += pack_files(source.store, files, index, Packing(), written.__setitem__).rows.to_pylist()
        assert artifact.files.read(key) == written[key]
        assert artifact.record.files[key] == describe(written[key])
    assert manifest_from_bytes(artifact.files.read("manifest.parquet")).to_pylist() == rows
    assert {entry.key for entry in artifact.files.list()} == {*artifact.record.files, "artifact.json"}
    assert (tmp_path / "runs.db").stat().st_size > 0
    objects = b"".join(artifact.files.read(entry.key) for entry in artifact.files.list())
    canaries = [s3_server.secret_key, USER, PASSWORD, *([s3_server.access_key] if s3_server.checks_signatures else [])]
    assert_nowhere(canaries, [tmp_path, temporary], done.stdout + done.stderr + objects.decode("latin-1"))


@pytest.mark.parametrize("flags", [(), ("--debug",)])
def test_a_failing_stage_says_one_line_and_writes_no_credential(
    s3_server: S3Server,
    s3_bucket: str,
    tmp_path: Path,
    temporary: Path,
    flags: tuple[str, ...],
) -> None:
    recipe = lay_down(tmp_path)
    endpoint, token = f"http://127.0.0.1:{free_ports(1)[0]}", {"AWS_SESSION_TOKEN": "canary-session-token"}
    done = ingest(recipe, f"{s3_bucket}/store", endpoint, temporary, *flags, **token)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert " failed: EndpointConnectionError, tried 3 times in " in last
    assert last.endswith("; is AWS_ENDPOINT_URL right and up?")
    assert ("Traceback" in done.stderr) is bool(flags)
    assert_nowhere(
        [s3_server.secret_key, USER, PASSWORD, "canary-session-token"], [tmp_path, temporary], done.stdout + done.stderr
    )

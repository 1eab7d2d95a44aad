"""Artifacts are complete or absent, refuse to change, resume, and know what they were made from."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import heliostat
from heliostat.artifacts import (
    Artifact,
    ArtifactRef,
    ArtifactStore,
    Draft,
    compute_fingerprint,
    verify,
)
from heliostat.errors import (
    ArtifactConflictError,
    ArtifactError,
    ArtifactNotFoundError,
    StorageError,
    UsageError,
)
from heliostat.lineage import lineage, render_lineage
from heliostat.storage import LocalStore, ObjectInfo, Store, open_store

SOURCE_ROOT = str(Path(heliostat.__file__).parents[1])
REF = ArtifactRef("curated", "photos", "1")
CONFIG = {"optim": {"lr": 0.1}, "seed": 1}


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def artifacts(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    if request.param == "local":
        return ArtifactStore(open_store(str(tmp_path / "store")))
    return ArtifactStore(open_store(f"{request.getfixturevalue('s3_bucket')}/lake"))


class Watched:
    """A store that writes down what is asked of it, and can stop in the middle as a killed process would."""

    def __init__(self, inner: Store, log: list[tuple[str, str]], stop_at: tuple[str, str] | None = None) -> None:
        self._inner, self._log, self._stop_at = inner, log, stop_at

    @property
    def uri(self) -> str:
        return self._inner.uri

    def _step(self, *step: str) -> None:
        if step == self._stop_at:
            raise KeyboardInterrupt
        self._log.append((step[0], step[1]))

    def read(self, key: str) -> bytes:
        return self._inner.read(key)

    def read_range(self, key: str, start: int, num_bytes: int) -> bytes:
        return self._inner.read_range(key, start, num_bytes)

    def size(self, key: str) -> int | None:
        return self._inner.size(key)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        return self._inner.list(prefix)

    def put(self, key: str, data: bytes, *, overwrite: bool = True) -> None:
        self._step("put", key)
        self._inner.put(key, data, overwrite=overwrite)

    def delete(self, key: str) -> None:
        self._step("delete", key)
        self._inner.delete(key)

    def child(self, prefix: str) -> "Watched":
        return Watched(self._inner.child(prefix), self._log, self._stop_at)


def begin(
    artifacts: ArtifactStore,
    ref: ArtifactRef = REF,
    config: Mapping[str, Any] = CONFIG,
    *,
    inputs: Mapping[str, Artifact] | None = None,
    notices: list[str] | None = None,
) -> Artifact | Draft:
    said: list[str] = [] if notices is None else notices
    return artifacts.begin(ref, config=config, inputs=inputs or {}, notify=said.append)


def draft(artifacts: ArtifactStore, ref: ArtifactRef = REF, config: Mapping[str, Any] = CONFIG, **more: Any) -> Draft:
    found = begin(artifacts, ref, config, **more)
    assert isinstance(found, Draft)
    return found


def keys(artifacts: ArtifactStore, ref: ArtifactRef = REF) -> list[str]:
    return [info.key for info in artifacts.files(ref).list()]


def test_the_record_is_written_last_and_only_then_the_artifact_exists(tmp_path: Path) -> None:
    log: list[tuple[str, str]] = []
    artifacts = ArtifactStore(Watched(open_store(str(tmp_path)), log))
    made = draft(artifacts)
    made.put("shard-0.tar", b"images")
    made.put("manifest.parquet", b"table")
    made.files.put("_work/rows/0", b"scratch")
    assert artifacts.find(REF) is None
    assert artifacts.list() == []
    with pytest.raises(ArtifactNotFoundError, match=r"^no artifact curated/photos@1 in the store; run the stage"):
        artifacts.load(REF)
    log.clear()
    made.commit(counts={"images": 6})
    assert log[0] == ("put", "artifact.json")
    assert {step for step, _ in log[1:]} == {"delete"}
    assert artifacts.load(REF).record.counts == {"images": 6}


def test_a_committed_artifact_has_its_files_with_checksums_and_no_scratch(artifacts: ArtifactStore) -> None:
    made = draft(artifacts)
    made.put("manifest.json", b'{"rows": 3}')
    made.files.put("written-by-a-worker.tar", b"images")
    made.files.put("_work/rows/0", b"scratch")
    made.remember(run_id="abc")
    artifact = made.commit(counts={"images": 3}, metrics={"knn": 0.5}, code_version="0.1")
    assert keys(artifacts) == ["artifact.json", "manifest.json", "written-by-a-worker.tar"]
    record = artifacts.load(REF).record
    assert record == artifact.record
    assert {key: file.num_bytes for key, file in record.files.items()} == {"manifest.json": 11, "written-by-a-worker.tar": 6}
    assert record.config == CONFIG
    assert record.fingerprint == compute_fingerprint("curated", CONFIG, {})
    assert artifact.read_json("manifest.json") == {"rows": 3}
    assert artifacts.list() == [REF]
    assert verify(artifact) == 2
    assert artifacts.store.uri.encode() not in artifact.files.read("artifact.json")


def test_the_same_request_reuses_the_artifact_and_removes_what_an_interrupted_commit_left(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    interrupted = ArtifactStore(Watched(store, [], stop_at=("delete", "_work/rows/0")))
    made = draft(interrupted)
    made.put("manifest", b"1")
    made.files.put("_work/rows/0", b"scratch")
    with pytest.raises(KeyboardInterrupt):
        made.commit(counts={"images": 1})
    artifacts = ArtifactStore(store)
    assert keys(artifacts) == ["_work/rows/0", "artifact.json", "draft.json", "manifest"]
    notices: list[str] = []
    found = begin(artifacts, notices=notices)
    assert isinstance(found, Artifact)
    assert notices == []
    assert keys(artifacts) == ["artifact.json", "manifest"]


def test_an_unfinished_draft_is_resumed_when_the_settings_agree(artifacts: ArtifactStore) -> None:
    first = draft(artifacts)
    assert not first.resumed
    first.put("shard-0", b"0")
    first.files.put("_work/rows/0", b"rows")
    first.remember(run_id="abc")
    notices: list[str] = []
    second = draft(artifacts, notices=notices)
    assert notices == ["curated/photos@1: resuming an interrupted run"]
    assert second.resumed
    assert second.state == {"run_id": "abc"}
    assert second.files.read("_work/rows/0") == b"rows"
    assert second.commit(counts={}).record.files.keys() == {"shard-0"}


def test_an_unfinished_draft_with_other_settings_is_discarded_with_a_notice(artifacts: ArtifactStore) -> None:
    first = draft(artifacts)
    first.put("shard-0", b"0")
    first.remember(run_id="abc")
    notices: list[str] = []
    second = draft(artifacts, config={"optim": {"lr": 0.2}, "seed": 1}, notices=notices)
    assert notices == ["curated/photos@1: discarding 2 files of an unfinished run with other settings"]
    assert (second.resumed, second.state) == (False, {})
    assert keys(artifacts) == ["draft.json"]


def test_checkpoints_of_a_run_with_other_settings_are_never_thrown_away(artifacts: ArtifactStore) -> None:
    ref = ArtifactRef("model", "birds", "1")
    draft = artifacts.begin(ref, config={"optim": {"lr": 1e-3}, "seed": 0}, inputs={}, notify=print)
    draft.files.put("_work/checkpoints/step-00000010/checkpoint.json", b"{}")
    with pytest.raises(ArtifactConflictError, match=r"optim\.lr.*0\.001.*0\.002.*give version=") as refused:
        artifacts.begin(ref, config={"optim": {"lr": 2e-3}, "seed": 0}, inputs={}, notify=print)
    assert "\n" not in str(refused.value)
    assert draft.files.size("_work/checkpoints/step-00000010/checkpoint.json") == 2
    again = artifacts.begin(ref, config={"optim": {"lr": 1e-3}, "seed": 0}, inputs={}, notify=print)
    assert again.resumed
    draft.files.delete("draft.json")
    with pytest.raises(ArtifactConflictError, match=r"has checkpoints and no draft\.json that tells of which run; restore it"):
        artifacts.begin(ref, config={"optim": {"lr": 1e-3}, "seed": 0}, inputs={}, notify=print)
    assert draft.files.size("_work/checkpoints/step-00000010/checkpoint.json") == 2


def test_other_settings_under_a_complete_version_are_refused_with_the_changes(artifacts: ArtifactStore) -> None:
    made = draft(artifacts)
    made.put("shard-0", b"0")
    made.commit(counts={})
    with pytest.raises(ArtifactConflictError) as caught:
        begin(artifacts, config={"optim": {"lr": 0.2}, "seed": 1, "epochs": 3})
    assert str(caught.value) == (
        "curated/photos@1 exists with another configuration (epochs: absent -> 3; optim.lr: 0.1 -> 0.2); "
        "give version=... or restore the settings"
    )
    assert keys(artifacts) == ["artifact.json", "shard-0"]


def test_a_conflict_shows_five_changes_and_counts_the_rest(tmp_path: Path) -> None:
    artifacts = ArtifactStore(open_store(str(tmp_path)))
    draft(artifacts, config={f"k{number}": 0 for number in range(8)}).commit(counts={})
    with pytest.raises(ArtifactConflictError, match=r"k4: 0 -> 1; and 3 more\); give version"):
        begin(artifacts, config={f"k{number}": 1 for number in range(8)})


def test_a_changed_input_under_a_complete_version_is_refused(tmp_path: Path) -> None:
    artifacts = ArtifactStore(open_store(str(tmp_path)))
    pools = [draft(artifacts, ArtifactRef("raw", "pool", version), {"v": version}).commit(counts={}) for version in "12"]
    draft(artifacts, inputs={"pool": pools[0]}).commit(counts={})
    with pytest.raises(ArtifactConflictError, match=r"\(inputs\.pool: raw/pool@1 \(\w{8}\) -> raw/pool@2 \(\w{8}\)\)"):
        begin(artifacts, inputs={"pool": pools[1]})


def test_checkpoints_of_a_run_on_other_inputs_are_kept_and_the_inputs_named(tmp_path: Path) -> None:
    artifacts = ArtifactStore(open_store(str(tmp_path)))
    pools = [draft(artifacts, ArtifactRef("raw", "pool", version), {"v": version}).commit(counts={}) for version in "12"]
    draft(artifacts, inputs={"pool": pools[0]}).files.put("_work/checkpoints/step-00000001/checkpoint.json", b"{}")
    with pytest.raises(
        ArtifactConflictError, match=r"other settings \(inputs\.pool: raw/pool@1 .* -> raw/pool@2 .*\); restore"
    ):
        begin(artifacts, inputs={"pool": pools[1]})


def test_the_fingerprint_covers_settings_and_inputs_but_no_names_or_places() -> None:
    base = compute_fingerprint("model", {"a": 1, "b": [1.5]}, {"data": "f1"})
    assert compute_fingerprint("model", {"b": [1.5], "a": 1}, {"data": "f1"}) == base
    assert compute_fingerprint("model", {"a": 2, "b": [1.5]}, {"data": "f1"}) != base
    assert compute_fingerprint("model", {"a": 1, "b": [1.5]}, {"data": "f2"}) != base
    assert compute_fingerprint("report", {"a": 1, "b": [1.5]}, {"data": "f1"}) != base


def test_of_two_writers_that_commit_at_once_one_record_stays(artifacts: ArtifactStore) -> None:
    drafts = [draft(artifacts), draft(artifacts)]
    drafts[0].put("shard-0", b"same content")
    drafts[1].put("shard-0", b"same content")
    barrier, made = threading.Barrier(2), []

    def commit(number: int) -> None:
        barrier.wait()
        made.append(drafts[number].commit(counts={"writer": number}))

    threads = [threading.Thread(target=commit, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stored = artifacts.load(REF)
    assert stored.record in [artifact.record for artifact in made]
    assert [artifact.record.fingerprint for artifact in made] == [stored.record.fingerprint] * 2
    if isinstance(artifacts.store, LocalStore):  # not every bucket tells both writers who won, see storage.S3Store
        assert made[0].record == made[1].record
    assert keys(artifacts) == ["artifact.json", "shard-0"]
    assert verify(stored) == 1


def test_the_later_of_two_writers_with_other_settings_is_refused_at_its_commit(artifacts: ArtifactStore) -> None:
    first = draft(artifacts)
    second = draft(artifacts, config={"optim": {"lr": 0.2}, "seed": 1})
    second.put("shard-0", b"second")
    second.commit(counts={})
    with pytest.raises(ArtifactConflictError, match=r"\(optim.lr: 0.2 -> 0.1\)"):
        first.commit(counts={})
    assert verify(artifacts.load(REF)) == 1


def test_files_that_vanish_before_the_commit_are_never_left_out_in_silence(artifacts: ArtifactStore) -> None:
    first = draft(artifacts)
    first.put("shard-0", b"first")
    draft(artifacts, config={"optim": {"lr": 0.2}, "seed": 1})
    with pytest.raises(
        ArtifactError, match=r"^curated/photos@1: 1 written files are gone before the commit, the first is shard-0; "
    ):
        first.commit(counts={})
    assert artifacts.find(REF) is None


def test_a_flipped_byte_is_found(artifacts: ArtifactStore) -> None:
    made = draft(artifacts)
    made.put("shard-0", bytes(1000))
    made.put("shard-1", bytes(1000))
    artifact = made.commit(counts={})
    assert verify(artifact) == 2
    artifact.files.put("shard-1", bytes(500) + b"\x01" + bytes(499))
    with pytest.raises(
        ArtifactError,
        match=r"^curated/photos@1: shard-1 is damaged, it has 1000 bytes, sha256 \w{12}; recorded 1000 bytes, \w{12}; ",
    ):
        verify(artifact)
    artifact.files.delete("shard-1")
    with pytest.raises(ArtifactError, match="curated/photos@1: shard-1 is gone; restore the file"):
        verify(artifact)


def test_lineage_of_three_generations_is_drawn(artifacts: ArtifactStore) -> None:
    pool = draft(artifacts, ArtifactRef("raw", "pool", "3")).commit(counts={"images": 1_200_000})
    data = draft(artifacts, REF, inputs={"pool": pool}).commit(counts={"images": 800_000, "shards": 80})
    teacher = draft(artifacts, ArtifactRef("model", "large", "1"), inputs={"data": data}).commit(counts={"steps": 500})
    student = draft(artifacts, ArtifactRef("model", "small", "1"), inputs={"teacher": teacher, "data": data}).commit(counts={})
    tree = lineage(artifacts, student.ref)
    assert render_lineage(tree) == [
        "model/small@1",
        "├─ data: curated/photos@1  [800,000 images, 80 shards]",
        "│  └─ pool: raw/pool@3  [1,200,000 images]",
        "└─ teacher: model/large@1  [500 steps]",
        "   └─ data: curated/photos@1  (see above)",
    ]
    assert tree.nodes[teacher.ref].record == teacher.record
    assert student.record.inputs == {"teacher": "model/large@1", "data": "curated/photos@1"}
    assert student.record.input_fingerprints["teacher"] == teacher.record.fingerprint


def test_lineage_says_what_is_not_in_this_store(tmp_path: Path) -> None:
    artifacts = ArtifactStore(open_store(str(tmp_path)))
    pool = draft(artifacts, ArtifactRef("raw", "pool", "3")).commit(counts={})
    draft(artifacts, REF, inputs={"pool": pool}).commit(counts={"images": 2})
    pool.files.delete("artifact.json")
    assert render_lineage(lineage(artifacts, REF)) == [
        "curated/photos@1  [2 images]",
        "└─ pool: raw/pool@3  (not in this store)",
    ]
    with pytest.raises(ArtifactNotFoundError, match=r"^no artifact raw/pool@3 in "):
        lineage(artifacts, pool.ref)


def test_artifacts_are_listed_sorted_and_foreign_files_are_not_artifacts(artifacts: ArtifactStore) -> None:
    refs = [
        ArtifactRef("raw", "b", "1"),
        ArtifactRef("raw", "a", "2"),
        ArtifactRef("model", "z", "1"),
        ArtifactRef("raw", "a", "1"),
    ]
    for ref in refs:
        draft(artifacts, ref).commit(counts={})
    for key in (
        "other/thing@1/artifact.json",
        "raw/unversioned/artifact.json",
        "raw/a@1/nested/artifact.json",
        "artifact.json",
    ):
        artifacts.store.put(key, b"{}")
    assert artifacts.list() == sorted(refs)


@pytest.mark.parametrize(
    "text",
    ["model/a", "model/a@", "a@1", "models/a@1", "model/a b@1", "model/../x@1", "model/a@1\n", "model/a@1/x", "model/@1"],
)
def test_what_is_not_an_artifact_name_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"is not an artifact; write kind/name@version with kind one of raw, features, copies"):
        ArtifactRef.parse(text)


def test_an_artifact_name_parses_to_what_it_prints() -> None:
    for text in ("model/vit-l_14.v2@2026-11-22", "raw/a@1", "sweep/S.w@v1.0-rc_1"):
        assert str(ArtifactRef.parse(text)) == text


def test_a_damaged_record_is_one_line(artifacts: ArtifactStore) -> None:
    artifacts.files(REF).put("artifact.json", b'{"kind": "curated"')
    with pytest.raises(ArtifactError, match=r"artifact.json is damaged \(.*\); restore the file, or") as caught:
        artifacts.load(REF)
    assert "\n" not in str(caught.value)


def test_the_record_of_another_artifact_is_refused(artifacts: ArtifactStore) -> None:
    made = draft(artifacts)
    made.put("shard-0", bytes(10))
    data = made.commit(counts={}).files.read("artifact.json")
    other = ArtifactRef("curated", "others", "1")
    artifacts.files(other).put("artifact.json", data)
    with pytest.raises(ArtifactError, match=r"curated/others@1/artifact.json is the record of curated/photos@1; restore"):
        artifacts.load(other)


def test_what_killed_writes_left_is_removed_by_the_next_run_and_at_the_commit(tmp_path: Path) -> None:
    artifacts = ArtifactStore(LocalStore(tmp_path))
    folder = tmp_path / str(REF) / "shards"
    folder.mkdir(parents=True)
    left = folder / ".0123456789abcdef.heliostat-partial"
    left.write_bytes(b"half an image")
    made = draft(artifacts)
    assert not left.exists()
    left.write_bytes(b"half an image")
    made.commit(counts={})
    assert not left.exists()


@pytest.mark.parametrize(
    "content", [b"", b'{"fing', b"{}", b"[]", b"null", b"7", b'{"fingerprint": "", "config": 3, "state": {}}', b"\xff"]
)
def test_a_damaged_draft_is_one_line_with_the_way_out(artifacts: ArtifactStore, content: bytes) -> None:
    artifacts.files(REF).put("draft.json", content)
    artifacts.files(REF).put("_work/checkpoints/step-00000001/checkpoint.json", b"{}")
    with pytest.raises(StorageError, match=r"draft.json is damaged \(.* remove the folder to start curated/photos@1 again$"):
        begin(artifacts)
    assert "_work/checkpoints/step-00000001/checkpoint.json" in {entry.key for entry in artifacts.files(REF).list()}


def test_a_metric_that_is_not_a_number_survives_the_record(artifacts: ArtifactStore) -> None:
    draft(artifacts).commit(counts={}, metrics={"loss": math.nan, "best": math.inf, "knn": 0.25})
    metrics = artifacts.load(REF).record.metrics
    assert math.isnan(metrics["loss"])
    assert metrics["best"] == math.inf
    assert metrics["knn"] == 0.25
    strict = json.loads(artifacts.files(REF).read("artifact.json"), parse_constant=pytest.fail)  # other languages read it too
    assert strict["metrics"]["loss"] == "NaN"


def test_a_run_killed_in_the_middle_of_a_draft_goes_on_where_it_was(tmp_path: Path) -> None:
    program = (
        "import sys, time\n"
        "from heliostat.artifacts import ArtifactRef, ArtifactStore\n"
        "from heliostat.storage import open_store\n"
        "artifacts = ArtifactStore(open_store(sys.argv[1]))\n"
        f"draft = artifacts.begin(ArtifactRef('curated', 'photos', '1'), config={CONFIG!r}, inputs={{}}, notify=print)\n"
        "draft.remember(run_id='abc')\n"
        "draft.put('shard-0', b'first')\n"
        "draft.files.put('_work/rows/0', b'rows')\n"
        "print('here', flush=True)\n"
        "time.sleep(60)\n"
    )
    environment = os.environ | {"PYTHONPATH": SOURCE_ROOT}
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stdout
        assert child.stdout.readline() == "here\n"
        child.send_signal(signal.SIGKILL)
    artifacts = ArtifactStore(open_store(str(tmp_path)))
    assert artifacts.find(REF) is None
    resumed = draft(artifacts)
    assert (resumed.resumed, resumed.state) == (True, {"run_id": "abc"})
    resumed.put("shard-1", b"second")
    artifact = resumed.commit(counts={"shards": 2})
    assert keys(artifacts) == ["artifact.json", "shard-0", "shard-1"]
    assert verify(artifact) == 2

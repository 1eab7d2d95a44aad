"""`heliostat forget`: nothing of an image is left in any object of the store, whatever happens on the way."""

import io
import json

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from heliostat.artifacts import ArtifactRef, ArtifactStore, verify
from heliostat.cli import main
from heliostat.config import canonical_json
from heliostat.curation.forget import forget, parse_target, read_forget_list
from heliostat.curation.forget_files import zero_in_tar
from heliostat.curation.forget_list import Target, digest_of, hosts_of
from heliostat.curation.ledger import Decisions, same_reason
from heliostat.curation.ledger_facts import LedgerFacts, hex_to_ids
from heliostat.curation.ledger_read import open_ledger
from heliostat.curation.ledger_write import TableRows, ledger_bytes, write_ledger
from heliostat.curation.story import explain
from heliostat.data.manifest import join_manifests, manifest_from_bytes, manifest_to_bytes
from heliostat.data.parquet_shards import SHARD_SCHEMA, lay_parquet
from heliostat.data.quarantine import Rejection, quarantine_from_bytes, quarantine_to_bytes
from heliostat.data.shard_image import image_id, make_shard_image
from heliostat.data.shards import index_shard, manifest_rows, write_shard
from heliostat.errors import DataError, StorageError, UsageError
from heliostat.storage import LocalStore

URLS = [f"https://img{number % 3}.host.example/pictures/{number}.png?size=big&x=<b>" for number in range(10)]
URLS += [f"https://other.example/{number}.png" for number in range(4)]


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 24, 3)).astype(np.uint8)
    return cv2.imencode(".png", pixels)[1].tobytes()


DATA = [picture(number) for number in range(len(URLS))]
IDS = [image_id(data) for data in DATA]
IMAGES = [make_shard_image(data, "png", url, label=f"of {url}") for data, url in zip(DATA, URLS, strict=True)]


def make_store(root, *, shard_format="tar"):
    """raw -> features -> curated (with ledger, sheet, JSON) -> model."""
    artifacts = ArtifactStore(LocalStore(root))

    def begin(name, **inputs):
        return artifacts.begin(ArtifactRef.parse(name), config={}, inputs=inputs, notify=lambda _: None)

    draft, manifests = begin("raw/pool@1"), []
    for number in range(2):
        images = IMAGES[7 * number : 7 * number + 7]
        key = f"shards/{number:06d}.{shard_format}"
        if shard_format == "tar":
            data = write_shard(images)
            manifests.append(manifest_rows(key, data))
        else:
            data, offsets = lay_parquet(images)
            rows = manifest_rows(key, write_shard(images))
            manifests.append(rows.set_column(2, rows.schema.field("offset"), pa.array(offsets)))
        draft.put(key, data)
    manifest = join_manifests(manifests)
    draft.put("manifest.parquet", manifest_to_bytes(manifest))
    draft.put(
        "quarantine.parquet",
        quarantine_to_bytes([Rejection(URLS[2] + "#", "s", 0, 1, "", "bad", "x"), Rejection("y", "s", 0, 1, "", "bad", "x")]),
    )
    draft.put("truth.json", json.dumps({URLS[0]: URLS[1], "list": [URLS[2], "plain"]}).encode())
    log = pa.table({"url": [*URLS, "https://gone.example/x.jpg"], "status": ["ok"] * 14 + ["not_found"], "id": [*IDS, None]})
    draft.put("fetch_log/000000.parquet", ledger_bytes(log))
    raw = draft.commit(counts={"images": 14, "shards": 2})

    draft = begin("features/pool@1", raw=raw)
    rows = manifest.append_column("copy", pa.array([bytes([number]) * 8 for number in range(14)], pa.binary(8)))
    rows = rows.append_column(pa.field("reason", pa.string(), nullable=False), pa.array([""] * 14))
    for block in range(2):
        draft.put(f"rows/{block:06d}.parquet", ledger_bytes(rows.slice(7 * block, 7)))
    features = draft.commit(counts={"images": 14})

    draft = begin("curated/pool@1", raw=raw, features=features)
    blurred = make_shard_image(picture(1000), "png", URLS[0], label=None)
    tar = write_shard([blurred, *IMAGES[1:7]])
    draft.put("shards/000000.tar", tar)
    draft.put("manifest.parquet", manifest_to_bytes(manifest_rows("shards/000000.tar", tar)))
    decisions = Decisions.of(14)
    decisions.judge(same_reason("copies", decisions.rows, np.arange(14) >= 7, "copy"))
    ids = hex_to_ids(rows["id"])
    write_ledger(
        draft.files, TableRows((rows,)), LedgerFacts(ids, nearest=np.arange(14)[::-1].copy()), decisions, rows_per_file=5
    )
    for number in (0, 9):
        draft.put(f"sheets/margin-{number:03d}.html", f'<img title="{IDS[number]}">'.encode())
    draft.put("report.json", json.dumps({"wrong": [URLS[0], URLS[9]], "hosts": {"img0.host.example": 4}}).encode())
    curated = draft.commit(counts={"images": 7})
    begin("model/vit@1", data=curated).commit(counts={})
    begin("raw/unfinished@1")
    return artifacts


def contents(artifacts):
    store = artifacts.store
    return {entry.key: store.read(entry.key) for entry in store.list()}


def everything_in(data: bytes) -> bytes:
    """The bytes of a file and, where it is Parquet, of all its values."""
    if data[:4] != b"PAR1":
        return data
    return data + repr(pq.read_table(io.BytesIO(data)).to_pydict()).encode()


def assert_gone(artifacts, numbers):
    for key, data in contents(artifacts).items():
        text = everything_in(data)
        for number in numbers:
            assert DATA[number] not in data, key
            for name in (URLS[number], repr(URLS[number])[1:-1], json.dumps(URLS[number])[1:-1]):
                assert name.encode() not in text, key
            if not key.startswith("forgotten/"):
                assert f"of {URLS[number]}".encode() not in text, key
    for ref in artifacts.list():
        found = artifacts.load(ref)
        verify(found)
        if ref.kind in ("raw", "curated"):
            for row in manifest_from_bytes(found.files.read("manifest.parquet")).to_pylist():
                data = found.files.read_range(row["shard"], row["offset"], row["length"])
                assert image_id(data) == row["id"]


@pytest.mark.parametrize("shard_format", ["tar", "parquet"])
@pytest.mark.parametrize("how", ["id", "prefix", "url"])
def test_nothing_of_a_forgotten_image_is_left_in_any_object(tmp_path, how, shard_format):
    artifacts = make_store(tmp_path, shard_format=shard_format)
    before = {ref: artifacts.load(ref).record for ref in artifacts.list()}
    report = forget(artifacts, {"id": IDS[0], "prefix": IDS[0][:10], "url": URLS[0]}[how])
    assert set(report.ids) == {IDS[0], image_id(picture(1000))}
    assert report.downstream == ("model/vit@1",)
    assert report.unfinished == ("raw/unfinished@1",)
    assert_gone(artifacts, [0])
    assert picture(1000) not in b"".join(contents(artifacts).values())
    raw = artifacts.load(ArtifactRef.parse("raw/pool@1"))
    assert manifest_from_bytes(raw.files.read("manifest.parquet"))["id"].to_pylist() == IDS[1:]
    assert raw.record.counts == {"images": 13, "shards": 2}
    curated = artifacts.load(ArtifactRef.parse("curated/pool@1"))
    assert curated.record.counts == {"images": 6}
    assert b"somebody asked to forget" in curated.files.read("sheets/margin-000.html")
    assert curated.files.size("sheets/margin-009.html") is not None
    for ref in ("raw/pool@1", "features/pool@1", "curated/pool@1"):
        record = artifacts.load(ArtifactRef.parse(ref)).record
        assert record.revisions == [report.target.digest]
        assert record.fingerprint == before[record.ref].fingerprint
    ledger = open_ledger(curated.files)
    assert [step.rows_kept for step in ledger.funnel()] == [7]
    assert explain(ledger, IDS[0]) == [
        f"Image {IDS[0][:12]} was forgotten: somebody asked for it, and nothing but its id is left."
    ]
    with pytest.raises(DataError, match="no image with id or source"):
        ledger.find(URLS[0])
    assert ledger.find(URLS[1])["id"].to_pylist() == [IDS[1]]


@pytest.mark.parametrize("shard_format", ["tar", "parquet"])
def test_the_features_of_all_others_stay_and_lead_to_their_bytes(tmp_path, shard_format):
    artifacts = make_store(tmp_path, shard_format=shard_format)
    features, raw = (artifacts.load(ArtifactRef.parse(name)) for name in ("features/pool@1", "raw/pool@1"))
    before = pa.concat_tables(pq.read_table(io.BytesIO(features.files.read(f"rows/{n:06d}.parquet"))) for n in range(2))
    forget(artifacts, IDS[3])
    after = pa.concat_tables(pq.read_table(io.BytesIO(features.files.read(f"rows/{n:06d}.parquet"))) for n in range(2))
    assert after.num_rows == 14
    blank = after.to_pylist()[3]
    assert (blank["id"], blank["source"], blank["label"], blank["copy"], blank["reason"]) == (
        IDS[3],
        "",
        None,
        None,
        "forgotten",
    )
    for number, (old, new) in enumerate(zip(before.to_pylist(), after.to_pylist(), strict=True)):
        if number != 3:
            assert raw.files.read_range(new["shard"], new["offset"], new["length"]) == DATA[number]
            places = {"shard", "offset"}
            assert {k: v for k, v in old.items() if k not in places} == {k: v for k, v in new.items() if k not in places}


def test_a_domain_takes_every_host_below_it_and_no_other(tmp_path):
    artifacts = make_store(tmp_path)
    report = forget(artifacts, "host.example")
    assert {*IDS[:10]} < set(report.ids)
    assert not {*IDS[10:]} & set(report.ids)
    assert_gone(artifacts, range(10))
    assert b"host.example" not in b"".join(everything_in(data) for data in contents(artifacts).values())
    raw = artifacts.load(ArtifactRef.parse("raw/pool@1"))
    assert manifest_from_bytes(raw.files.read("manifest.parquet"))["id"].to_pylist() == IDS[10:]
    assert [one.source for one in quarantine_from_bytes(raw.files.read("quarantine.parquet"))] == ["y"]


def test_forgetting_twice_changes_nothing_more_and_a_dry_run_nothing_at_all(tmp_path):
    artifacts = make_store(tmp_path)
    before = contents(artifacts)
    planned = forget(artifacts, IDS[5], is_dry_run=True)
    assert contents(artifacts) == before
    done = forget(artifacts, IDS[5])
    assert done.changes == planned.changes
    assert "would be forgotten" in planned.lines()[0]
    after = contents(artifacts)
    again = forget(artifacts, IDS[5])
    assert again.changes == {}
    assert contents(artifacts) == after
    assert forget(artifacts, URLS[5]).changes == {}


class Failing(LocalStore):
    """Fails for good at the k-th write or deletion, before or after it took effect."""

    left = 0
    takes_effect = False

    def _spend(self, act):
        Failing.left -= 1
        if Failing.left < 0:
            if Failing.left == -1 and Failing.takes_effect:
                act()
            raise StorageError("the machine is gone")
        act()

    def put(self, key, data, *, overwrite=True):
        self._spend(lambda: LocalStore(self.uri).put(key, data, overwrite=overwrite))

    def delete(self, key):
        self._spend(lambda: LocalStore(self.uri).delete(key))

    def child(self, prefix):
        return Failing(LocalStore(self.uri).child(prefix).uri)


@pytest.mark.parametrize("stride", [13, pytest.param(1, marks=pytest.mark.soak)])
@pytest.mark.parametrize("shard_format", ["tar", "parquet"])
def test_a_run_killed_at_any_write_is_finished_by_the_next(tmp_path, shard_format, stride):
    whole = make_store(tmp_path / "whole", shard_format=shard_format)
    start = contents(whole)
    forget(whole, URLS[2])
    expected, step = contents(whole), 0
    while True:
        root = tmp_path / f"{step}"
        store = LocalStore(root)
        for key, data in start.items():
            store.put(key, data)
        Failing.left, Failing.takes_effect = step // 2, bool(step % 2)
        try:
            forget(ArtifactStore(Failing(root)), URLS[2])
        except StorageError:
            for ref in ("raw/pool@1", "curated/pool@1"):  # a row of a manifest always has its bytes
                files = store.child(ref)
                for row in manifest_from_bytes(files.read("manifest.parquet")).to_pylist():
                    assert image_id(files.read_range(row["shard"], row["offset"], row["length"])) == row["id"]
            forget(ArtifactStore(store), URLS[2])
            assert contents(ArtifactStore(store)) == expected
            step += stride
            continue
        break
    assert step > 2 * 10


def test_later_stages_recognise_what_was_forgotten(tmp_path):
    artifacts = make_store(tmp_path)
    assert read_forget_list(artifacts.store).is_empty
    forget(artifacts, URLS[0])
    forget(artifacts, "other.example")
    known = read_forget_list(artifacts.store)
    sources = pa.array([URLS[0], URLS[1], "https://www.other.example/new.png", "https://another.example/", "plain", None])
    assert known.matches(None, sources).tolist() == [True, False, True, False, False, False]
    ids = hex_to_ids(pa.array([IDS[1], IDS[0], IDS[12]]))
    assert known.matches(ids, None).tolist() == [False, True, True]
    assert known.matches(ids, sources.slice(1, 3)).tolist() == [False, True, True]
    assert known.matches(None, pa.array([], pa.string())).tolist() == []
    text = b"".join(artifacts.store.read(entry.key) for entry in artifacts.store.list("forgotten/"))
    assert b"example" not in text
    artifacts.store.put("forgotten/bad.json", b"{")
    with pytest.raises(DataError, match=r"bad.json is not a request to forget"):
        read_forget_list(artifacts.store)


def test_an_image_that_is_not_in_the_store_is_remembered_all_the_same(tmp_path):
    artifacts = ArtifactStore(LocalStore(tmp_path))
    report = forget(artifacts, "https://new.example/x.jpg")
    assert (report.ids, report.changes) == ((), {})
    assert read_forget_list(artifacts.store).matches(None, pa.array(["https://new.example/x.jpg"])).tolist() == [True]
    with pytest.raises(DataError, match="abcdef0123 begins 0 ids"):
        forget(artifacts, "abcdef0123")


def test_shards_left_in_place_are_named_and_not_touched(tmp_path):
    artifacts = ArtifactStore(LocalStore(tmp_path / "store"))
    tar = write_shard(IMAGES[:3])
    (tmp_path / "theirs.tar").write_bytes(tar)
    draft = artifacts.begin(ArtifactRef.parse("raw/a@1"), config={}, inputs={}, notify=lambda _: None)
    draft.put("manifest.parquet", manifest_to_bytes(manifest_rows(str(tmp_path / "theirs.tar"), tar)))
    draft.commit(counts={"images": 3})
    report = forget(artifacts, IDS[1])
    assert report.changes["raw/a@1"].in_place == [str(tmp_path / "theirs.tar")]
    assert any("remove it there" in line and "theirs.tar" in line for line in report.lines())
    assert (tmp_path / "theirs.tar").read_bytes() == tar
    raw = artifacts.load(ArtifactRef.parse("raw/a@1"))
    assert manifest_from_bytes(raw.files.read("manifest.parquet"))["id"].to_pylist() == [IDS[0], IDS[2]]


def test_a_name_that_is_no_url_is_forgotten_where_it_stands_alone(tmp_path):
    artifacts = make_store(tmp_path)
    forget(artifacts, "source:plain")
    raw = artifacts.load(ArtifactRef.parse("raw/pool@1"))
    assert raw.read_json("truth.json")["list"] == [URLS[2], "(forgotten)"]
    assert len(raw.read_json("truth.json")) == 2
    forget(artifacts, "source:y")
    assert [one.source for one in quarantine_from_bytes(raw.files.read("quarantine.parquet"))] == [f"{URLS[2]}#"]
    verify(artifacts.load(raw.ref))


def test_a_tar_with_zeros_still_walks_and_gives_all_other_images():
    tar = write_shard(IMAGES[:4])
    entries = index_shard(tar)
    zeroed = zero_in_tar(tar, [entries[1].offset])
    assert index_shard(zeroed) == [entries[0], *entries[2:]]
    assert len(zeroed) == len(tar)
    assert zero_in_tar(zeroed, [entries[1].offset]) == zeroed
    sidecar = canonical_json({"id": IDS[1]}).encode()[1:-1]
    assert sidecar in tar
    assert sidecar not in zeroed
    with pytest.raises(DataError, match="no image begins at byte 7"):
        zero_in_tar(tar, [7])
    assert SHARD_SCHEMA.names[1] == "bytes"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("abcdef01", Target("id", "abcdef01")),
        ("https://a.example/x", Target("source", "https://a.example/x")),
        ("photo.jpg", Target("source", "photo.jpg")),
        ("Example.ORG.", Target("domain", "example.org")),
        ("source:a.b", Target("source", "a.b")),
        ("domain:photo.jpg", Target("domain", "photo.jpg")),
        ("id:abcdef0123", Target("id", "abcdef0123")),
        ("ABCDEF01", Target("id", "abcdef01")),
        ("id:ABCdef0123", Target("id", "abcdef0123")),
        ("127.0.0.5", Target("domain", "127.0.0.5")),
        ("[2606:4700::1111]", Target("domain", "[2606:4700::1111]")),
        ("domain:localhost", Target("domain", "localhost")),
        ("Müller.de", Target("domain", "müller.de")),
    ],
)
def test_what_a_person_writes_is_understood(text, expected):
    assert parse_target(text) == expected


@pytest.mark.parametrize("text", ["", "abc", "id:xyz", "domain:-", "domain:a b.org", "localhost", "domain:0.0.5", "127.0.5"])
def test_what_nobody_can_mean_is_refused(text):
    with pytest.raises(UsageError):
        parse_target(text)


def test_hosts_are_those_of_the_url_and_not_of_what_pretends_to_be():
    urls = [
        "https://A.example:8080/x",
        "http://user:pw@b.example/",
        "https://c.example./",
        "file.jpg",
        "https://d.example?x=e.example",
        None,
    ]
    assert hosts_of(pa.array(urls)).to_pylist() == ["a.example", "b.example", "c.example", "", "d.example", ""]
    assert digest_of("source", "x") != digest_of("domain", "x")


def test_what_killed_writes_left_is_removed_from_the_artifacts(tmp_path):
    artifacts = make_store(tmp_path)
    left = tmp_path / "raw" / "pool@1" / "shards" / ".0123456789abcdef.heliostat-partial"
    left.write_bytes(DATA[2])
    forget(artifacts, IDS[2], is_dry_run=True)
    assert left.exists()
    forget(artifacts, IDS[2])
    assert not left.exists()


def test_a_name_that_nothing_has_is_told_and_remembered(tmp_path):
    artifacts = make_store(tmp_path)
    lines = forget(artifacts, "https://nobody.example/x.png").lines()
    assert lines[0].startswith("0 images are forgotten")
    assert lines[1].startswith("  nothing in the store has this name")
    assert read_forget_list(artifacts.store).matches(None, pa.array(["https://nobody.example/x.png"])).tolist() == [True]


def test_the_command_knows_a_url_in_another_spelling(tmp_path, capsys):
    artifacts = make_store(tmp_path)
    assert main(["forget", "HTTPS://Other.Example:443/pages/../0.png#top", f"store={tmp_path}"]) == 0
    assert "1 images are forgotten" in capsys.readouterr().out
    assert_gone(artifacts, [10])
    assert not list(artifacts.store.list("_claims/"))

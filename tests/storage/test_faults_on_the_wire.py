"""A real S3 server behind a proxy that breaks a fifth of the requests: nobody above the storage room may notice."""

import hashlib
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from faulty_proxy import FAULTS, FaultyProxy, faulty_proxy
from s3_server import S3Server

from heliostat.data.photographs import crops
from heliostat.data.shards import make_shard_image, manifest_rows, manifest_to_bytes
from heliostat.errors import ObjectExistsError, StorageError
from heliostat.retries import Budget
from heliostat.storage import S3Limits, S3Store, open_store, storage_statistics
from heliostat.storage.boto import BotoBucket

pytestmark = pytest.mark.s3
MEBIBYTE = 2**20
READ_TIMEOUT_SECONDS = 1.0
PATIENT = Budget(attempts=30, seconds=60.0, first_pause_seconds=0.02, longest_pause_seconds=0.5)
LIMITS = replace(S3Limits(), patient=PATIENT, hasty=PATIENT)
# Swift takes pieces of 5 MiB and more, as S3 does.
PIECES = replace(
    LIMITS, read_whole_bytes=MEBIBYTE, read_piece_bytes=MEBIBYTE, put_whole_bytes=4 * MEBIBYTE, put_piece_bytes=5 * MEBIBYTE
)


@pytest.fixture
def proxy(s3_server: S3Server, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    mixture = (*FAULTS, *FAULTS[:4])  # stalls are slow
    with faulty_proxy(s3_server.endpoint, faults=mixture, stall_seconds=1.5 * READ_TIMEOUT_SECONDS) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.endpoint)
        yield running


def store_in(uri: str, limits: S3Limits = LIMITS, prefix: str = "some/prefix") -> S3Store:
    return S3Store(BotoBucket(uri[5:], read_timeout_seconds=READ_TIMEOUT_SECONDS), prefix, limits=limits)


def content(seed: int, num_bytes: int) -> bytes:
    return hashlib.shake_128(str(seed).encode()).digest(num_bytes)


def test_with_a_fifth_of_the_requests_broken_everything_reads_writes_and_lists_the_same(
    proxy: FaultyProxy, s3_bucket: str, s3_server: S3Server
) -> None:
    store, before = store_in(s3_bucket), storage_statistics()
    expected = {f"folder {number % 3}/{number}": content(number, number * 1000) for number in range(25)}
    for number, (key, data) in enumerate(expected.items()):
        store.put(key, data, overwrite=number % 2 == 0)
    assert {info.key: info.num_bytes for info in store.list()} == {key: len(data) for key, data in expected.items()}
    assert {key: store.read(key) for key in expected} == expected
    assert {key: store.read_range(key, 100, 500) for key in expected if len(expected[key]) > 600} == {
        key: data[100:600] for key, data in expected.items() if len(data) > 600
    }
    for key in list(expected)[::2]:
        store.delete(key)
    assert [info.key for info in store.list()] == sorted(list(expected)[1::2])
    client = s3_server.client()  # past the proxy and our code
    for key in list(expected)[1::2]:
        assert client.get_object(Bucket=s3_bucket[5:], Key=f"some/prefix/{key}")["Body"].read() == expected[key]
    assert set(proxy.counts) == {"none", "busy", "reset before", "reset after", "short", "stall"}
    assert proxy.num_faults > 15
    spent = storage_statistics().since(before)
    assert spent.retries >= proxy.num_faults  # more where the machine is so busy that the server itself is silent for a second
    assert spent.requests >= proxy.counts.total()


def test_large_objects_pass_in_pieces_and_no_pieces_stay_behind(
    proxy: FaultyProxy, s3_bucket: str, s3_server: S3Server
) -> None:
    store, client = store_in(s3_bucket, PIECES), s3_server.client()
    for number, num_bytes in enumerate((4 * MEBIBYTE + 1, 10 * MEBIBYTE, 11 * MEBIBYTE + 7)):
        data = content(number, num_bytes)
        store.put(f"large/{number}", data, overwrite=False)
        assert store.read(f"large/{number}") == data
        with pytest.raises(ObjectExistsError, match=rf"large/{number} exists already$"):
            store.put(f"large/{number}", data, overwrite=False)
    store.put("large/0", data)
    assert store.read("large/0") == data
    assert [info.key for info in store.list()] == ["large/0", "large/1", "large/2"]
    assert proxy.num_faults > 5
    unfinished = client.list_multipart_uploads(Bucket=s3_bucket[5:]).get("Uploads", [])
    assert len(unfinished) <= proxy.num_faults  # only a beginning whose answer was lost: nobody knows its id


def test_an_upload_that_cannot_be_finished_leaves_nothing(proxy: FaultyProxy, s3_bucket: str, s3_server: S3Server) -> None:
    proxy.rate, client = 0.0, s3_server.client()

    class WithoutAnEnd(BotoBucket):
        def finish_upload(self, key: str, upload: str, tags: list[str], *, create: bool) -> None:
            raise StorageError("the last step was refused")

    store = S3Store(WithoutAnEnd(s3_bucket[5:]), limits=PIECES)
    with pytest.raises(StorageError, match="the last step was refused"):
        store.put("large", content(0, 9 * MEBIBYTE))
    assert store.size("large") is None
    assert list(store.list()) == []
    assert client.list_multipart_uploads(Bucket=s3_bucket[5:]).get("Uploads", []) == []


def test_a_reader_sees_nothing_or_a_whole_version_never_half(proxy: FaultyProxy, s3_bucket: str) -> None:
    store = store_in(s3_bucket, PIECES)
    versions = [bytes([number]) * (3 * MEBIBYTE + number) for number in range(1, 5)]  # read in pieces, written whole
    allowed, seen, done = {hashlib.sha256(data).digest() for data in versions}, [], threading.Event()

    def poll() -> None:
        while not done.is_set():
            try:
                seen.append(hashlib.sha256(store.read("shard")).digest())
            except StorageError as error:
                seen.append(str(error).rpartition(" (")[0])

    reader = threading.Thread(target=poll)
    reader.start()
    for data in versions:
        store.put("shard", data)
    time.sleep(0.3)
    done.set()
    reader.join()
    missing, replaced = f"no object s3://{s3_bucket[5:]}/some/prefix/shard", "it was replaced each time"
    assert all(one in allowed or one == missing or replaced in one for one in seen), [
        one for one in seen if isinstance(one, str)
    ]
    assert store.read("shard") == versions[-1]


def test_of_two_creators_behind_faults_one_wins_and_the_other_is_told(
    proxy: FaultyProxy, s3_bucket: str, s3_server: S3Server
) -> None:
    store = store_in(s3_bucket)
    store.put("warm", b"1")
    for number in range(8):
        barrier, told = threading.Barrier(2), {}

        def create(data: bytes, number: int = number, barrier: threading.Barrier = barrier, told: dict = told) -> None:
            barrier.wait()
            try:
                store.put(f"record/{number}", data, overwrite=False)
                told[data] = "won"
            except ObjectExistsError:
                told[data] = "lost"

        threads = [threading.Thread(target=create, args=(data,)) for data in (b"one" * 500, b"two" * 500)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stayed = store.read(f"record/{number}")
        assert told[stayed] == "won"
        if s3_server.creates_atomically:
            assert sorted(told.values()) == ["lost", "won"]


def test_a_lone_creator_is_never_told_that_another_was_there(proxy: FaultyProxy, s3_bucket: str) -> None:
    proxy.rate, proxy.faults = 0.5, (*["reset after", "short"] * 3, "stall")
    store = store_in(s3_bucket)
    for number in range(10):
        store.put(f"record/{number}", b"mine", overwrite=False)
    assert proxy.counts["reset after"] + proxy.counts["short"] + proxy.counts["stall"] >= 5


def test_a_store_that_answers_only_with_faults_is_one_line_in_bounded_time(proxy: FaultyProxy, s3_bucket: str) -> None:
    proxy.rate = 1.0
    budget = Budget(attempts=4, seconds=3.0, first_pause_seconds=0.02)
    store = store_in(s3_bucket, replace(LIMITS, patient=budget, hasty=budget))
    for fault, reason, advice in (
        ("busy", "SlowDown", "the store is overloaded or failing; run again later"),
        ("reset before", "ConnectionClosedError", "is AWS_ENDPOINT_URL right and up?"),
        ("stall", "ReadTimeoutError", "is AWS_ENDPOINT_URL right and up?"),
    ):
        proxy.faults, started = (fault,), time.monotonic()
        with pytest.raises(StorageError) as caught:
            store.read("key")
        line = str(caught.value)
        assert line.startswith(f"get {store.uri}/key failed: {reason}, tried ")
        assert line.endswith(f"; {advice}")
        assert "\n" not in line
        assert time.monotonic() - started < budget.seconds + 3 * READ_TIMEOUT_SECONDS


def test_a_shard_and_its_manifest_come_through_byte_for_byte(proxy: FaultyProxy, s3_bucket: str, tmp_path: Path) -> None:
    """Pack from a bucket and from a folder: the same bytes."""
    from heliostat.data.packing import Packing, pack_files
    from heliostat.data.sources import open_source

    local, remote = open_store(str(tmp_path)), store_in(s3_bucket, prefix="")
    images = [make_shard_image(crop.pixels.tobytes(), "png", crop.name) for crop in crops("left", count=1, seed=0)]
    for number, image in enumerate(images):
        for store in (local, remote):
            store.put(f"photos/{number:03d}.png", image.data)
    packed = []
    for uri, store in ((str(tmp_path / "photos"), local), (f"{s3_bucket}/photos", remote)):
        source = open_source(uri)
        written: dict[str, bytes] = {}
        rows = pack_files(store.child("photos"), source.files, 0, Packing(), written.__setitem__).rows
        tar = written["shards/000000.tar"]
        remote.put("shards/000000.tar", tar)
        read_back = remote.read("shards/000000.tar")
        assert read_back == tar
        packed.append((read_back, manifest_to_bytes(manifest_rows("shards/000000.tar", read_back)), manifest_to_bytes(rows)))
    assert packed[0] == packed[1]

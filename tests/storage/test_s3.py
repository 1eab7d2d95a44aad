"""What S3Store does with a bucket that fails underneath, without sockets: the bucket is in memory, the retries are ours."""

import hashlib
import threading
from collections import Counter
from dataclasses import replace

import pytest
from faulty_store import NO_WAIT, SMALL_PIECES, FaultyBucket, MemoryBucket, faulty_store

from heliostat.artifacts import ArtifactRef, ArtifactStore, Draft, verify
from heliostat.errors import ObjectExistsError, ObjectNotFoundError, StorageError, TransientStorageError
from heliostat.retries import Budget
from heliostat.storage import S3Store, storage_statistics
from heliostat.storage.bucket import Answer, Checksum

ENDLESS = replace(SMALL_PIECES, patient=Budget(attempts=10_000, seconds=60.0))


def content(seed: int, num_bytes: int) -> bytes:
    return hashlib.shake_128(str(seed).encode()).digest(num_bytes)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("rate", [0.2, 0.5])
def test_a_store_that_fails_underneath_holds_what_a_dictionary_holds(rate: float, seed: int) -> None:
    store, plain = faulty_store(rate, seed, limits=ENDLESS), {}
    for number in range(40):
        key, data = f"{number % 7}/{number % 11}", content(number, (number * 397) % 9000)
        if key in plain and number % 2:
            with pytest.raises(ObjectExistsError):
                store.put(key, data, overwrite=False)
        else:
            store.put(key, data, overwrite=key in plain)
            plain[key] = data
        if number % 9 == 8:
            store.delete(key)
            del plain[key]
    assert [(info.key, info.num_bytes) for info in store.list()] == [(key, len(plain[key])) for key in sorted(plain)]
    for key, data in plain.items():
        assert store.read(key) == data
        assert store.size(key) == len(data)
        for start, num_bytes in ((0, 0), (0, 1), (len(data) // 2, len(data) - len(data) // 2)):
            if start + num_bytes <= len(data):
                assert store.read_range(key, start, num_bytes) == data[start : start + num_bytes]
    assert store.size("nothing") is None
    with pytest.raises(ObjectNotFoundError):
        store.read("nothing")
    faults = store._bucket.counts  # both moments of every kind of write were met
    assert min(faults[f"{method} {when}"] for method in ("put", "put_piece") for when in ("before", "after")) > 0


def test_what_the_faults_of_one_seed_are_does_not_change() -> None:
    counts = []
    for _ in range(2):
        store = faulty_store(0.3, seed=5)
        for number in range(30):
            store.put(str(number), b"x")
        counts.append(store._bucket.counts)
    assert counts[0] == counts[1]
    assert counts[0].total() > 10


class LosesAnswers(FaultyBucket):
    """The first answer to each method of `lost` is lost after the bucket acted."""

    def __init__(self, inner: MemoryBucket, *lost: str) -> None:
        super().__init__(inner, 0.0)
        self.lost = set(lost)

    def _perhaps(self, method, call):
        result = call()
        if method in self.lost:
            self.lost.remove(method)
            raise TransientStorageError("ConnectionClosedError", "injected")
        return result


@pytest.mark.parametrize(("num_bytes", "lost"), [(10, "put"), (9000, "finish_upload")])
def test_a_creating_write_whose_answer_was_lost_is_known_as_our_own(num_bytes: int, lost: str) -> None:
    store = S3Store(LosesAnswers(MemoryBucket(), lost), limits=SMALL_PIECES, clock=NO_WAIT)
    store.put("record", content(0, num_bytes), overwrite=False)
    assert store.read("record") == content(0, num_bytes)
    with pytest.raises(ObjectExistsError, match=r"^s3://memory/record exists already$"):
        store.put("record", content(0, num_bytes), overwrite=False)


@pytest.mark.parametrize("num_bytes", [10, 9000])
def test_another_s_write_in_the_moment_of_a_lost_answer_is_not_taken_for_ours_even_with_the_same_bytes(num_bytes: int) -> None:
    inner, data = MemoryBucket(), content(0, num_bytes)

    class LosesAndIsReplaced(LosesAnswers):
        def _perhaps(self, method, call):
            if method in self.lost:
                S3Store(inner, limits=SMALL_PIECES).put("record", data, overwrite=False)
                self.lost.remove(method)
                raise TransientStorageError("ConnectionClosedError", "injected")
            return call()

    store = S3Store(LosesAndIsReplaced(inner, "put", "finish_upload"), limits=SMALL_PIECES, clock=NO_WAIT)
    with pytest.raises(ObjectExistsError, match=r"record exists already$"):
        store.put("record", data, overwrite=False)


def test_of_racing_creators_exactly_one_wins_whatever_is_lost() -> None:
    for seed in range(60):
        store, winners = faulty_store(0.4, seed, limits=ENDLESS), []

        def create(number: int, store: S3Store = store, winners: list[int] = winners) -> None:
            try:
                store.put("record", b"the same bytes", overwrite=False)
                winners.append(number)
            except ObjectExistsError:
                return

        threads = [threading.Thread(target=create, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(winners) == 1


def test_deleting_what_a_lost_answer_has_deleted_is_no_error() -> None:
    store = S3Store(LosesAnswers(MemoryBucket(), "delete"), clock=NO_WAIT)
    store.put("key", b"1")
    store.delete("key")
    assert store.size("key") is None


def test_a_spent_budget_is_one_line_that_says_how_often_and_how_long() -> None:
    bucket = MemoryBucket()
    S3Store(bucket, "prefix").put("a/key", b"1")
    store = S3Store(FaultyBucket(bucket, 1.0, faults=("SlowDown",)), "prefix", clock=NO_WAIT)
    calls = {
        "get": lambda: store.read("a/key"),
        "head": lambda: store.size("a/key"),
        "list": lambda: list(store.list("a/key")),
        "put": lambda: store.put("a/key", b"1"),
        "delete": lambda: store.delete("a/key"),
    }
    for what, call in calls.items():
        with pytest.raises(StorageError) as caught:
            call()
        assert str(caught.value) == f"{what} s3://memory/prefix/a/key failed: SlowDown, tried 20 times in 0.0 s; injected"
        assert not isinstance(caught.value, TransientStorageError)


def test_retries_and_bytes_are_counted() -> None:
    before = storage_statistics()
    store = faulty_store(0.5, limits=ENDLESS)
    for number in range(20):
        store.put(str(number), b"x")
    assert storage_statistics().since(before).retries == store._bucket.counts.total() > 5


def test_counts_of_many_threads_add_up() -> None:
    from heliostat.storage.statistics import count

    before = storage_statistics()
    threads = [threading.Thread(target=lambda: [count(requests=1, bytes_read=3) for _ in range(2000)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    spent = storage_statistics().since(before)
    assert (spent.requests, spent.bytes_read, spent.retries, spent.bytes_written) == (16_000, 48_000, 0, 0)


class Changing(MemoryBucket):
    """Every range that is read is followed by a new version, `changes` times."""

    changes = 0

    def get_range(self, key: str, start: int, num_bytes: int, version: str = "") -> bytes:
        data = super().get_range(key, start, num_bytes, version)
        if self.changes:
            self.changes -= 1
            self._store(key, content(self.changes, 9000), "another", create=False)
        return data


def test_an_object_that_is_replaced_while_it_is_read_in_pieces_is_read_anew_and_never_mixed() -> None:
    bucket = Changing()
    store = S3Store(bucket, limits=replace(SMALL_PIECES, read_lanes=1), clock=NO_WAIT)
    store.put("key", content(9, 9000))
    bucket.changes = 2
    assert store.read("key") == content(0, 9000)
    bucket.changes = 100
    with pytest.raises(StorageError) as caught:
        store.read("key")
    assert str(caught.value) == (
        "get s3://memory/key failed: begun 3 times, it was replaced each time; read what nobody writes"
    )


@pytest.mark.parametrize("num_bytes", [4001, 5000, 8000, 8999, 9001])
def test_pieces_are_put_together_at_any_length(num_bytes: int) -> None:
    store = faulty_store(0.3, num_bytes, limits=ENDLESS)
    store.put("key", content(1, num_bytes))
    assert store.read("key") == content(1, num_bytes)


def test_content_that_never_matches_its_checksum_is_an_error_and_once_is_not() -> None:
    class Garbled(MemoryBucket):
        times = 1

        def get_range(self, key: str, start: int, num_bytes: int, version: str = "") -> bytes:
            data = super().get_range(key, start, num_bytes, version)
            if start == 2000 and self.times:
                self.times -= 1
                return b"?" + data[1:]
            return data

    bucket = Garbled()
    store = S3Store(bucket, limits=SMALL_PIECES, clock=NO_WAIT)
    store.put("key", content(3, 5000))
    assert store.read("key") == content(3, 5000)
    bucket.times = 100
    with pytest.raises(StorageError) as caught:
        store.read("key")
    assert str(caught.value).startswith("get s3://memory/key failed: begun 3 times, content does not match its crc32; ")
    assert "AWS_RESPONSE_CHECKSUM_VALIDATION=when_required" in str(caught.value)


def test_a_checksum_tells_one_flipped_bit() -> None:
    data = content(0, 1000)
    for checksum in (Checksum("md5", hashlib.md5(data).hexdigest()), Checksum("crc32", "a6b2ea5d")):
        flipped = bytes([data[0] ^ 1]) + data[1:]
        assert not checksum.agrees_with(flipped)
    assert Checksum("md5", hashlib.md5(data).hexdigest()).agrees_with(memoryview(data))
    assert Checksum("crc32", "cbf43926").agrees_with(b"123456789")  # the check value of the CRC-32 definition


def test_the_first_failure_of_many_pieces_ends_the_others() -> None:
    asked: Counter[str] = Counter()

    class Refusing(MemoryBucket):
        def get_range(self, key: str, start: int, num_bytes: int, version: str = "") -> bytes:
            asked["range"] += 1
            raise StorageError("was refused: AccessDenied")

    store = S3Store(Refusing(), limits=SMALL_PIECES, clock=NO_WAIT)
    store.put("key", b"x" * 500_000)
    with pytest.raises(StorageError, match="AccessDenied"):
        store.read("key")
    assert asked["range"] <= SMALL_PIECES.read_lanes  # of 499


def test_pieces_of_an_upload_that_fails_are_removed_and_nothing_is_visible() -> None:
    class Refusing(MemoryBucket):
        def put_piece(self, key: str, upload: str, number: int, data: bytes) -> str:
            if number == 3:
                raise StorageError("was refused: AccessDenied")
            return super().put_piece(key, upload, number, data)

    bucket = Refusing()
    store = S3Store(FaultyBucket(bucket, 0.3), limits=SMALL_PIECES, clock=NO_WAIT)
    store.put("key", b"old")
    with pytest.raises(StorageError, match="AccessDenied"):
        store.put("key", content(0, 20_000))
    assert store.read("key") == b"old"
    assert bucket.uploads == {}


def test_an_upload_has_at_most_ten_thousand_pieces() -> None:
    bucket = MemoryBucket()
    store = S3Store(bucket, limits=replace(SMALL_PIECES, put_piece_bytes=1), clock=NO_WAIT)
    numbers: list[int] = []
    original = bucket.put_piece
    bucket.put_piece = lambda key, upload, number, data: numbers.append(number) or original(key, upload, number, data)  # type: ignore[method-assign]
    store.put("key", content(0, 25_001))
    assert max(numbers) == -(-25_001 // 3)
    assert store.read("key") == content(0, 25_001)


def test_a_store_that_shortens_uploads_is_found_out() -> None:
    class Shortens(MemoryBucket):
        def put(self, key: str, data: bytes, *, create: bool, writer: str) -> None:
            super().put(key, data[:-1], create=create, writer=writer)

    with pytest.raises(StorageError, match=r"holds 9 bytes after writing 10; the store corrupts uploads$"):
        S3Store(Shortens(), clock=NO_WAIT).put("key", b"0123456789")


def test_a_later_write_of_another_size_is_no_corruption() -> None:
    class Replaced(MemoryBucket):
        def put(self, key: str, data: bytes, *, create: bool, writer: str) -> None:
            super().put(key, data, create=create, writer=writer)
            super().put(key, b"another's", create=False, writer="another")

    store = S3Store(Replaced(), clock=NO_WAIT)
    store.put("key", b"0123456789")
    with pytest.raises(ObjectExistsError):
        store.put("fresh", b"0123456789", overwrite=False)


def test_an_object_ends_where_its_store_says_and_not_before() -> None:
    class Cut(MemoryBucket):
        def get(self, key: str, *, whole: int, beginning: int) -> Answer:
            return replace(super().get(key, whole=whole, beginning=beginning), num_bytes=12_345)

    store = S3Store(Cut(), limits=SMALL_PIECES, clock=NO_WAIT)
    store.put("key", content(0, 5000))
    with pytest.raises(StorageError, match="short read of s3://memory/key"):
        store.read("key")


def test_an_artifact_made_behind_faults_is_the_one_made_without() -> None:
    records = []
    for rate in (0.0, 0.3):
        artifacts = ArtifactStore(faulty_store(rate, limits=ENDLESS))
        ref = ArtifactRef("raw", "photos", "1")
        draft = artifacts.begin(ref, config={"a": 1}, inputs={}, notify=lambda _: None)
        assert isinstance(draft, Draft)
        for number in range(20):
            draft.put(f"shards/{number:06d}.tar", content(number, 3000 + number * 100))
        artifact = draft.commit(counts={"images": 20})
        assert verify(artifact) == 20
        assert [str(found) for found in artifacts.list()] == ["raw/photos@1"]
        records.append(artifact.record.model_copy(update={"created": ""}))
    assert records[0] == records[1]

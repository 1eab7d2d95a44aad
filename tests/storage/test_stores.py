"""One battery for a folder and for a bucket, then what only one of them can do."""

import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlparse

import pytest
from s3_server import S3Server, free_ports

import heliostat
from heliostat.errors import ObjectExistsError, ObjectNotFoundError, StorageError, UsageError
from heliostat.storage import LocalStore, ObjectInfo, S3Store, Store, check_writable, open_store, storage_statistics
from heliostat.storage.boto import BotoBucket

SOURCE_ROOT = str(Path(heliostat.__file__).parents[1])


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return open_store(str(tmp_path / "store"))
    return open_store(f"{request.getfixturevalue('s3_bucket')}/some/prefix")


def race(store: Store, key: str, contents: list[bytes], *, overwrite: bool) -> list[bytes]:
    """Write all contents at the same time; returns those whose writer was told that it succeeded."""
    barrier, winners, others = threading.Barrier(len(contents)), [], []

    def write(data: bytes) -> None:
        barrier.wait()
        try:
            store.put(key, data, overwrite=overwrite)
            winners.append(data)
        except ObjectExistsError:
            others.append(data)

    threads = [threading.Thread(target=write, args=(data,)) for data in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(winners) + len(others) == len(contents)
    return winners


def test_an_object_reads_back_whole_in_ranges_and_by_size(store: Store) -> None:
    store.put("a/b.bin", bytes(range(100)))
    assert store.read("a/b.bin") == bytes(range(100))
    assert store.read_range("a/b.bin", 10, 5) == bytes([10, 11, 12, 13, 14])
    assert store.read_range("a/b.bin", 95, 5) == bytes([95, 96, 97, 98, 99])
    assert store.size("a/b.bin") == 100


@pytest.mark.parametrize(("start", "num_bytes"), [(95, 6), (100, 1), (5000, 10)])
def test_a_range_past_the_end_is_an_error_and_never_a_shorter_answer(store: Store, start: int, num_bytes: int) -> None:
    store.put("a", bytes(100))
    with pytest.raises(StorageError, match=r"^short read of \S+/a: .*; the object is truncated$"):
        store.read_range("a", start, num_bytes)


def test_an_empty_object_is_an_object(store: Store) -> None:
    store.put("empty", b"")
    assert store.size("empty") == 0
    assert store.read("empty") == b""
    assert list(store.list()) == [ObjectInfo("empty", 0)]


def test_eight_megabytes_survive_the_round_trip(store: Store) -> None:
    data = os.urandom(8_000_000)
    store.put("shards/big.bin", data)
    assert store.read("shards/big.bin") == data
    assert store.read_range("shards/big.bin", 7_999_990, 10) == data[-10:]


def test_listing_is_sorted_complete_and_narrowed_by_any_prefix(store: Store) -> None:
    keys = ["a/1", "a/10", "a/2", "a-b", "b/c/d", "b/e", "z"]
    for key in reversed(keys):
        store.put(key, key.encode())
    everything = list(store.list())
    assert everything == [ObjectInfo(key, len(key)) for key in sorted(keys)]
    for prefix in ["", "a", "a/", "a/1", "b/", "b/c", "b/c/", "nothing", "nothing/"]:
        assert list(store.list(prefix)) == [info for info in everything if info.key.startswith(prefix)], prefix


def test_an_empty_store_lists_nothing(store: Store) -> None:
    assert list(store.list()) == []


def test_a_write_replaces_the_object(store: Store) -> None:
    store.put("key", b"old and longer")
    store.put("key", b"new")
    assert store.read("key") == b"new"
    assert list(store.list()) == [ObjectInfo("key", 3)]


def test_a_creating_write_is_refused_when_the_object_exists_and_leaves_it_alone(store: Store) -> None:
    store.put("record", b"first", overwrite=False)
    with pytest.raises(ObjectExistsError, match=r"\S+/record exists already$"):
        store.put("record", b"second", overwrite=False)
    assert store.read("record") == b"first"
    assert list(store.list()) == [ObjectInfo("record", 5)]


def test_of_two_racing_creators_exactly_one_wins(store: Store, request: pytest.FixtureRequest) -> None:
    server = request.getfixturevalue("s3_server") if isinstance(store, S3Store) else None
    check_writable(store)
    for number in range(8 if server else 100):
        winners = race(store, f"records/{number}", [b"one" * 1000, b"two" * 1000], overwrite=False)
        assert store.read(f"records/{number}") in winners
        if server is None or server.creates_atomically:
            assert len(winners) == 1


def test_racing_replacements_leave_one_of_them_whole(store: Store) -> None:
    contents = [bytes([letter]) * 50_000 for letter in b"abcd"]
    assert len(race(store, "key", contents, overwrite=True)) == 4
    assert store.read("key") in contents
    assert len(list(store.list())) == 1


def test_deleting_twice_is_no_error(store: Store) -> None:
    store.put("a/b", b"1")
    store.delete("a/b")
    store.delete("a/b")
    store.delete("a")
    assert store.size("a/b") is None
    assert list(store.list()) == []


def test_a_child_is_the_same_objects_under_a_prefix(store: Store) -> None:
    child = store.child("curated/photos@1")
    child.put("x/y", b"1")
    assert store.read("curated/photos@1/x/y") == b"1"
    assert child.uri == f"{store.uri}/curated/photos@1"
    assert list(child.list()) == [ObjectInfo("x/y", 1)]
    store.put("curated/photos@10/x", b"another artifact")
    assert list(child.list()) == [ObjectInfo("x/y", 1)]


@pytest.mark.parametrize("key", ["", ".", "..", "../a", "a/../../b", "/etc/passwd", "a//b", "./a", "a/", "a\\b", "a\0b"])
def test_a_key_that_leaves_the_store_or_has_two_spellings_is_refused(store: Store, key: str) -> None:
    calls = [store.read, store.size, store.delete, store.child, lambda key: store.put(key, b"1")]
    for call in calls:
        with pytest.raises(UsageError, match="is not allowed; use a relative path"):
            call(key)


@pytest.mark.parametrize("prefix", ["../", "../other", "/etc", "a/../.."])
def test_a_listing_cannot_leave_the_store(store: Store, prefix: str) -> None:
    with pytest.raises(UsageError, match="is not allowed"):
        list(store.list(prefix))


def test_a_store_can_be_pickled_for_a_worker(store: Store) -> None:
    store.put("key", b"value")
    copy = pickle.loads(pickle.dumps(store))
    assert copy.uri == store.uri
    assert copy.read("key") == b"value"


def test_a_missing_object_is_named(store: Store) -> None:
    store.put("folder/key", b"1")
    for key in ("nothing", "folder", "folder/key/below"):
        assert store.size(key) is None
        for call in (store.read, lambda key: store.read_range(key, 0, 1)):
            with pytest.raises(ObjectNotFoundError, match=rf"^no object \S*{key}( \(NoSuchKey\)| in {store.uri})$"):
                call(key)


def test_keys_with_spaces_and_letters_of_any_script_work(store: Store) -> None:
    for key in ("two words/ü ß.txt", "日本/写真.jpg", "a+b=c&d?e#f%20.txt", "curated/name@1.0/part"):
        store.put(key, key.encode())
        assert store.read(key) == key.encode()
        assert [info.key for info in store.list(key[:3])] == [key]


def test_the_write_probe_leaves_nothing_behind(store: Store) -> None:
    check_writable(store)
    assert list(store.list()) == []


# ---------------------------------------------------------------------------------------------------------------- folders only


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("gs://bucket/x", "store scheme gs:// is not known; use a local path or s3://bucket/prefix"),
        ("s3:///prefix", "s3:///prefix names no bucket; write s3://bucket/prefix"),
    ],
)
def test_an_unknown_store_is_refused_with_what_is_known(uri: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_store(uri)
    assert str(caught.value) == message


def test_paths_home_folders_and_file_uris_are_local_stores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert open_store("~/store").uri == f"{tmp_path}/store"
    assert open_store("store").uri == f"{tmp_path}/store"
    assert open_store(f"file://{tmp_path}/store").uri == f"{tmp_path}/store"


def test_a_folder_that_cannot_be_written_is_named_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("a file where the folder should be")
    store = open_store(str(tmp_path / "plain" / "store"))
    with pytest.raises(StorageError) as caught:
        check_writable(store)
    assert str(caught.value) == f"cannot write to {tmp_path}/plain/store/_work: Not a directory; choose another store="


def test_written_files_have_the_permissions_of_any_other_file(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    store = LocalStore(tmp_path)
    store.put("ours", b"1")
    assert store.path("ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("step", ["replace", "link", "fsync"])
def test_a_writer_killed_before_its_last_step_leaves_no_visible_object(tmp_path: Path, step: str) -> None:
    program = (
        "import os, sys, time\n"
        "from heliostat.storage import open_store\n"
        f"os.{step} = lambda *_: (print('here', flush=True), time.sleep(60))\n"
        f"open_store(sys.argv[1]).put('a/key', b'x' * 100_000, overwrite={step != 'link'})\n"
    )
    environment = os.environ | {"PYTHONPATH": SOURCE_ROOT}
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
    ) as child:
        assert child.stdout
        assert child.stdout.readline() == "here\n"
        child.send_signal(signal.SIGKILL)
    store = open_store(str(tmp_path))
    assert len(list((tmp_path / "a").iterdir())) == 1  # the killed writer's temporary file
    assert list(store.list()) == []
    assert store.size("a/key") is None
    store.put("a/key", b"again", overwrite=False)
    assert store.read("a/key") == b"again"


# ----------------------------------------------------------------------------------------------------------------- buckets only


@pytest.mark.s3
def test_a_missing_bucket_is_named_with_the_way_out(s3_bucket: str) -> None:
    store = open_store(f"{s3_bucket}-missing/prefix")
    for call in (lambda: store.read("key"), lambda: store.put("key", b"1"), lambda: list(store.list())):
        with pytest.raises(StorageError) as caught:
            call()
        assert str(caught.value) == f"no bucket {s3_bucket[5:]}-missing; create it or choose another store="


@pytest.mark.s3
def test_a_listing_continues_from_page_to_page(s3_bucket: str) -> None:
    store = open_store(s3_bucket)
    for number in range(5):
        store.put(f"k{number}", b"1")
    before = storage_statistics()
    two_at_a_time = S3Store(BotoBucket(s3_bucket[5:], page_size=2))
    assert [info.key for info in two_at_a_time.list()] == [f"k{number}" for number in range(5)]
    assert storage_statistics().since(before).requests == 3


@pytest.mark.s3
def test_a_wrong_secret_is_one_line_without_the_secret(
    s3_server: S3Server, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not s3_server.checks_signatures:
        pytest.skip(f"{s3_server.description}: only the real server can refuse a wrong secret")
    open_store(s3_bucket).put("key", b"1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-and-secret")
    store = open_store(s3_bucket)
    for call in (store.read, store.size, store.delete):
        with pytest.raises(StorageError) as caught:
            call("key")
        message = str(caught.value)
        assert "was refused: " in message
        assert "check the credentials, the region and the permissions" in message
        assert "wrong-and-secret" not in message
        assert s3_server.secret_key not in message
        assert "\n" not in message


@pytest.mark.s3
def test_missing_credentials_are_one_line_with_the_way_out(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(StorageError) as caught:
        open_store(s3_bucket).read("key")
    expected = f"no AWS credentials for {s3_bucket}/key; set a profile, an instance role or AWS_ACCESS_KEY_ID"
    assert str(caught.value) == expected


@pytest.mark.s3
def test_an_endpoint_where_nobody_listens_is_one_line_within_seconds(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_ports(1)[0]}")
    started = time.monotonic()
    with pytest.raises(StorageError) as caught:
        check_writable(open_store(s3_bucket))
    assert re.search(
        r"failed: EndpointConnectionError, tried 3 times in \d+\.\d s; is AWS_ENDPOINT_URL right and up\?$", str(caught.value)
    )
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < 15


@pytest.mark.s3
def test_an_endpoint_that_is_no_url_is_one_line(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "minio.example")
    with pytest.raises(StorageError, match=r"AWS_ENDPOINT_URL is not a URL; write http://host:port$"):
        open_store(s3_bucket).read("key")


@pytest.mark.s3
def test_a_writer_that_dies_in_the_middle_of_an_upload_leaves_no_visible_object(s3_server: S3Server, s3_bucket: str) -> None:
    if not s3_server.checks_signatures:
        pytest.skip(f"{s3_server.description}: it keeps torn uploads, the real server does not")
    address = urlparse(s3_server.client().generate_presigned_url("put_object", {"Bucket": s3_bucket[5:], "Key": "torn"}))
    assert address.hostname
    with socket.create_connection((address.hostname, address.port or 80)) as connection:
        head = f"PUT {address.path}?{address.query} HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Length: 1000000\r\n\r\n"
        connection.sendall(head.encode() + b"x" * 500_000)
        time.sleep(0.5)  # let the server read what there is
    store = open_store(s3_bucket)
    assert store.size("torn") is None
    assert list(store.list()) == []
    store.put("torn", b"whole", overwrite=False)
    assert store.read("torn") == b"whole"

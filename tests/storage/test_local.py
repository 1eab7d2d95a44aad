"""What a folder does when the operating system fails, and how it lists."""

import errno
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from heliostat.errors import HeliostatError, ObjectExistsError, StorageError
from heliostat.storage import LocalStore, ObjectInfo

OPERATIONS = ("makedirs", "open", "write", "fsync", "close", "replace", "link", "unlink")
PARTIAL = ".heliostat-partial"


class FailingSystem:
    """Counts the calls of `put` into the operating system; the k-th fails instead of being made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: Path, fail_at: int, number: int, *, short_writes: bool) -> None:
        self.calls: list[str] = []
        self.failed = ""
        self.root, self.fail_at, self.number, self.short_writes = root, fail_at, number, short_writes
        for name in OPERATIONS:
            monkeypatch.setattr(os, name, self.wrap(name, getattr(os, name)))

    def wrap(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            self.calls.append(name)
            if len(self.calls) == self.fail_at:
                self.failed = name
                if name == "close":  # Linux frees the descriptor even where close reports a failure
                    original(*arguments)
                raise OSError(self.number, os.strerror(self.number))
            if name == "write" and self.short_writes:
                return original(arguments[0], arguments[1][:30])
            return original(*arguments, **keywords)

        return call


def files_below(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def outcomes(tmp_path: Path, *, number: int, old: bytes | None, overwrite: bool) -> Iterator[tuple[str, str, dict[str, bytes]]]:
    """Let every call fail in turn, until none is left: the call, the message (empty: success), and the files afterwards."""
    new = b"new" * 50
    for fail_at in range(1, 50):
        root = tmp_path / f"{number}-{old is None}-{overwrite}-{fail_at}"
        store = LocalStore(root)
        if old is not None:
            store.put("a/key", old)
        with pytest.MonkeyPatch.context() as patch:
            system = FailingSystem(patch, root, fail_at, number, short_writes=True)
            message = ""
            try:
                store.put("a/key", new, overwrite=overwrite)
            except HeliostatError as error:
                message = str(error)
        yield system.failed, message, files_below(root)
        if not system.failed:
            return
    raise AssertionError("put makes more than 50 calls")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EDQUOT, errno.EROFS, errno.EMFILE])
@pytest.mark.parametrize("old", [None, b"the old object"])
@pytest.mark.parametrize("overwrite", [True, False])
def test_whatever_call_fails_the_object_is_the_old_or_the_new_one_and_nothing_else_lies_there(
    tmp_path: Path, number: int, old: bytes | None, overwrite: bool
) -> None:
    failed = []
    for call, message, files in outcomes(tmp_path, number=number, old=old, overwrite=overwrite):
        failed.append(call)
        before = {} if old is None else {"a/key": old}
        after = {"a/key": b"new" * 50} if overwrite or old is None else before
        left = {key: data for key, data in files.items() if not key.endswith(PARTIAL)}
        if call in (
            "",
            "unlink",
        ):  # unlink comes when the outcome is decided; its failure leaves a hidden file, no wrong answer
            assert left == after
            assert message == "" or message.endswith("a/key exists already")
        else:
            assert files == before, call
            assert os.strerror(number) in message
            assert message.startswith("cannot write ")
            assert "choose another store=" in message
            assert "\n" not in message
    assert {"makedirs", "open", "write", "fsync", "close", "unlink"} <= set(failed)
    assert ("replace" if overwrite else "link") in failed
    assert failed.count("write") == 5  # 150 bytes, 30 at a time


def test_no_descriptor_stays_open_whatever_call_fails(tmp_path: Path) -> None:
    open_before = len(os.listdir("/proc/self/fd"))
    for _ in outcomes(tmp_path, number=errno.EIO, old=b"old", overwrite=True):
        assert len(os.listdir("/proc/self/fd")) == open_before


def test_an_object_that_exists_is_told_apart_from_a_file_that_is_in_the_way(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("a", b"1")
    with pytest.raises(ObjectExistsError):
        store.put("a", b"2", overwrite=False)
    with pytest.raises(StorageError, match="cannot write to") as caught:
        store.put("a/b", b"2")
    assert not isinstance(caught.value, ObjectExistsError)


def slow_listing(root: Path) -> list[ObjectInfo]:
    """Everything, looked up file by file and sorted at the end."""
    found = []
    for path in root.rglob("*"):
        key = path.relative_to(root).as_posix()
        if path.is_file() and not key.endswith(PARTIAL):
            found.append(ObjectInfo(key, path.stat().st_size))
    return sorted(found)


def test_a_listing_equals_the_slow_one_for_any_names_and_prefixes(tmp_path: Path) -> None:
    generator, letters = random.Random(0), ["a", "b", "-", ".", "0", "~", "ü", "日", " "]
    for _ in range(400):
        parts = ["".join(generator.choices(letters, k=generator.randint(1, 3))) for _ in range(generator.randint(1, 4))]
        path = tmp_path / "store" / "/".join(part if part.strip(".") else "dots" for part in parts)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(bytes(generator.randint(0, 9)))
        except OSError:  # a file where a folder should be, or the other way round
            continue
    (tmp_path / "store" / f".0123456789abcdef{PARTIAL}").write_bytes(b"torn")
    store = LocalStore(tmp_path / "store")
    everything = slow_listing(tmp_path / "store")
    assert len(everything) > 200
    assert list(store.list()) == everything
    prefixes = {info.key[: generator.randint(1, len(info.key))] for info in everything}
    for prefix in sorted(prefix for prefix in prefixes if not prefix.endswith((".", "/."))):
        assert list(store.list(prefix)) == [info for info in everything if info.key.startswith(prefix)], prefix


def test_links_to_files_are_listed_and_links_to_folders_are_not_followed(tmp_path: Path) -> None:
    root = tmp_path / "store"
    (root / "folder").mkdir(parents=True)
    (root / "folder" / "file").write_bytes(b"12345")
    (root / "folder" / "loop").symlink_to(root)
    (root / "folder" / "self").symlink_to("self")
    (root / "folder" / "nowhere").symlink_to("nothing")
    (root / "link").symlink_to(root / "folder" / "file")
    os.mkfifo(root / "pipe")
    assert list(LocalStore(root).list()) == [ObjectInfo("folder/file", 5), ObjectInfo("link", 5)]


def test_a_folder_that_cannot_be_read_is_an_error_and_not_a_shorter_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(tmp_path)
    store.put("a/1", b"1")
    store.put("closed/1", b"1")
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if path.endswith("closed"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(StorageError) as caught:
        list(store.list())
    assert str(caught.value) == f"cannot list {tmp_path}/closed: Permission denied"


def test_what_vanishes_during_a_listing_is_left_out(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    for key in ("a", "b/1", "b/2", "c"):
        store.put(key, b"1")
    keys = []
    for info in store.list():
        keys.append(info.key)
        if info.key == "a":
            store.delete("b/1")
            store.delete("c")
    assert keys == ["a", "b/2"]

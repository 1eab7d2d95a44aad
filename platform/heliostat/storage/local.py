"""A folder as a store. Nothing is tried again here: what a file system reports is an answer."""

import errno
import operator
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from heliostat.errors import ObjectExistsError, ObjectNotFoundError, StorageError
from heliostat.storage.store import ObjectInfo, check_key, check_length, check_prefix

_TEMPORARY_SUFFIX = ".heliostat-partial"


class LocalStore:
    """A folder. Writes go to a temporary file beside the target, are flushed, then renamed or linked into place."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._root = Path(root).absolute()

    @property
    def uri(self) -> str:
        return str(self._root)

    def path(self, key: str) -> Path:
        """The file that holds `key`."""
        return self._root / check_key(key)

    def read(self, key: str) -> bytes:
        try:
            return self.path(key).read_bytes()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise ObjectNotFoundError(f"no object {key} in {self.uri}") from error
        except OSError as error:
            raise StorageError(f"cannot read {self.path(key)}: {error.strerror}") from error

    def read_range(self, key: str, start: int, num_bytes: int) -> bytes:
        try:
            with self.path(key).open("rb") as file:
                file.seek(start)
                data = file.read(num_bytes)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise ObjectNotFoundError(f"no object {key} in {self.uri}") from error
        except OSError as error:
            raise StorageError(f"cannot read {self.path(key)}: {error.strerror}") from error
        return check_length(data, num_bytes, f"{self.uri}/{key}")

    def size(self, key: str) -> int | None:
        try:
            found = self.path(key).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise StorageError(f"cannot look at {self.path(key)}: {error.strerror}") from error
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Links to files are files; links to folders are not followed, so a loop of links ends nowhere."""
        yield from _walk(self.uri, check_prefix(prefix))

    def put(self, key: str, data: bytes, *, overwrite: bool = True) -> None:
        path = self.path(key)
        temporary = path.parent / f".{secrets.token_hex(8)}{_TEMPORARY_SUFFIX}"
        try:
            os.makedirs(path.parent, exist_ok=True)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise StorageError(f"cannot write to {path.parent}: {error.strerror}; choose another store=") from error
        try:
            _write_and_close(descriptor, data)
            if overwrite:
                os.replace(temporary, path)
            else:
                os.link(temporary, path)
        except FileExistsError as error:
            raise ObjectExistsError(f"{path} exists already") from error
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror}; choose another store= or free some room") from error
        finally:
            with suppress(OSError):  # gone after a rename; one that cannot be removed is hidden, and the outcome is decided
                os.unlink(temporary)

    def delete(self, key: str) -> None:
        _remove(self.path(key))

    def remove_partial_writes(self) -> int:
        """Remove what writes that were killed left behind, hidden from `list`; returns how many. Nobody may be writing."""
        found = 0
        for folder, _, names in os.walk(self.uri):
            for name in names:
                if name.endswith(_TEMPORARY_SUFFIX):
                    found += 1
                    _remove(Path(folder, name))
        return found

    def child(self, prefix: str) -> "LocalStore":
        return LocalStore(self._root / check_key(prefix))


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except (IsADirectoryError, NotADirectoryError):  # a folder is not an object, and a file has nothing below it
        return
    except OSError as error:
        raise StorageError(f"cannot delete {path}: {error.strerror}") from error


def _write_and_close(descriptor: int, data: bytes) -> None:
    """Write all of it through to the disk. Raises OSError; the descriptor is closed in any case."""
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    except BaseException:
        with suppress(OSError):  # the first failure is the one to tell
            os.close(descriptor)
        raise
    os.close(descriptor)


def _walk(root: str, prefix: str) -> Iterator[ObjectInfo]:
    """Files below a folder whose keys start with `prefix`, in the order of the keys; in memory are the folders on one path."""
    folder = prefix.rpartition("/")[0]
    open_folders = [_entries(f"{root}/{folder}" if folder else root, f"{folder}/" if folder else "")]
    while open_folders:
        for key, entry in open_folders[-1]:
            if key[-1] == "/":
                if key.startswith(prefix) or prefix.startswith(key):
                    open_folders.append(_entries(entry.path, key))
                    break
            elif key.startswith(prefix) and not key.endswith(_TEMPORARY_SUFFIX):
                num_bytes = _file_size(entry)
                if num_bytes is not None:
                    yield ObjectInfo(key, num_bytes)
        else:
            open_folders.pop()


def _entries(folder: str, above: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """What a folder holds, sorted. A folder's key ends in "/" and sorts so, as the keys below it do: a-b, a.b, a/1, a0."""
    try:
        with os.scandir(folder) as found:
            entries = [(f"{above}{entry.name}{'/' if entry.is_dir(follow_symlinks=False) else ''}", entry) for entry in found]
    except (FileNotFoundError, NotADirectoryError):  # no such prefix, or removed since its parent was read
        return iter(())
    except OSError as error:
        raise StorageError(f"cannot list {folder}: {error.strerror}") from error
    entries.sort(key=operator.itemgetter(0))
    return iter(entries)


def _file_size(entry: os.DirEntry[str]) -> int | None:
    """Size in bytes, None for what is no file (any more), such as a link that leads nowhere."""
    try:
        return entry.stat().st_size if entry.is_file() else None
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            return None
        raise StorageError(f"cannot list {entry.path}: {error.strerror}") from error

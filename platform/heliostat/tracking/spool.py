"""Records that wait for a server that does not answer: files of lines that survive the process which wrote them.

A process appends to a file of its own and holds a lock on it for as long as it lives. Whoever can take the lock of another file
knows that its writer is gone, and may send what it left. A line is on the disk before `append` returns.
"""

import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

UNREADABLE = "unreadable"
_RESERVE_BYTES = 2**20  # tags and the end of a run still fit when metrics have filled the spool


@dataclass(frozen=True)
class Entry:
    """One thing that a run was told: the call, its arguments as JSON values, and when (milliseconds since 1970)."""

    run_id: str
    call: str
    arguments: dict[str, Any]
    time_ms: int

    @property
    def is_small(self) -> bool:
        """Whether it belongs to the few words that are kept even when the spool is full."""
        return self.call not in ("log_metrics", "log_system", "log_bytes")


class SpoolFile:
    """One file of waiting entries, locked by this process. `offset` is where the next unsent entry begins."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self._descriptor = path, descriptor
        self.offset = 0

    def append(self, entry: Entry, limit_bytes: int) -> bool:
        """Add an entry, synced to the disk. False, and nothing is added, when the file would grow past its limit."""
        line = json.dumps(asdict(entry), separators=(",", ":")).encode() + b"\n"
        limit = limit_bytes + (_RESERVE_BYTES if entry.is_small else 0)
        end = os.lseek(self._descriptor, 0, os.SEEK_END)
        if end + len(line) > limit:
            return False
        try:
            view = memoryview(line)
            while view:
                view = view[os.write(self._descriptor, view) :]
            os.fsync(self._descriptor)
        except OSError:
            os.ftruncate(self._descriptor, end)  # half a line would spoil the next one
            raise
        return True

    def next(self) -> tuple[Entry, int] | None:
        """The first unsent entry and the offset after it, or None at the end. A torn last line (its writer died) is the end."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            line = file.readline()
        if not line.endswith(b"\n"):
            return None
        try:
            entry = Entry(**json.loads(line))
        except (ValueError, TypeError):  # a damaged disk: whoever sends it refuses it by this name, aloud
            entry = Entry("", UNREADABLE, {}, 0)
        return entry, self.offset + len(line)

    def discard(self) -> None:
        """Remove the file: everything in it is sent."""
        self.path.unlink(missing_ok=True)
        self.release()

    def release(self) -> None:
        """Let go of the lock and leave the file to whoever comes next."""
        os.close(self._descriptor)


@dataclass(frozen=True)
class SpoolFolder:
    """The spool files of one server below a folder. `key` tells servers apart and holds no secret."""

    folder: Path
    key: str
    limit_bytes: int

    def create(self) -> SpoolFile:
        """A new file of this process. Raises OSError where it cannot be written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        while True:
            path = self.folder / f"{self.key}-{os.getpid()}-{secrets.token_hex(4)}.jsonl"
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_nlink:  # nobody took it for an abandoned one between the two calls
                break
            os.close(descriptor)
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return SpoolFile(path, descriptor)

    def abandoned(self) -> Iterator[SpoolFile]:
        """Files whose writers are gone, the oldest first, each locked for the caller."""
        for path in sorted(self._paths(), key=_written):
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                continue
            if os.fstat(descriptor).st_nlink == 0:
                os.close(descriptor)
                continue
            yield SpoolFile(path, descriptor)

    def is_empty(self) -> bool:
        """Whether nothing waits, in any process."""
        return not any(True for _ in self._paths())

    def _paths(self) -> Iterator[Path]:
        return self.folder.glob(f"{self.key}-*.jsonl")


def _written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0

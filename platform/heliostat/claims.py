"""One run at a time makes a version: a claim that is renewed while its owner lives.

Two runs that wrote one version side by side would mix their files. A claim is a small object beside the artifacts,

    _claims/<kind>/<name>@<version>.json

written only where there is none, renewed every few seconds and removed at the end. Whoever finds one asks whether its owner is
alive: on the same machine by its process, elsewhere by watching whether the claim is renewed. No two clocks are compared.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from heliostat.errors import ArtifactConflictError, ObjectExistsError, ObjectNotFoundError, StorageError
from heliostat.storage import Store, read_json

CLAIMS = "_claims/"
BEAT_SECONDS = 10.0
PATIENCE_SECONDS = 45.0
"""A claim of another machine that was not renewed for so long is dead: four beats and a half."""
_held: set[str] = set()
"""Tokens of this process: a claim that could not be removed, because the store was lost, keeps nobody out for long."""
_RELEASE_SECONDS = 15.0  # a store that is lost shall not hold up the end of a run for long
_SETTLE_SECONDS = 0.3  # of two that take over one dead claim the earlier finds that the later has removed its own
_SAME_START_SECONDS = 10.0  # two processes of one number cannot begin so soon after each other; clocks may be set meanwhile


@dataclass(frozen=True)
class Owner:
    """Whoever holds a claim. machine: what tells processes apart that have the same number; beat: how often it was renewed."""

    token: str
    host: str
    machine: str
    pid: int
    started: float
    beat: int = 0

    @staticmethod
    def here() -> "Owner":
        """This process, under a new token."""
        return Owner(secrets.token_hex(8), socket.gethostname(), _machine(), os.getpid(), psutil.Process().create_time())

    @staticmethod
    def parse(plain: Any) -> "Owner":
        """From JSON. Raises LookupError, TypeError or ValueError."""
        return Owner(
            str(plain["token"]), str(plain["host"]), str(plain["machine"]), int(plain["pid"]), float(plain["started"]),
            int(plain["beat"]),
        )  # fmt: skip

    def to_bytes(self, beat: int = 0) -> bytes:
        """As JSON."""
        return (json.dumps({**self.__dict__, "beat": beat}) + "\n").encode()

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Claim:
    """A claim that is held. `check` it before what was made under it becomes visible."""

    def __init__(self, store: Store, key: str, doing: str, owner: Owner, beat_seconds: float) -> None:
        self._store, self._key, self._doing, self._owner = store, key, doing, owner
        self._beat_seconds = beat_seconds
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="heliostat-claim", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises ArtifactConflictError when another run has taken over, because this one seemed dead for too long."""
        owner = _read(self._store, self._key)
        if owner is None or owner.token != self._owner.token:
            by = str(owner) if owner else "another run, which has ended"
            raise ArtifactConflictError(
                f"{self._doing} by {by}, because this run seemed dead for a while; nothing of it is kept, run it again"
            )

    def release(self) -> None:
        """Remove it, unless it is another's by now. Raises StorageError."""
        self._end.set()
        self._thread.join(_RELEASE_SECONDS)
        if self._thread.is_alive():
            raise StorageError(f"{self._store.uri} has not answered for {_RELEASE_SECONDS:.0f} s")
        owner = _read(self._store, self._key)
        if owner is not None and owner.token == self._owner.token:
            self._store.delete(self._key)

    def _renew(self) -> None:
        beat = 0
        while not self._end.wait(self._beat_seconds):
            beat += 1
            try:
                self.check()
                self._store.put(self._key, self._owner.to_bytes(beat))
            except ArtifactConflictError:  # the work finds out when it calls `check`
                return
            except StorageError:  # the work meets the same fault and tells of it; a later beat may pass
                continue


@contextlib.contextmanager
def claim(
    store: Store,
    what: str,
    doing: str,
    notify: Callable[[str], None],
    *,
    beat_seconds: float = BEAT_SECONDS,
    patience_seconds: float = PATIENCE_SECONDS,
) -> Iterator[Claim]:
    """Hold the claim on `what`, a key below `_claims/`; `doing` begins messages ("model/x@1 is being made").

    Raises ArtifactConflictError where another run that lives holds it.
    """
    key = f"{CLAIMS}{what}.json"
    owner, is_takeover = Owner.here(), False
    while True:
        try:
            store.put(key, owner.to_bytes(), overwrite=False)
        except ObjectExistsError:
            rival = _read(store, key)
        else:
            if is_takeover:
                time.sleep(_SETTLE_SECONDS)
            rival = _read(store, key)
            if rival is not None and rival.token == owner.token:
                break
        if rival is None:
            continue
        if rival.machine == _machine():
            lives = _runs_here(rival)
        else:
            notify(f"{doing} by {rival}, or was; waiting {patience_seconds:.0f} s for a sign of life")
            lives = _is_renewed(store, key, rival, patience_seconds)
        if lives:
            raise ArtifactConflictError(
                f"{doing} by {rival}, which is alive; wait for its end, or stop it: the same command goes on from there"
            )
        store.delete(key)
        is_takeover = True
    _held.add(owner.token)
    held = Claim(store, key, doing, owner, beat_seconds)
    try:
        yield held
    finally:
        _held.discard(owner.token)
        try:
            held.release()
        except StorageError as error:  # whatever ended the work is the one to tell; a dead process keeps nobody out
            notify(f"the claim on {what} could not be removed: {error}")


def _read(store: Store, key: str) -> Owner | None:
    try:
        return read_json(store, key, Owner.parse, "remove it if no run makes this version")
    except ObjectNotFoundError:
        return None


def _is_renewed(store: Store, key: str, owner: Owner, patience_seconds: float) -> bool:
    """Whether the owner, on another machine, gives a sign of life."""
    end = time.monotonic() + patience_seconds
    while time.monotonic() < end:
        time.sleep(min(1.0, patience_seconds / 10))
        now = _read(store, key)
        if now != owner:
            return now is not None
    return False


def _runs_here(owner: Owner) -> bool:
    if owner.pid == os.getpid():
        return owner.token in _held
    try:
        process = psutil.Process(owner.pid)
        is_same = bool(abs(process.create_time() - owner.started) < _SAME_START_SECONDS)
        return is_same and bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:  # it is there, and another user's
        return True


def _machine() -> str:
    """One boot of one machine, and the room of process numbers in it (containers of one host have their own)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return f"{socket.gethostname()} {psutil.boot_time():.0f}"

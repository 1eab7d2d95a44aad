"""One run at a time makes a version: a claim that is renewed while its owner lives.

Two runs that wrote one version side by side would mix their files. A claim is two small objects beside the artifacts,

    _claims/<kind>/<name>@<version>.json           who holds it: written only where there is none, and never over another
    _claims/<kind>/<name>@<version>-<token>.beat   a sign of life of that owner, every few seconds

both removed at the end. Whoever finds a claim asks whether its owner is alive: on the same machine by its process, elsewhere by
watching its beats. No two clocks are compared. A beat that is written late, after an outage, takes the claim from nobody.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from heliostat.errors import ArtifactConflictError, HeliostatError, ObjectExistsError, ObjectNotFoundError, StorageError
from heliostat.storage import Store, read_json

CLAIMS = "_claims/"
BEAT_SECONDS = 10.0
PATIENCE_SECONDS = 45.0
"""An owner on another machine that gave no sign for so long is dead: four beats and a half."""
_RELEASE_SECONDS = 15.0  # a store that is lost shall not hold up the end of a run for long
_SETTLE_SECONDS = 0.3  # of two that take over one dead claim the earlier finds that the later has removed its own
_held: set[str] = set()
"""Tokens of this process: a claim that could not be removed, because the store was lost, does not keep it out."""


@dataclass(frozen=True)
class Owner:
    """Whoever holds a claim. machine: what tells processes apart that have the same number; started: when the process began."""

    token: str
    host: str
    machine: str
    pid: int
    started: str

    @staticmethod
    def here() -> "Owner":
        """This process, under a new token."""
        return Owner(secrets.token_hex(8), socket.gethostname(), _machine(), os.getpid(), _started(os.getpid()) or "")

    @staticmethod
    def parse(plain: Any) -> "Owner":
        """From JSON. Raises LookupError, TypeError or ValueError."""
        return Owner(str(plain["token"]), str(plain["host"]), str(plain["machine"]), int(plain["pid"]), str(plain["started"]))

    def to_bytes(self) -> bytes:
        """As JSON."""
        return (json.dumps(asdict(self)) + "\n").encode()

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Claim:
    """A claim that is held. `check` it before what was made under it becomes visible."""

    def __init__(self, store: Store, what: str, doing: str, owner: Owner, beat_seconds: float) -> None:
        self._store, self._key, self._doing, self._owner = store, key_of(what), doing, owner
        self._beat_key, self._beat_seconds = beat_key(what, owner), beat_seconds
        self._end = threading.Event()
        self._fault: StorageError | None = None
        self._thread = threading.Thread(target=self._live, name="heliostat-claim", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises ArtifactConflictError when another run has taken over, because this one seemed dead for too long.

        A claim that is simply gone, because somebody tidied up, is made again.
        """
        owner = _read(self._store, self._key)
        if owner is None:
            with contextlib.suppress(ObjectExistsError):  # another's, by now: the next look tells
                self._store.put(self._key, self._owner.to_bytes(), overwrite=False)
            owner = _read(self._store, self._key)
        if owner is None or owner.token != self._owner.token:
            raise ArtifactConflictError(
                f"{self._doing} by {owner or 'another run'}, because this run seemed dead for a while; it ends, and the same "
                "command goes on from what is there when the other has ended"
            )

    def release(self) -> None:
        """Remove it, unless it is another's by now. Raises StorageError."""
        self._end.set()
        self._thread.join(_RELEASE_SECONDS)
        if self._thread.is_alive():
            raise StorageError(f"{self._store.uri} has not answered for {_RELEASE_SECONDS:.0f} s")
        if self._fault is not None:
            raise self._fault

    def _live(self) -> None:
        """Beat until the end, then remove what was written."""
        beat = 0
        while not self._end.wait(self._beat_seconds):
            beat += 1
            with contextlib.suppress(StorageError):  # the work meets the same fault and tells of it; a later beat may pass
                self._store.put(self._beat_key, str(beat).encode())
        try:
            self._store.delete(self._beat_key)
            owner = _read(self._store, self._key)
            if owner is not None and owner.token == self._owner.token:
                self._store.delete(self._key)
        except StorageError as error:
            self._fault = error


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
    owner = Owner.here()
    _held.add(owner.token)
    try:
        _take(store, what, doing, owner, notify, patience_seconds=patience_seconds)
        held = Claim(store, what, doing, owner, beat_seconds)
        try:
            yield held
        finally:
            try:
                held.release()
            except HeliostatError as error:  # whatever ended the work is the one to tell; a dead process keeps nobody out
                notify(f"the claim on {what} could not be removed: {error}")
    finally:
        _held.discard(owner.token)


def key_of(what: str) -> str:
    """Where the claim on something lies."""
    return f"{CLAIMS}{what}.json"


def beat_key(what: str, owner: Owner) -> str:
    """Where an owner's signs of life lie."""
    return f"{CLAIMS}{what}-{owner.token}.beat"


def _take(store: Store, what: str, doing: str, owner: Owner, notify: Callable[[str], None], *, patience_seconds: float) -> None:
    """Write the claim, over a dead one if need be."""
    key, is_takeover = key_of(what), False
    while True:
        try:
            store.put(key, owner.to_bytes(), overwrite=False)
        except ObjectExistsError:
            rival = _read(store, key)
        else:
            if is_takeover:
                time.sleep(_SETTLE_SECONDS)
            rival = _read(store, key)
            if rival == owner:
                return
        if rival is None:
            continue
        life = _life_here(rival)
        if life == "unknown":
            notify(f"{doing} by {rival}, or was; waiting {patience_seconds:.0f} s for a sign of life")
            life = _life_elsewhere(store, what, rival, patience_seconds)
        if life == "alive":
            raise ArtifactConflictError(
                f"{doing} by {rival}, which is alive; wait for its end, or stop it: the same command goes on from there"
            )
        if _read(store, key) == rival:  # and not of a third by now
            store.delete(beat_key(what, rival))
            store.delete(key)
            is_takeover = True


def _read(store: Store, key: str) -> Owner | None:
    try:
        return read_json(store, key, Owner.parse, "remove it if no run makes this version")
    except ObjectNotFoundError:
        return None


def _life_here(owner: Owner) -> Literal["alive", "dead", "unknown"]:
    """What this machine knows of the owner of a claim."""
    if owner.machine != _machine():
        return "unknown"
    if owner.pid == os.getpid():
        return "alive" if owner.token in _held else "dead"
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return "dead"
    except PermissionError:  # another user's process, perhaps one that cannot be looked at
        return "unknown"
    started = _started(owner.pid)
    return "unknown" if started == "" else "alive" if started == owner.started else "dead"


def _life_elsewhere(store: Store, what: str, owner: Owner, patience_seconds: float) -> Literal["alive", "dead"]:
    """Whether the owner gives a sign of life within some time, or ends its claim in good order."""

    def beat() -> bytes:
        try:
            return store.read(beat_key(what, owner))
        except ObjectNotFoundError:
            return b""

    before, end = beat(), time.monotonic() + patience_seconds
    while time.monotonic() < end:
        time.sleep(min(1.0, patience_seconds / 10))
        if _read(store, key_of(what)) != owner:
            return "dead"
        if beat() != before:
            return "alive"
    return "dead"


def _started(pid: int) -> str | None:
    """When a process began, in the units of its machine. None: it has ended; empty: it cannot be looked at.

    Linux tells the ticks since the boot, which no setting of a clock changes.
    """
    with contextlib.suppress(OSError):
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state == "Z" else fields[18]
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.2f}"
    except psutil.NoSuchProcess:
        return None
    except psutil.AccessDenied:
        return ""


def _machine() -> str:
    """One boot of one machine, and the room of process numbers in it (containers of one host have their own)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return f"{socket.gethostname()} {psutil.boot_time():.0f}"

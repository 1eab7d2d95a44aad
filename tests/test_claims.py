"""Claims: one living owner at a time, dead ones keep nobody out, on this machine at once and on another after a wait."""

import contextlib
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from heliostat.claims import claim
from heliostat.errors import ArtifactConflictError, StorageError
from heliostat.storage import LocalStore

KEY = "_claims/model/x@1.json"
HOLD = """
import sys, time
from heliostat.claims import claim
from heliostat.storage import LocalStore
with claim(LocalStore(sys.argv[1]), "model/x@1", "model/x@1 is being made", print):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


def hold(store: LocalStore, said: list[str] | None = None, **settings: float):
    notify = said.append if said is not None else print
    return claim(store, "model/x@1", "model/x@1 is being made", notify, **settings)


def write_foreign(store: LocalStore) -> None:
    """A claim of a process on another machine."""
    owner = {"token": "t", "host": "far", "machine": "far 1", "pid": 7, "started": "1"}
    store.put(KEY, json.dumps(owner).encode())


def beat_of_foreign(store: LocalStore, beat: int) -> None:
    store.put("_claims/model/x@1-t.beat", str(beat).encode())


@contextlib.contextmanager
def doing_again_and_again(act: Callable[[int], None]) -> Iterator[None]:
    """Something that goes on in another thread meanwhile."""
    end = threading.Event()

    def loop() -> None:
        for number in itertools.count():
            act(number)
            if end.wait(0.05):
                return

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def test_a_claim_keeps_others_out_while_it_is_held(store: LocalStore) -> None:
    refused = pytest.raises(
        ArtifactConflictError, match=r"is being made by process \d+ on \S+, which is alive; wait for its end"
    )
    with hold(store), refused, hold(store):
        pass
    assert store.size(KEY) is None


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_a_claim_is_gone_when_its_work_fails(store: LocalStore, failure: type[BaseException]) -> None:
    with pytest.raises(failure), hold(store):
        raise failure
    assert store.size(KEY) is None


def test_a_claim_that_could_not_be_removed_does_not_keep_its_own_process_out(store: LocalStore) -> None:
    with hold(store):
        left = store.read(KEY)
    store.put(KEY, left)
    with hold(store):
        pass


def test_the_claim_of_a_killed_process_is_taken_at_once(store: LocalStore) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, store.uri], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ArtifactConflictError, match=f"process {process.pid} on"), hold(store):
            pass
        process.kill()
        process.wait()
    said: list[str] = []
    with hold(store, said):
        pass
    assert not said


def test_a_process_of_the_same_number_that_began_at_another_time_is_not_the_owner(store: LocalStore) -> None:
    with hold(store):
        owner = json.loads(store.read(KEY))
    store.put(KEY, json.dumps({**owner, "pid": os.getppid(), "started": "1"}).encode())
    with hold(store):
        pass


def test_a_claim_of_another_machine_is_taken_when_it_gives_no_sign_of_life(store: LocalStore) -> None:
    write_foreign(store)
    beat_of_foreign(store, 3)
    said: list[str] = []
    with hold(store, said, patience_seconds=0.3):
        assert json.loads(store.read(KEY))["host"] != "far"
    assert said == ["model/x@1 is being made by process 7 on far, or was; waiting 0 s for a sign of life"]
    assert not list(store.list())


def test_a_claim_of_another_machine_that_beats_keeps_others_out(store: LocalStore) -> None:
    write_foreign(store)
    refused = pytest.raises(ArtifactConflictError, match="process 7 on far, which is alive")
    with doing_again_and_again(lambda beat: beat_of_foreign(store, beat)), refused, hold(store, patience_seconds=60):
        pass
    assert json.loads(store.read(KEY))["host"] == "far"


def test_a_claim_of_another_machine_that_ends_while_it_is_watched_is_taken(store: LocalStore) -> None:
    write_foreign(store)
    threading.Timer(0.3, store.delete, (KEY,)).start()
    with hold(store, patience_seconds=60):
        pass


def test_a_third_that_was_faster_is_not_thrown_out(store: LocalStore) -> None:
    """The dead claim is removed and taken by a third between the judgement of the first and its hand on it."""

    class Slow(LocalStore):
        reads = 0

        def read(self, key: str) -> bytes:
            if key == KEY:
                Slow.reads += 1
                if Slow.reads == 2:
                    third.__enter__()
            return super().read(key)

    with hold(store):
        left = json.loads(store.read(KEY))
    store.put(KEY, json.dumps({**left, "pid": os.getppid(), "started": "1"}).encode())
    third = hold(store)
    try:
        first = claim(Slow(store.uri), "model/x@1", "model/x@1 is being made", print)
        with pytest.raises(ArtifactConflictError, match=f"process {os.getpid()} on .* which is alive"), first:
            pass
    finally:
        third.__exit__(None, None, None)


def test_of_two_that_take_over_one_dead_claim_one_is_refused(store: LocalStore) -> None:
    """The later has read the dead claim before the earlier took it, and removes that one's instead."""

    class Early(LocalStore):
        def put(self, key: str, data: bytes, *, overwrite: bool = True) -> None:
            super().put(key, data, overwrite=overwrite)
            write_foreign(store)

    with hold(store):
        left = json.loads(store.read(KEY))
    store.put(KEY, json.dumps({**left, "pid": os.getppid(), "started": "1"}).encode())
    early = claim(Early(store.uri), "model/x@1", "model/x@1 is being made", print, patience_seconds=60)
    refused = pytest.raises(ArtifactConflictError, match="process 7 on far, which is alive")
    with doing_again_and_again(lambda beat: beat_of_foreign(store, beat)), refused, early:
        pass


def test_a_claim_beats_and_leaves_nothing(store: LocalStore) -> None:
    with hold(store, beat_seconds=0.02):
        key = f"_claims/model/x@1-{json.loads(store.read(KEY))['token']}.beat"
        end = time.monotonic() + 20
        while store.size(key) is None or int(store.read(key)) < 3:
            assert time.monotonic() < end
            time.sleep(0.01)
    assert not list(store.list())


def test_an_owner_that_was_taken_for_dead_finds_out_and_leaves_the_claim_to_the_other(store: LocalStore) -> None:
    with hold(store, beat_seconds=0.02) as mine:
        mine.check()
        write_foreign(store)
        with pytest.raises(ArtifactConflictError, match="by process 7 on far, because this run seemed dead for a while"):
            mine.check()
    assert json.loads(store.read(KEY))["host"] == "far"


def test_a_claim_that_somebody_tidied_away_is_made_again(store: LocalStore) -> None:
    with hold(store) as mine:
        store.delete(KEY)
        mine.check()
        assert store.size(KEY)
    assert store.size(KEY) is None


def test_a_store_that_is_lost_at_the_end_is_told_and_the_work_counts(store: LocalStore) -> None:
    class Lost(LocalStore):
        def delete(self, key: str) -> None:
            raise StorageError("no answer")

    said: list[str] = []
    with claim(Lost(store.uri), "model/x@1", "model/x@1 is being made", said.append):
        pass
    assert said == ["the claim on model/x@1 could not be removed: no answer"]
    with hold(store):
        pass


def test_a_damaged_claim_is_named_with_what_to_do(store: LocalStore) -> None:
    store.put(KEY, b"{")
    with pytest.raises(StorageError, match=r"x@1\.json is damaged .*; remove it if no run makes this version"), hold(store):
        pass

"""What waits survives the process that wrote it, is bounded, and is taken by nobody while its writer lives."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import heliostat
from heliostat.tracking.spool import UNREADABLE, Entry, SpoolFile, SpoolFolder

SOURCE_ROOT = str(Path(heliostat.__file__).parents[1])


def metrics(step: int, size: int = 1) -> Entry:
    return Entry("run", "log_metrics", {"values": {"x" * size: 1.0}, "step": step}, 1000 + step)


def everything(file: SpoolFile) -> list[Entry]:
    found = []
    while (one := file.next()) is not None:
        found.append(one[0])
        file.offset = one[1]
    return found


@pytest.fixture
def spools(tmp_path: Path) -> SpoolFolder:
    return SpoolFolder(tmp_path / "spool", "key", 10_000)


def test_entries_come_back_as_they_were_and_in_order(spools: SpoolFolder) -> None:
    file, entries = spools.create(), [metrics(step) for step in range(5)]
    assert all(file.append(entry, spools.limit_bytes) for entry in entries)
    assert everything(file) == entries
    assert file.append(metrics(9), spools.limit_bytes)
    assert everything(file) == [metrics(9)]
    file.discard()
    assert spools.is_empty()


def test_a_full_spool_takes_no_more_metrics_but_still_the_end_of_the_run(spools: SpoolFolder) -> None:
    file = spools.create()
    taken = sum(file.append(metrics(step, 500), spools.limit_bytes) for step in range(100))
    assert 10 < taken < 20
    assert file.path.stat().st_size <= spools.limit_bytes
    assert file.append(Entry("run", "finish", {"status": "FINISHED"}, 1), spools.limit_bytes)
    assert [entry.call for entry in everything(file)] == ["log_metrics"] * taken + ["finish"]


def test_half_a_line_at_the_end_is_not_there_and_a_damaged_one_is_named(spools: SpoolFolder) -> None:
    file = spools.create()
    file.append(metrics(1), spools.limit_bytes)
    with file.path.open("ab") as sink:
        sink.write(b'{"run_id": "run"}\n{"run_id": "ru')
    assert [entry.call for entry in everything(file)] == ["log_metrics", UNREADABLE]


def test_a_living_writers_file_is_left_alone_and_a_killed_ones_is_taken(spools: SpoolFolder) -> None:
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom heliostat.tracking.spool import Entry, SpoolFolder\n"
        "spools = SpoolFolder(Path(sys.argv[1]), 'key', 10_000)\nfile = spools.create()\n"
        "file.append(Entry('run', 'set_tags', {'tags': {}}, 1), 10_000)\nprint('ready', flush=True)\ntime.sleep(60)\n"
    )
    command = [sys.executable, "-c", program, str(spools.folder)]
    environment = os.environ | {"PYTHONPATH": SOURCE_ROOT}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        assert not spools.is_empty()
        assert list(spools.abandoned()) == []
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    (file,) = spools.abandoned()
    assert [entry.call for entry in everything(file)] == ["set_tags"]
    file.release()
    (again,) = spools.abandoned()
    again.discard()
    assert spools.is_empty()


def test_servers_do_not_share_files(spools: SpoolFolder) -> None:
    file = spools.create()
    other = SpoolFolder(spools.folder, "other", 10_000)
    assert other.is_empty()
    assert list(other.abandoned()) == []
    file.discard()


def test_only_the_owner_of_the_account_can_read_it(spools: SpoolFolder) -> None:
    file = spools.create()
    assert file.path.stat().st_mode & 0o777 == 0o600
    file.discard()

"""The job files, run the way users run them: a real head node, the real `ray job submit`, a token, and no leftovers."""

import http.client
import json
import os
import runpy
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from heliostat.cli import STAGE_VERBS

ROOT = Path(__file__).parents[2]
JOBS = sorted(path.stem for path in (ROOT / "jobs").glob("*.py"))
RAY = str(Path(sys.executable).parent / "ray")
START_SECONDS = 120  # a loaded machine took 55
SUBMIT_SECONDS = 150
STOP_SECONDS = 5  # Ray would drain its node for up to 30 s, but nothing runs on this one any more


def test_every_stage_and_the_whole_recipe_has_a_job_file() -> None:
    assert sorted([*STAGE_VERBS, "run"]) == JOBS


@pytest.mark.parametrize("job", JOBS)
def test_a_job_file_asks_for_its_own_verb_and_exits_with_its_status(
    job: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"jobs/{job}.py"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "jobs" / f"{job}.py"), run_name="__main__")
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"heliostat: heliostat {job} takes one recipe, got nothing")


def test_a_job_file_does_nothing_when_a_worker_process_imports_it() -> None:
    for job in JOBS:
        runpy.run_path(str(ROOT / "jobs" / f"{job}.py"), run_name="__mp_main__")


@dataclass(frozen=True)
class Head:
    """A head node that `clusters/local.sh` started, its token, and its folder."""

    dashboard: str
    agent: str
    token: str
    environment: dict[str, str]
    log: Path

    def submit(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [RAY, "job", "submit", "--address", f"http://{self.dashboard}", "--working-dir", str(ROOT), "--", "python"]
        return subprocess.run(
            [*command, *words],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SUBMIT_SECONDS,
        )

    def request(self, method: str, path: str, token: str = "", body: object = None, *, agent: bool = False) -> tuple[int, str]:
        connection = http.client.HTTPConnection(self.agent if agent else self.dashboard, timeout=10)
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
        try:
            connection.request(method, path, json.dumps(body) if body is not None else None, headers)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()


def free_ports(count: int) -> list[int]:
    with ExitStack() as open_sockets:
        probes = [open_sockets.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def processes_of(folder: Path) -> list[int]:
    """Processes whose command line, environment or open log files name the folder (workers rewrite their command line)."""
    mark = str(folder).encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if process.joinpath("stat").read_text().rpartition(")")[2].split()[0] == "Z":
                continue
            texts = [process.joinpath("cmdline").read_bytes(), process.joinpath("environ").read_bytes()]
            texts += [
                os.readlink(process / "fd" / name).encode() for name in ("1", "2") if (process / "fd" / name).is_symlink()
            ]
        except OSError:  # it ended while we looked
            continue
        if any(mark in text for text in texts) and int(process.name) != os.getpid():
            found.append(int(process.name))
    return found


def kill_all(folder: Path) -> list[int]:
    """SIGKILL what is left of a cluster; returns what survives that."""
    deadline = time.monotonic() + 20
    while (left := processes_of(folder)) and time.monotonic() < deadline:
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.2)
    return left


def wait_until_it_answers(head: Head, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the head node ended at once:\n{head.log.read_text()}"
        try:
            answers = [head.request("GET", "/api/healthz", agent=True), head.request("GET", "/api/jobs/", head.token)]
            if all(status == 200 for status, _ in answers):
                return
        except OSError:
            pass
        time.sleep(0.3)
    pytest.fail(f"no answer from the head node within {START_SECONDS} s:\n{head.log.read_text()}")


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    folder = Path(tempfile.mkdtemp(prefix="hsj", dir="/tmp"))  # short: Ray keeps unix sockets below it
    token_file = tmp_path_factory.mktemp("token") / "auth_token"
    token = secrets.token_hex(32)
    token_file.write_text(token)
    token_file.chmod(0o600)
    gcs, dashboard, client, agent, agent_grpc = free_ports(5)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = inherited | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "RAY_TMPDIR": str(folder),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "platform"),
    }
    ports = f"--port={gcs} --dashboard-port={dashboard} --ray-client-server-port={client}"
    agents = f"--dashboard-agent-listen-port={agent} --dashboard-agent-grpc-port={agent_grpc}"
    sizes = "--num-cpus=2 --object-store-memory=100000000"
    head = Head(f"127.0.0.1:{dashboard}", f"127.0.0.1:{agent}", token, environment, folder / "head.log")
    with head.log.open("wb") as log:
        process = subprocess.Popen(
            ["bash", str(ROOT / "clusters" / "local.sh"), *ports.split(), *agents.split(), *sizes.split()],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
        try:
            wait_until_it_answers(head, process)
            yield head
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
            left = kill_all(folder)
            process.wait(timeout=10)
    assert left == [], f"processes of the test cluster survived SIGKILL: {left}"
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from skimage import data

    folder = tmp_path_factory.mktemp("photographs")
    for name in ("astronaut", "coffee", "chelsea"):
        picture = Image.fromarray(getattr(data, name)())
        for index in range(7):
            left, top = 20 * index, 12 * index
            picture.crop((left, top, left + 128, top + 128)).save(folder / f"{name}_{index}.jpg")
    return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "photographs.yaml"
    path.write_text("name: photographs\ntracking: {uri: none}\ningest: {pool: given by the test, images_per_shard: 8}\n")
    return path


@pytest.mark.ray
def test_a_submitted_job_makes_its_artifact_and_the_same_job_again_reuses_it(
    head: Head, photographs: Path, recipe: Path, tmp_path: Path
) -> None:
    words = ["jobs/ingest.py", str(recipe), f"pool={photographs}", f"store={tmp_path}/store"]
    first = head.submit(*words)
    assert first.returncode == 0, first.stdout + head.log.read_text()
    assert "raw/photographs@1" in first.stdout
    record = json.loads((tmp_path / "store" / "raw" / "photographs@1" / "artifact.json").read_text())
    assert record["counts"] == {"images": 21, "shards": 3}

    again = head.submit(*words)
    assert again.returncode == 0, again.stdout
    assert "raw/photographs@1: reused, made" in again.stdout


@pytest.mark.ray
def test_a_job_that_fails_says_why_in_one_line_and_the_submitter_exits_with_failure(
    head: Head, recipe: Path, tmp_path: Path
) -> None:
    failed = head.submit("jobs/ingest.py", str(recipe), f"pool={tmp_path}/nowhere", f"store={tmp_path}/store")
    assert failed.returncode != 0
    assert f"heliostat: no folder at {tmp_path}/nowhere; give the folder that holds your images\n" in failed.stdout
    assert "Traceback" not in failed.stdout
    status, jobs = head.request("GET", "/api/jobs/", head.token)
    assert status == 200
    assert [job["driver_exit_code"] for job in json.loads(jobs) if "nowhere" in job["entrypoint"]] == [1]
    assert not (tmp_path / "store" / "raw" / "photographs@1" / "artifact.json").exists()


@pytest.mark.ray
def test_without_the_token_nothing_can_be_read_or_started(head: Head) -> None:
    assert head.request("GET", "/api/jobs/")[0] == 401
    assert head.request("POST", "/api/jobs/", body={"entrypoint": "echo stolen"})[0] == 401
    assert head.request("GET", "/api/jobs/", token="wrong")[0] in (401, 403)
    status, jobs = head.request("GET", "/api/jobs/", head.token)
    assert status == 200
    assert "stolen" not in jobs

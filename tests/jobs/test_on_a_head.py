"""The job files as users run them: a real head node, a token, the shipped working directory, stop and resume.

The lines of jobs/README.md are taken from there, with addresses and places of this machine.
"""

import json
import re
import shlex
import shutil
import sqlite3
import stat
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from local_web import local_web
from ray_head import ROOT, Head, start_head
from tiny_recipe import NUM_COPIES, NUM_PICTURES, write_working_directory

from heliostat.artifacts import Artifact, ArtifactRef, ArtifactStore, verify
from heliostat.cli import STAGE_VERBS
from heliostat.storage import LocalStore

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(3000),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray's client leaves sockets to the garbage collector
]
README = (ROOT / "jobs" / "README.md").read_text()
EXAMPLE = "\n".join(re.findall(r"```bash\n(.*?)```", README, flags=re.S))
ENDED = ("STOPPED", "SUCCEEDED", "FAILED")


@dataclass(frozen=True)
class Place:
    """A head node, a working directory, and where the artifacts go."""

    head: Head
    folder: Path
    pictures: Path
    store: Path
    tracking: str

    def here(self, text: str) -> str:
        """Text of the README with this machine's addresses and places."""
        places = {
            "http://127.0.0.1:8265": self.head.address,
            "s3://bucket/prefix": str(self.store),
            "http://mlflow.internal:5000": self.tracking,
            "s3://bucket/photos": str(self.pictures / "pool"),
        }
        for there, here in places.items():
            text = text.replace(there, here)
        return text

    def words(self, job: str) -> str:
        """What the README's line of a job submits."""
        shared = re.search(r'^SHARED="(.*)"$', EXAMPLE, flags=re.M)
        line = re.search(rf"^\$SUBMIT -- (python jobs/{job}\.py [^#\n]*)", EXAMPLE, flags=re.M)
        assert shared is not None
        assert line is not None, f"jobs/README.md has no line for {job}"
        return self.here(line[1].replace("$SHARED", shared[1])).strip()

    def submit(self, words: str, **environment: str) -> str:
        """Submit through Ray's client; returns the id."""
        runtime = {"working_dir": str(self.folder)} | ({"env_vars": environment} if environment else {})
        return str(self.head.client().submit_job(entrypoint=words, runtime_env=runtime))

    def wait(self, *jobs: str, seconds: float = 900) -> list[tuple[str, int | None, str]]:
        """(status, exit code, log) of jobs that have ended."""
        client, deadline = self.head.client(), time.monotonic() + seconds
        while waiting := [job for job in jobs if client.get_job_status(job).value not in ENDED]:
            assert time.monotonic() < deadline, f"{waiting} still run:\n{client.get_job_logs(waiting[0])}"
            time.sleep(0.3)
        infos = [client.get_job_info(job) for job in jobs]
        return [
            (info.status.value, info.driver_exit_code, client.get_job_logs(job)) for job, info in zip(jobs, infos, strict=True)
        ]

    def load(self, name: str) -> Artifact:
        artifact = ArtifactStore(LocalStore(self.store)).load(ArtifactRef.parse(name))
        verify(artifact)
        return artifact


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    base = tmp_path_factory.mktemp("jobs")
    for name in ("work", "pictures", "home"):
        (base / name).mkdir()
    write_working_directory(base / "work", base / "pictures")
    with start_head(base / "home", "--num-cpus=4", "--object-store-memory=150000000") as head:
        yield Place(head, base / "work", base / "pictures", base / "store", f"sqlite:///{base}/mlflow.db")


@pytest.fixture(scope="module")
def finished(place: Place) -> str:
    """The printed text of the README's last line, which runs all stages."""
    lines = EXAMPLE.splitlines()
    setup = [line for line in lines if line.startswith(("export ", "SUBMIT=", "SHARED="))]
    (line,) = [line for line in lines if "jobs/run.py" in line]
    done = place.head.shell(place.here("\n".join([*setup, line])), place.folder)
    assert done.returncode == 0, done.stdout + place.head.log.read_text()
    return done.stdout


@pytest.fixture(scope="module")
def raw(place: Place) -> str:
    """Images to train on, made by a job."""
    ((_, code, log),) = place.wait(place.submit(place.words("ingest").replace("version=1", "version=alone")))
    assert code == 0, log
    return "raw/birds@alone"


def test_the_token_is_for_its_owner_alone_and_without_it_nothing_is_read_or_started(place: Place) -> None:
    head = place.head
    assert stat.S_IMODE(head.token_file.stat().st_mode) == 0o600
    assert head.request("GET", "/api/jobs/")[0] == 401
    assert head.request("POST", "/api/jobs/", body={"entrypoint": "echo stolen"})[0] == 401
    assert head.request("GET", "/api/jobs/", token="wrong")[0] in (401, 403)
    wrong = head.shell(
        f"RAY_AUTH_MODE=token RAY_AUTH_TOKEN=wrong ray job submit --address {head.address} -- echo stolen", place.folder
    )
    assert wrong.returncode != 0
    assert "Invalid authentication token" in wrong.stdout
    status, jobs = head.request("GET", "/api/jobs/", head.token)
    assert status == 200
    assert "stolen" not in jobs


def test_a_program_outside_of_ray_that_joins_without_the_token_is_told_what_it_lacks(place: Place) -> None:
    words = f"recipes/birds.yaml store={place.store} tracking.uri=none version=joined cluster.address={place.head.control}"
    joined = place.head.shell(f"RAY_AUTH_MODE=disabled python -m heliostat ingest {words}", place.folder)
    assert joined.returncode == 1, joined.stdout
    assert joined.stdout.splitlines()[-1].startswith(f"heliostat: Ray at {place.head.control} could not be used: ")
    assert joined.stdout.endswith("; a cluster with a token needs RAY_AUTH_MODE=token and the same token here\n")


def test_the_readmes_line_runs_all_stages_of_a_recipe_that_only_the_working_directory_has(place: Place, finished: str) -> None:
    stages = ["ingest", "embed", "dedup", "curate", "pretrain", "sweep", "distill", "evaluate", "publish"]
    at = [re.search(rf"^{stage} +\w+/birds", finished, flags=re.M) for stage in stages]
    assert all(at), finished
    assert [found.start() for found in at if found] == sorted(found.start() for found in at if found)
    assert "succeeded" in finished.splitlines()[-2]
    assert place.load("raw/birds@1").record.counts["images"] == NUM_PICTURES + NUM_COPIES
    assert place.load("curated/birds@1").record.counts["images"] == NUM_PICTURES
    assert place.load("release/birds@1").record.inputs.keys() >= {"model", "report"}
    assert not list(place.folder.glob("*/**/heliostat-store")), "a job leaves nothing in the working directory"


@pytest.mark.usefixtures("finished")
def test_the_readmes_line_of_every_stage_finds_its_artifact_made(place: Place) -> None:
    stages = [stage for stage in STAGE_VERBS if stage != "crawl"]
    jobs = [place.submit(place.words(stage)) for stage in stages]
    for stage, (status, code, log) in zip(stages, place.wait(*jobs), strict=True):
        assert (status, code) == ("SUCCEEDED", 0), log
        assert re.search(rf"^{stage} +\S+/birds\S*: reused, made ", log, flags=re.M), log


def test_a_crawl_is_a_job_too(place: Place) -> None:
    with local_web(1) as web:
        (address,) = web.hosts.values()
        (place.folder / "list.txt").write_text("".join(f"http://{address}:{web.port}/img/{n}.png\n" for n in range(6)))
        crawl = {
            "contact": "https://example.org/crawl",
            "urls": ["list.txt"],
            "filter": {"ports": [web.port], "allowed_addresses": [f"{address}/32"]},
            "politeness": {"requests_per_second": 1000.0},
        }
        (place.folder / "recipes" / "web.yaml").write_text(json.dumps({"name": "web", "crawl": crawl}))
        job = place.submit(
            place.words("ingest").replace("ingest.py", "crawl.py").replace("birds", "web").rpartition(" pool=")[0]
        )
        ((status, code, log),) = place.wait(job)
    assert (status, code) == ("SUCCEEDED", 0), log
    assert place.load("raw/web@1").record.counts["images"] == 6


def test_a_job_ends_with_the_exit_status_of_its_command_and_says_why_in_one_line(place: Place) -> None:
    ingest = f"python jobs/ingest.py recipes/birds.yaml store={place.store} tracking.uri=none version=refused"
    pretrain = ingest.replace("ingest.py", "pretrain.py")
    expected = {
        f"{ingest} pool={place.folder}/nowhere": (1, f"no folder at {place.folder}/nowhere; give the folder that holds your"),
        f"{ingest} poll=x": (2, "birds.yaml: unknown key: ingest.poll. Did you mean ingest.pool?"),
        ingest.replace(str(place.store), "./store"): (2, "store=./store is relative to the job's temporary directory; give"),
        pretrain: (1, "no artifact curated/birds@refused in"),
        "python jobs/embed.py recipes/birds.yml": (2, "no recipe at recipes/birds.yml. "),
    }
    jobs = [place.submit(words) for words in expected]
    for (code, message), (status, found, log) in zip(expected.values(), place.wait(*jobs), strict=True):
        assert (status, found) == ("FAILED", code), log
        assert [line for line in log.splitlines() if line.startswith(f"heliostat: {message}")], log
        assert "Traceback" not in log
    assert not list(place.store.glob("*/birds@refused/artifact.json"))


def test_more_workers_than_the_machine_has_room_for_are_refused_at_once(place: Place, raw: str) -> None:
    words = place.words("pretrain").replace("version=1", f"version=crowded data={raw} scaling.num_workers=8")
    ((status, code, log),) = place.wait(place.submit(words), seconds=110)  # scaling.start_timeout_seconds is 120
    assert (status, code) == ("FAILED", 1), log
    assert "8 workers need 8 CPU, Ray has 4; lower scaling.num_workers or add nodes that have CPU" in log


def test_the_code_of_the_working_directory_runs_where_heliostat_is_not_installed(place: Place, tmp_path: Path) -> None:
    (flag,) = re.findall(r"--runtime-env-json '(\{.*\})'", README)
    environment: dict[str, Any] = json.loads(flag)["env_vars"]
    shutil.copytree(ROOT / "platform", place.folder / "platform", ignore=shutil.ignore_patterns("__pycache__"))
    words = f"python jobs/ingest.py recipes/birds.yaml store={tmp_path}/store tracking.uri=none"
    try:
        with place.head.without_heliostat():
            jobs = [place.submit(words), place.submit(words, **environment)]
            without, shipped = place.wait(*jobs)
    finally:
        shutil.rmtree(place.folder / "platform")
    assert without[:2] == ("FAILED", 1)
    assert "No module named 'heliostat'" in without[2]
    assert shipped[:2] == ("SUCCEEDED", 0), shipped[2]
    assert (tmp_path / "store" / "raw" / "birds@1" / "artifact.json").is_file()


def test_a_stopped_job_closes_its_run_and_the_same_line_resumes_to_the_artifact_of_an_unstopped_one(
    place: Place, raw: str
) -> None:
    more = f"data={raw} train.steps=80 train.checkpoint_every_steps=4 online.every_steps=40"
    words = place.words("pretrain").replace("version=1", f"version=stopped {more}")
    checkpoint = place.store / "model" / "birds@stopped" / "_work" / "checkpoints" / "step-00000008" / "checkpoint.json"
    with ThreadPoolExecutor(1) as thread:
        line = (
            f"export RAY_AUTH_MODE=token; ray job submit --address {place.head.address} --submission-id halt --working-dir . --"
        )
        following = thread.submit(place.head.shell, f"{line} {words}", place.folder)
        deadline = time.monotonic() + 600
        while not (saved := checkpoint.exists()) and not following.done() and time.monotonic() < deadline:
            time.sleep(0.05)
        place.head.client().stop_job("halt")  # by its end the newer checkpoints have replaced the one waited for
        followed = following.result()
    assert saved, followed.stdout
    assert followed.returncode == 0, followed.stdout  # as the README says of Ray's own command
    assert "Job 'halt' was stopped" in followed.stdout
    (kept,) = re.findall(r"heliostat: stopped at step (\d+) of 80 with a checkpoint; the same command", followed.stdout)
    assert _status_of_run(place, "model/birds@stopped") == "KILLED"

    unstopped = place.submit(words.replace("=stopped", "=unstopped"))
    again = place.submit(words)
    for status, code, log in place.wait(unstopped, again):
        assert (status, code) == ("SUCCEEDED", 0), log
    assert f"resuming at step {kept} of 80" in log
    assert 8 <= int(kept) < 80
    assert _status_of_run(place, "model/birds@stopped") == "FINISHED"
    stopped, whole = place.load("model/birds@stopped").record, place.load("model/birds@unstopped").record
    assert len(whole.files) > 3
    assert stopped.files == whole.files
    assert (stopped.fingerprint, stopped.counts, stopped.metrics) == (whole.fingerprint, whole.counts, whole.metrics)


def _status_of_run(place: Place, name: str) -> str:
    with closing(sqlite3.connect(place.tracking.removeprefix("sqlite:///"))) as database:
        ((status,),) = database.execute("SELECT status FROM runs WHERE name = ?", (name,)).fetchall()
    return str(status)


def test_the_other_lines_of_the_readme_say_what_they_promise(place: Place, finished: str) -> None:
    """`ray job list`, `status` and `logs` of the job that ran everything."""
    (job,) = set(re.findall(r"raysubmit_\w+", finished.splitlines()[-2]))
    lines = "; ".join(f"ray job {words} --address {place.head.address}" for words in (f"status {job}", f"logs {job}", "list"))
    shown: subprocess.CompletedProcess[str] = place.head.shell(f"export RAY_AUTH_MODE=token; {lines}", place.folder)
    assert shown.returncode == 0, shown.stdout
    assert f"Job '{job}' succeeded" in shown.stdout
    assert re.search(r"^finished in \d+ s$", shown.stdout, flags=re.M)
    assert shlex.quote(job) in shown.stdout

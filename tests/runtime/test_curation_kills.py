"""SIGKILL of drivers and workers at random moments, from the crawl to the packed set: the result is the same to the byte."""

import contextlib
import http.server
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import psutil
import pytest
from families import end_family

from heliostat.artifacts import ArtifactRef, ArtifactStore, verify
from heliostat.data.photographs import crops
from heliostat.storage import LocalStore

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1500)]

NUM_DRIVER_KILLS, NUM_WORKER_KILLS = 10, 10
STAGES = ("crawl", "ingest", "embed", "dedup", "curate")
ARTIFACTS = ("raw/web@1", "features/web@1", "features/web-curated@1", "copies/web@1", "curated/web@1")
BUSY = "001.png"  # fails until somebody wakes its server
OF_THEIR_OWN_TIME = {"times.json", "report.html", "report.json"}  # they tell how long it took


def pictures() -> dict[str, bytes]:
    """Crops of photographs, with copies among them and two files that are no images."""
    found: dict[str, bytes] = {}
    for number, crop in enumerate(crops("left", count=4, seed=5)):
        _, data = cv2.imencode(".png", crop.pixels[:, :, ::-1])
        found[f"{number:03d}.png"] = data.tobytes()
        if number % 5 == 0:
            _, data = cv2.imencode(".jpg", crop.pixels[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 60])
            found[f"{number:03d}-again.jpg"] = data.tobytes()
            found[f"{number:03d}-same.png"] = found[f"{number:03d}.png"]
    return found | {"page.png": b"<html>not found</html>", "cut.png": found["000.png"][:200]}


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A server of pictures; yields the list of their URLs, over four addresses of this machine, some of which answer 404."""
    files, urls = pictures(), tmp_path_factory.mktemp("web") / "urls.jsonl"

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.removeprefix("/")
            data = files.get(name)
            if name == BUSY and not (urls.parent / "awake").exists():
                self.send_error(500)
                return
            time.sleep(random.random() * 0.02)  # answers come in any order
            self.send_response(200 if data else 404)
            self.send_header("Content-Length", str(len(data or b"")))
            self.end_headers()
            self.wfile.write(data or b"")

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    servers = [http.server.ThreadingHTTPServer((f"127.0.0.{2 + number}", 0), Handler) for number in range(4)]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    names = [*files, "gone-1.png", "gone-2.png"]
    hosts = ["{}:{}".format(*servers[number % 4].server_address) for number in range(len(names))]
    urls.write_text(
        "".join(json.dumps({"url": f"http://{host}/{name}"}) + "\n" for host, name in zip(hosts, names, strict=True))
    )
    yield urls
    for server in servers:
        server.shutdown()
        server.server_close()


def recipe(urls: Path, store: Path) -> list[str]:
    """The overrides of a recipe in which every stage has several tasks."""
    ports = sorted({urllib.parse.urlsplit(json.loads(line)["url"]).port for line in urls.read_text().splitlines()})
    mapping = {
        "name": "web",
        "store": str(store),
        "tracking": {"uri": "none"},
        "crawl": {
            "urls": [str(urls)],
            "contact": "https://example.org/about",
            "urls_per_task": 12,
            "filter": {"ports": ports, "allowed_addresses": ["127.0.0.0/8"]},
            "politeness": {"requests_per_second": 1000.0},
            "limits": {"attempts": 1},
            "images_per_shard": 8,
        },
        "ingest": {"curated": "photographs", "curated_crops_per_photograph": 2},
        "embed": {"copy_embedder": "thumbnail", "images_per_task": 16},
        "dedup": {"join": {"rows_per_strip": 40, "rows_per_range": 50}},
        "curate": {
            "retrieval": {"mode": "sample", "neighbors": 6},
            "clusters": {"num_clusters": 6},
            "balance": {"target_images": 40},
            "images_per_shard": 8,
            "ledger_rows_per_file": 40,
            "sheets": {"pairs": 6, "components": 3, "images_per_reason": 3},
        },
    }
    path = store.parent / f"{store.name}.yaml"
    path.write_text(json.dumps(mapping))
    return [str(path)]


def drive(words: list[str], log: str, stages: Sequence[str] = STAGES) -> None:
    """A driver: stages of the recipe, as the command runs them."""
    from heliostat.cli import main

    os.setpgid(0, 0)
    with Path(log).open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        for stage in stages:
            status = main([stage, *words])
            if status:
                os._exit(status)
    os._exit(0)


def start_head(folder: str) -> tuple[subprocess.Popen[bytes], int]:
    """A Ray head on two free ports, and its port. Another process may take one of them meanwhile: then on two others."""
    log = Path(folder) / "head.log"
    for _ in range(3):
        with contextlib.ExitStack() as open_sockets:
            probes = [open_sockets.enter_context(socket.socket()) for _ in range(2)]
            for probe in probes:
                probe.bind(("127.0.0.1", 0))
            port, dashboard = (probe.getsockname()[1] for probe in probes)
        environment = {
            **os.environ,
            "RAY_AUTH_MODE": "disabled",
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
        command += [f"--port={port}", f"--dashboard-port={dashboard}", "--num-cpus=2", f"--temp-dir={folder}"]
        command += ["--object-store-memory=120000000", "--disable-usage-stats"]
        with log.open("ab") as output:
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 180
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                return process, port
            time.sleep(0.3)
        end_family(process)
    pytest.fail(f"no Ray head starts:\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def cluster() -> Iterator[int]:
    """A Ray that outlives its drivers; yields the process of its head."""
    folder = tempfile.mkdtemp(prefix="hsk", dir="/tmp")  # short: Ray keeps unix sockets below it
    process, port = start_head(folder)
    os.environ["RAY_ADDRESS"] = f"127.0.0.1:{port}"
    yield process.pid
    del os.environ["RAY_ADDRESS"]
    end_family(process)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def drivers() -> multiprocessing.context.ForkServerContext:
    """Drivers start from a process that has imported everything, so that their lives are spent on the stages."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["ray", "ray.data", "torch", "heliostat.cli", "heliostat.runtime.verbs", "heliostat.runtime.stage_curate"]
    )
    return context


def finish(drivers: multiprocessing.context.ForkServerContext, words: list[str], log: Path) -> float:
    """Run to the end; returns the seconds."""
    started = time.monotonic()
    process = drivers.Process(target=drive, args=(words, str(log)))
    process.start()
    process.join(timeout=600)
    assert process.exitcode == 0, log.read_text()[-4000:]
    return time.monotonic() - started


def ray_workers(head: int) -> list[psutil.Process]:
    """The processes below a head node that are working on a task or hold an actor of ours."""
    found = []
    for process in psutil.Process(head).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            title = " ".join(process.cmdline())
            if title.startswith(("ray::_run", "ray::Map")):
                found.append(process)
    return found


def content(store: Path) -> dict[str, dict[str, str]]:
    """Checksums of every file of every artifact, but for those that tell times; checked against the bytes."""
    artifacts, found = ArtifactStore(LocalStore(store)), {}
    for name in ARTIFACTS:
        artifact = artifacts.load(ArtifactRef.parse(name))
        verify(artifact)
        found[name] = {key: file.sha256 for key, file in artifact.record.files.items() if key not in OF_THEIR_OWN_TIME}
    return found


@pytest.fixture(scope="module")
def whole(cluster, web: Path, drivers, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, dict[str, str]], float]:
    """What a run that nobody disturbs makes, and how long it takes."""
    folder = tmp_path_factory.mktemp("whole")
    seconds = finish(drivers, recipe(web, folder / "store"), folder / "log")
    return content(folder / "store"), seconds


def test_drivers_killed_at_random_moments_leave_no_trace(cluster, web: Path, drivers, whole, tmp_path: Path) -> None:
    expected, seconds = whole
    generator, killed, number = random.Random(11), 0, 0
    while killed < NUM_DRIVER_KILLS:
        store, log = tmp_path / f"store-{number}", tmp_path / f"log-{number}"
        words, number = recipe(web, store), number + 1
        while True:
            process = drivers.Process(target=drive, args=(words, str(log)))
            process.start()
            is_last = killed >= NUM_DRIVER_KILLS
            process.join(timeout=600 if is_last else generator.uniform(0.04, 0.22) * seconds)
            if process.exitcode is not None:
                break
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            killed += 1
        assert process.exitcode == 0, log.read_text()[-4000:]
        assert content(store) == expected


def test_workers_killed_at_random_moments_leave_no_trace(cluster: int, web: Path, drivers, whole, tmp_path: Path) -> None:
    expected, seconds = whole
    generator, killed, number = random.Random(12), 0, 0
    while killed < NUM_WORKER_KILLS:
        store = tmp_path / f"store-{number}"
        number += 1
        process = drivers.Process(target=drive, args=(recipe(web, store), str(tmp_path / "log")))
        process.start()
        while process.exitcode is None:
            # A task that is lost ten times ends the run, so on a slow machine kills are rarer: a worker takes longer to start.
            process.join(timeout=generator.uniform(0.06, 0.2) * max(seconds, 30))
            workers = ray_workers(cluster)
            if workers and process.exitcode is None:
                with contextlib.suppress(psutil.NoSuchProcess):
                    generator.choice(workers).kill()
                    killed += 1
        assert process.exitcode == 0, (tmp_path / "log").read_text()[-4000:]
        assert content(store) == expected


def test_a_url_that_failed_is_asked_for_again_alone(cluster, web: Path, drivers, tmp_path: Path) -> None:
    words = recipe(web, tmp_path / "store")

    def crawl(*more: str) -> int | None:
        process = drivers.Process(target=drive, args=([*words, *more], str(tmp_path / "log"), ("crawl",)))
        process.start()
        process.join(timeout=300)
        return process.exitcode

    assert crawl() == 0
    (web.parent / "awake").touch()
    try:
        assert crawl("version=2", "retry=raw/web@1") == 0
        assert crawl("version=3", "retry=raw/web@2") == 1
    finally:
        (web.parent / "awake").unlink()
    again = ArtifactStore(LocalStore(tmp_path / "store")).load(ArtifactRef.parse("raw/web@2"))
    assert again.record.counts["images"] == 1
    assert again.record.inputs == {"retried": "raw/web@1"}
    assert "raw/web@2 has no URL whose failure may have passed" in (tmp_path / "log").read_text()


def test_the_artifacts_hold_what_the_web_gave(whole) -> None:
    expected, _ = whole
    assert {key.partition("/")[0] for key in expected["curated/web@1"]} >= {"shards", "ledger", "sheets", "manifest.parquet"}
    assert sum(key.startswith("shards/") for key in expected["raw/web@1"]) > 4

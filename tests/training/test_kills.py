"""Training is killed at random moments, again and again, and ends bit for bit as the run that nobody touched.

A server process imports everything once and forks: the killed ones are the training process itself, and one rank of two.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SERVER = """
import json, os, random, signal, sys, time, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, {fixtures!r})
from pathlib import Path
import torch, torch.distributed as dist
from tiny_training import Log, final_files, job, settings, shard
from heliostat.training.run import run_training
from heliostat.training.world import World
import heliostat.training.loop, heliostat.data.loader

torch.set_num_threads(1)
folder, wanted, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
WORDS = ("train.steps=10", "train.checkpoint_every_steps=2", "train.log_every_steps=1", "train.keep_every=4",
         "loader.workers=1", "method.drop_path_rate=0.3")
tar = shard()

def rank_of(run, attempt, rank, size):
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        if size > 1:
            meeting = folder / f"meeting-{{run.name}}-{{attempt}}"
            dist.init_process_group("gloo", init_method=f"file://{{meeting}}", rank=rank, world_size=size)
        config = settings(f"scaling.num_workers={{0 if size == 1 else size}}", *WORDS)
        run_training(job(run, config, tar), World(rank, size), Log().report, lambda text: None)
        status = 0
    except BaseException as error:
        print(type(error).__name__, str(error)[:200], file=sys.stderr, flush=True)
    finally:
        os._exit(status)

def ended(pids):
    return all(Path(f"/proc/{{pid}}/stat").read_text().rpartition(")")[2].split()[0] == "Z" for pid in pids)

def attempt(run, number, size, kill_after):
    # Start all ranks, kill one of them after some seconds; returns (killed one that ran, all ended well, seconds).
    began = time.monotonic()
    pids = [rank_of(run, number, rank, size) for rank in range(size)]
    killed = False
    while not ended(pids):
        if kill_after is not None and not killed and time.monotonic() - began > kill_after:
            victim = random.choice(pids)
            killed = not ended([victim])
            os.kill(victim, signal.SIGKILL)
            time.sleep(0.05)
            for pid in pids:
                os.kill(pid, signal.SIGKILL)  # as Ray ends a group that has lost a worker
        time.sleep(0.002)
    statuses = [os.waitpid(pid, 0)[1] for pid in pids]
    return killed, statuses == [0] * size, time.monotonic() - began

random.seed(seed)
for size in (1, 2):
    whole, run = folder / f"whole-{{size}}", folder / f"killed-{{size}}"
    _, well, seconds = attempt(whole, 0, size, None)
    assert well
    kills = rounds = number = 0
    while kills < wanted:
        rounds += 1
        while True:
            number += 1
            share = random.random()
            killed, well, took = attempt(run, number, size, None if kills >= wanted else share * seconds)
            seconds = seconds if killed else min(seconds, took)  # the first run may have been slowed by others
            kills += killed
            if well:
                break
        same = final_files(run) == final_files(whole)
        print(json.dumps({{"size": size, "kills": kills, "rounds": rounds, "same": same}}), flush=True)
        if kills < wanted:
            import shutil
            shutil.rmtree(run)
"""


def kill(folder: Path, wanted: int, seed: int) -> list[dict]:
    """Kill training of one and of two processes `wanted` times each; what every run that came to its end was like."""
    code = SERVER.format(fixtures=str(Path(__file__).parents[1] / "fixtures"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(wanted), str(seed)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=14_000,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(rounds: list[dict], wanted: int) -> None:
    assert all(one["same"] for one in rounds)
    for size in (1, 2):
        assert max(one["kills"] for one in rounds if one["size"] == size) >= wanted


def test_six_kills_of_the_process_and_six_of_a_rank_change_no_bit(tmp_path: Path) -> None:
    check(kill(tmp_path, 6, seed=1), 6)


@pytest.mark.soak
@pytest.mark.timeout(14_400)
def test_a_hundred_kills_of_each_change_no_bit(tmp_path: Path) -> None:
    check(kill(tmp_path, 100, seed=int(os.environ.get("HELIOSTAT_SEED", "2"))), 100)

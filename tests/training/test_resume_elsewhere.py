"""A run goes on with other engines and other numbers of workers; with the same ones it goes on bit for bit."""

import json
from pathlib import Path

import pytest
from ranks import SAME, furthest, run_ranks
from safetensors.torch import load_file

COMMON = f"""
import json
from safetensors.torch import save_file
from tiny_training import Log, job, settings, shard, final_files
from heliostat.errors import PreemptedError
from heliostat.training.trainer import Ask
from heliostat.training.run import Watch, run_training
from heliostat.training.world import World
import heliostat.training.loop as loop

SAME = {SAME!r}
seen = []
plain_step = loop.one_step
def one_step(trainer, state, batch):
    seen.append([state.step, list(batch.image_ids)])
    plain_step(trainer, state, batch)
loop.one_step = one_step

def train(name, parallel, stop=0, *words, batch=12):
    config = settings(f"scaling.num_workers={{size}}", f"scaling.parallel={{parallel}}", *SAME,
                      f"train.global_batch_size={{batch}}", "train.checkpoint_every_steps=3", *words)
    log, steps = Log(), [0]
    def asked():
        steps[0] += 1
        return Ask.STOP if rank == size - 1 and steps[0] == stop else Ask.GO_ON
    try:
        work, watch = job(folder / name, config, shard()), Watch(asked=asked)
        run_training(work, World(rank, size), log.report, log.said.append, watch=watch)
    except PreemptedError as error:
        log.said.append(str(error))
    return log
"""

ELSEWHERE = """
parallel, stop = sys.argv[5], int(sys.argv[6])
log = train("run", parallel, stop)
print("said", json.dumps(log.said))
print("seen", json.dumps(seen))
"""

BITWISE = """
for parallel, *words in (("ddp", "method.drop_path_rate=0.3"), ("zero2",), ("zero3", "method.drop_path_rate=0.3")):
    train("whole-" + parallel, parallel, 0, *words)
    train("stopped-" + parallel, parallel, 5, *words)
    log = train("stopped-" + parallel, parallel, 0, *words)
    if rank == 0:
        stopped, whole = (final_files(folder / (name + parallel)) for name in ("stopped-", "whole-"))
        print("bitwise", parallel, json.dumps([stopped == whole, log.said[-1]]))
"""


def lines(printed: str, word: str) -> list[str]:
    return [line.removeprefix(f"{word} ") for line in printed.splitlines() if line.startswith(f"{word} ")]


def test_a_run_moves_through_engines_and_world_sizes_and_ends_as_one_that_stayed(tmp_path: Path) -> None:
    one = run_ranks(COMMON + ELSEWHERE, tmp_path / "one", 1, "none", "0")
    order = dict(json.loads(lines(one[0], "seen")[0]))
    assert sorted(order) == list(range(12))
    done = 0
    for size, parallel, steps in (
        (2, "ddp", 2),
        (1, "none", 2),
        (3, "zero3", 2),
        (2, "zero1", 2),
        (3, "ddp", 1),
        (2, "zero3", 0),
    ):
        printed = run_ranks(COMMON + ELSEWHERE, tmp_path / "moved", size, parallel, str(steps))
        said = json.loads(lines(printed[0], "said")[0])
        if done:
            assert any(line.startswith(f"resuming at step {done} of 12") for line in said), said
        ranks = [json.loads(lines(text, "seen")[0]) for text in printed]
        for parts in zip(*ranks, strict=True):
            step = parts[0][0]
            assert [image for _, ids in parts for image in ids] == order[step], (size, step)
        done += steps
        if steps:
            assert said[-1] == f"stopped at step {done} of 12 with a checkpoint; the same command goes on there"
    for name in ("backbone.safetensors", "heads.safetensors"):
        assert furthest(load_file(tmp_path / "moved/run" / name), load_file(tmp_path / "one/run" / name)) < 1e-5


@pytest.fixture(scope="module")
def bitwise(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    printed = run_ranks(COMMON + BITWISE, tmp_path_factory.mktemp("bitwise"), 2)
    found = [line.partition(" ") for line in lines(printed[0], "bitwise")]
    return {parallel: json.loads(rest) for parallel, _, rest in found}


@pytest.mark.parametrize("parallel", ["ddp", "zero2", "zero3"])
def test_the_same_workers_go_on_bit_for_bit(bitwise: dict[str, list], parallel: str) -> None:
    same, said = bitwise[parallel]
    assert same
    assert said == "resuming at step 5 of 12"

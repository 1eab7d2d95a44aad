"""What Ray Train, the engine and tracking cost beside a bare loop; how long a checkpoint blocks the steps; what a start takes.

    make bench        or: python benchmarks/train_overhead.py [--rounds 3] [--steps 160] [--megabytes 400]

Every side trains the demo's ViT on the same batches: the bare loop (the same method and loader, a dozen lines, no metrics), our
loop in one process, and our loop on Ray Train with an MLflow run and checkpoints. CPU seconds are those between two steps after
the start, of the training process and of the whole process tree. Sides alternate in one run. The gate: all three end with the
same weights, bit for bit.
"""

import argparse
import hashlib
import io
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from results_file import cpu_hardware, today, versions, write_result

from heliostat.config import apply_overrides, validate
from heliostat.data.image_source import ImageSource
from heliostat.data.image_table import image_table
from heliostat.data.photographs import crops as photograph_crops
from heliostat.data.raw_batch import crops_of
from heliostat.data.shard_reader import ShardReader
from heliostat.data.shards import make_shard_image, manifest_rows, write_shard
from heliostat.storage import LocalStore
from heliostat.training.checkpoint_writer import CheckpointWriter
from heliostat.training.engine import clipped_modules
from heliostat.training.method import move_average
from heliostat.training.param_groups import apply_step_values
from heliostat.training.pieces import whole
from heliostat.training.recipe import PretrainConfig
from heliostat.training.run import TrainingJob, build_trainer, run_training
from heliostat.training.run_config import TrainConfig
from heliostat.training.world import World

SHARD = "shards/000000.tar"
SIDES = ("bare", "loop", "ray")
FIRST = 60  # steps before the first mark: imports, allocations and caches are over


def shard_of_crops(count: int) -> bytes:
    """17 * count crops of real photographs as one tar."""
    import cv2

    images = []
    for number, crop in enumerate(photograph_crops("left", count=count, seed=0)):
        _, data = cv2.imencode(".jpg", cv2.cvtColor(crop.pixels, cv2.COLOR_RGB2BGR))
        images.append(make_shard_image(data.tobytes(), "jpg", f"{crop.name}/{number}.jpg", label=crop.name))
    return write_shard(images)


def config_of(steps: int, workers: int, *overrides: str) -> PretrainConfig:
    """The demo's pretrain section for so many steps."""
    from heliostat.runtime.recipe import read_recipe

    section = read_recipe("laptop", ()).pretrain.model_dump(mode="json")
    words = (
        f"train.steps={steps}",
        f"scaling.num_workers={workers}",
        "train.checkpoint_every_steps=100",
        "online.enabled=false",
    )
    return validate(PretrainConfig, apply_overrides(section, (*words, *overrides)), "benchmark")


def job_of(folder: Path, config: PretrainConfig, tar: bytes) -> TrainingJob:
    """The job of one side."""
    images = LocalStore(folder / "images")
    images.put(SHARD, tar)
    return TrainingJob(config, (ImageSource(image_table(manifest_rows(SHARD, tar)), ShardReader(images)),), LocalStore(folder))


def mark(folder: Path, name: str) -> None:
    """Leave the CPU seconds of this process, and the time, under a name."""
    path = folder / f"mark-{name}.json"
    path.with_suffix(".tmp").write_text(json.dumps({"cpu": time.process_time(), "time": time.time()}))
    path.with_suffix(".tmp").replace(path)


@dataclass(frozen=True)
class MarkingRun:
    """A tracker's run that leaves marks at two steps."""

    run: Any
    folder: Path
    last: int
    id: str = ""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self.run.log_metrics(metrics, step)
        if step in (1, FIRST, self.last):
            mark(self.folder, str(step))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.run, name)


@dataclass(frozen=True)
class MarkingTracker:
    """Hands its run's id to the workers, and marks when a worker begins."""

    tracker: Any
    folder: Path
    last: int

    def attach(self, run_id: str, *rest: Any) -> MarkingRun:
        mark(self.folder, "worker")
        return MarkingRun(self.tracker.attach(run_id, *rest), self.folder, self.last, run_id)


def bare(folder: Path, config: PretrainConfig, tar: bytes) -> None:
    """The loop that one would write: no metrics, no checkpoints, no checks."""
    from heliostat.training.loop import _values, seed_step

    made = build_trainer(job_of(folder, config, tar), World(), lambda *_: None, lambda text: None)
    method, optimizer, steps = made.method, made.optimizer, config.train.steps
    for step, batch in enumerate(made.loader.batches(steps)):
        values = _values(made, step)
        seed_step(config.train.seed, step, 0)
        crops = crops_of(batch, config.crops, made.world.device)
        apply_step_values(optimizer.param_groups, values)
        targets = method.teacher_targets(crops, values.teacher_temp)
        losses = method.losses(method.student_outputs(crops), targets, crops)
        method.weighted_sum(losses).backward()
        for module in clipped_modules(method).values():
            torch.nn.utils.clip_grad_norm_(module.parameters(), config.optim.clip_grad or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        method.update_teacher(values.momentum, move_average)
        if step + 1 in (1, FIRST, steps):
            mark(folder, str(step + 1))
    keep(folder, method.teacher.backbone.state_dict())


def keep(folder: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Leave a digest of the teacher's backbone, for the gate."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode() + state[name].detach().contiguous().numpy().tobytes())
    (folder / "weights").write_text(digest.hexdigest())


def loop(folder: Path, config: PretrainConfig, tar: bytes) -> None:
    """Our loop in this process."""
    from heliostat.tracking import NullRun

    run = MarkingRun(NullRun(), folder, config.train.steps)
    run_training(
        job_of(folder, config, tar), World(), lambda metrics, step, model="": run.log_metrics(metrics, step), lambda text: None
    )
    keep_final(folder)


def keep_final(folder: Path) -> None:
    """Leave the digest of the model that a run left."""
    from heliostat.models.stored import read_backbone_files

    backbone, _ = read_backbone_files(LocalStore(folder), "benchmark")
    keep(folder, backbone.state_dict())


def ray(folder: Path, config: PretrainConfig, tar: bytes) -> None:
    """Our loop on Ray Train, with an MLflow run in sqlite and checkpoints."""
    from heliostat.runtime.config import ClusterConfig
    from heliostat.runtime.progress import Progress
    from heliostat.runtime.session import open_session
    from heliostat.runtime.trainer import TrainingRequest, train
    from heliostat.tracking import TrackingConfig, open_tracker

    tracker = open_tracker(TrackingConfig(), LocalStore(folder))
    run = tracker.start("benchmark", config={}, tags={})
    mark(folder, "tracker")
    with open_session(ClusterConfig(address="local", num_cpus=2)):
        mark(folder, "session")
        request = TrainingRequest(
            {"": "model/benchmark@1"},
            job_of(folder, config, tar),
            MarkingTracker(tracker, folder, config.train.steps),
            {"": run.id},
        )
        train(request, {"": run}, Progress(io.StringIO()))
    keep_final(folder)


def tree_cpu(process: psutil.Process) -> float:
    """CPU seconds of a process and of everything below it that still runs."""
    total = 0.0
    for one in [process, *process.children(recursive=True)]:
        try:
            times = one.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def run_side(side: str, steps: int, *overrides: str) -> dict[str, Any]:
    """One side in a process of its own: CPU seconds between the marks, and when each mark was made after the start."""
    with tempfile.TemporaryDirectory(prefix="hsto-", dir="/tmp") as name:
        folder = Path(name)
        began = time.time()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": str(folder)}
        words = [sys.executable, "-W", "ignore", __file__, "--side", side, "--folder", name, "--steps", str(steps), *overrides]
        child = subprocess.Popen(words, env=environment)
        process, trees = psutil.Process(child.pid), {}
        while child.poll() is None:
            for step in (FIRST, steps):
                if step not in trees and (folder / f"mark-{step}.json").exists():
                    trees[step] = tree_cpu(process)
            time.sleep(0.02)
        if child.returncode:
            raise SystemExit(f"side {side} failed with exit status {child.returncode}")
        marks = {path.stem.removeprefix("mark-"): json.loads(path.read_text()) for path in folder.glob("mark-*.json")}
        return {
            "weights": (folder / "weights").read_text(),
            "process": marks[str(steps)]["cpu"] - marks[str(FIRST)]["cpu"] if str(FIRST) in marks else math.nan,
            "tree": trees.get(steps, math.nan) - trees.get(FIRST, math.nan),
            "wall": marks[str(steps)]["time"] - marks[str(FIRST)]["time"] if str(FIRST) in marks else math.nan,
            "after": {name: one["time"] - began for name, one in marks.items()},
        }


def spread(values: list[float], digits: int = 3) -> str:
    """Median, least and greatest."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def overhead_lines(rounds: int, steps: int) -> list[str]:
    """The table of the loops."""
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side in SIDES:
            found[side].append(run_side(side, steps))
    if len({one["weights"] for sides in found.values() for one in sides}) != 1:
        raise SystemExit("the sides end with different weights: no figure is worth anything")
    lines = [
        "| side | CPU ms a step, training process | ratio to bare | whole process tree | ratio to bare |",
        "|---|---|---|---|---|",
    ]
    per_step = 1e3 / (steps - FIRST)
    for side in SIDES:
        own, tree = ([one[key] for one in found[side]] for key in ("process", "tree"))
        ratios = [
            [one[key] / base[key] for one, base in zip(found[side], found["bare"], strict=True)] for key in ("process", "tree")
        ]
        lines.append(
            f"| {side} | {spread([per_step * value for value in own], 1)} | {spread(ratios[0])} | "
            f"{spread([per_step * value for value in tree], 1)} | {spread(ratios[1])} |"
        )
    ray_walls = [one["wall"] for one in found["ray"]]
    return [*lines, "", f"Between the marks Ray's side took {spread(ray_walls, 1)} s of wall time."]


def start_lines(rounds: int) -> list[str]:
    """What a start on Ray is made of."""
    found = [run_side("ray", FIRST + 2, "train.log_every_steps=1")["after"] for _ in range(rounds)]
    parts = {
        "imports, images, MLflow's database": [one["tracker"] for one in found],
        "Ray (ray.init)": [one["session"] - one["tracker"] for one in found],
        "worker group (controller, placement, imports of the worker)": [one["worker"] - one["session"] for one in found],
        "model, loader, first step and its record": [one["1"] - one["worker"] for one in found],
        "all": [one["1"] for one in found],
    }
    return ["| part | seconds |", "|---|---|", *(f"| {name} | {spread(values, 1)} |" for name, values in parts.items())]


def checkpoint_lines(rounds: int, megabytes: int) -> list[str]:
    """Seconds that a step waits for a checkpoint, against torch.save and torch.distributed.checkpoint."""
    import torch.distributed.checkpoint as dcp

    tensors = {f"block.{number}.weight": torch.randn(1024, 1024) for number in range(megabytes // 4)}
    blocked: dict[str, list[float]] = {}
    ended: dict[str, list[float]] = {}
    copying: list[float] = []

    def timed(name: str, start: Callable[[], Callable[[], None]]) -> None:
        began = time.perf_counter()
        finish = start()
        blocked.setdefault(name, []).append(time.perf_counter() - began)
        finish()
        ended.setdefault(name, []).append(time.perf_counter() - began)

    numbers = iter(range(1, 1000))
    here = tempfile.TemporaryDirectory(prefix="hsto-")  # one writer for all rounds, as in a run: it keeps its memory
    writer = CheckpointWriter(LocalStore(Path(here.name)), World(), TrainConfig(keep_last=1), print)

    def ours(folder: Path) -> Callable[[], None]:
        writer.begin(next(numbers), whole(tensors), history=[], rejections=[], state={})
        return writer.wait

    timed("ours, first", lambda: ours(Path(here.name)))

    def plain(folder: Path) -> Callable[[], None]:
        torch.save(tensors, folder / "state.pt")
        return lambda: None

    def distributed(folder: Path) -> Callable[[], None]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(tensors, checkpoint_id=folder / "dcp", no_dist=True)
        return lambda: None

    for _ in range(rounds):
        with tempfile.TemporaryDirectory(prefix="hsto-") as name:
            folder = Path(name)
            began = time.perf_counter()
            copies = [tensor.clone() for tensor in tensors.values()]
            copying.append(time.perf_counter() - began)
            del copies
            timed("ours", lambda: ours(folder))  # noqa: B023
            timed("torch.save", lambda: plain(folder))  # noqa: B023
            timed("DCP save", lambda: distributed(folder))  # noqa: B023
    lines = [
        "| way | blocks a step, s | on disk after, s | blocking / torch.save | blocking / copy in memory |",
        "|---|---|---|---|---|",
    ]
    first = blocked.pop("ours, first")[0]
    for name, values in blocked.items():
        ratios = [one / other for one, other in zip(values, blocked["torch.save"], strict=True)]
        limits = [one / other for one, other in zip(values, copying, strict=True)]
        lines.append(f"| {name} | {spread(values)} | {spread(ended[name])} | {spread(ratios)} | {spread(limits, 2)} |")
    return [
        *lines,
        "",
        f"A copy in memory of the same {megabytes} MB: {spread(copying)} s. Ours hashes every piece while it writes; "
        f"the first checkpoint of a run, which allocates its memory, blocked {first:.3f} s.",
    ]


def main() -> None:
    """All sides, then one result file; or one side, as a child of that."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--side", choices=SIDES)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("overrides", nargs="*")
    asked = parser.parse_args()
    if asked.side:
        torch.set_num_threads(1)
        config = config_of(asked.steps, 1 if asked.side == "ray" else 0, *asked.overrides)
        {"bare": bare, "loop": loop, "ray": ray}[asked.side](asked.folder, config, shard_of_crops(12))
        return
    lines = [
        f"# Training beside a bare loop, {today()}",
        "",
        f"    python benchmarks/train_overhead.py --rounds {asked.rounds} --steps {asked.steps} --megabytes {asked.megabytes}",
        "",
        f"{versions()}. Medians of {asked.rounds} rounds (least to greatest); sides alternate. The machine is shared: CPU "
        "seconds hold, wall times are upper bounds.",
        "",
        f"## Steps {FIRST} to {asked.steps} of the demo's pretraining",
        "",
        *overhead_lines(asked.rounds, asked.steps),
        "",
        "The whole tree of Ray's side holds the driver, Ray's own processes, the controller of Ray Train and the relay.",
        "",
        "## A start on Ray, one worker, to the record of the first step",
        "",
        *start_lines(asked.rounds),
        "",
        f"## A checkpoint of {asked.megabytes} MB",
        "",
        *checkpoint_lines(max(asked.rounds, 5), asked.megabytes),
    ]
    write_result("train_overhead", lines, cpu_hardware())


if __name__ == "__main__":
    main()

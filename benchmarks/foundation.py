"""Measures what docs/performance.md states: start-up, loader, training step, shard reading. Writes benchmarks/results/.

    make bench

Every figure is the median of repeated runs, with the spread (min to max) beside it. CPU seconds are those of this process;
the machine may be shared, so compare figures of one run only.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from results_file import cpu_hardware, today, versions, write_result

from heliostat.config import validate
from heliostat.data.image_source import ImageSource
from heliostat.data.image_table import image_table
from heliostat.data.packing import Packing, pack_files
from heliostat.data.photographs import write_crops
from heliostat.data.shard_reader import ShardReader
from heliostat.data.shards import index_shard
from heliostat.data.sources import open_source
from heliostat.runtime.recipe import read_recipe
from heliostat.storage import LocalStore
from heliostat.training import loop
from heliostat.training.recipe import PretrainConfig
from heliostat.training.run import TrainingJob, build_trainer
from heliostat.training.world import World

REPEATS = 5


def measured(work: Callable[[], int]) -> tuple[float, float, float]:
    """Median, minimum and maximum of units per CPU second; `work` returns its units."""
    rates = []
    for _ in range(REPEATS):
        started = time.process_time()
        units = work()
        rates.append(units / max(time.process_time() - started, 1e-9))
    return statistics.median(rates), min(rates), max(rates)


def help_seconds() -> tuple[float, float, float]:
    """Wall seconds of `heliostat --help`."""
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "heliostat", "--help"], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), min(seconds), max(seconds)


def main() -> None:
    """Run everything and write one result file."""
    torch.set_num_threads(1)
    rows = [("`heliostat --help`", "s wall", help_seconds())]
    with tempfile.TemporaryDirectory() as folder:
        write_crops(Path(folder) / "images", "left", count=30, seed=0)
        source = open_source(str(Path(folder) / "images"))
        store = LocalStore(Path(folder) / "store")
        manifest = pack_files(source.store, source.files, 0, Packing(), store.put).rows
        tar = store.read("shards/000000.tar")
        rows.append(("index a shard (hash of every image)", "images per CPU s", measured(lambda: len(index_shard(tar)))))
        demo = read_recipe("laptop").pretrain
        assert demo is not None
        plain = demo.model_dump(mode="json")
        plain["scaling"]["num_workers"], plain["loader"]["workers"] = 0, 0
        config = validate(PretrainConfig, plain, "benchmark")
        job = TrainingJob(config, (ImageSource(image_table(manifest), ShardReader(store)),), store.child("run"))
        trainer = build_trainer(job, World(), lambda metrics, step: None, print)
        batch_size = config.train.global_batch_size
        list(trainer.loader.batches(8))  # fills the cache of decoded images
        loading = measured(lambda: sum(batch_size for _ in trainer.loader.batches(4)))
        rows.append(("demo loader: crops of cached images", "images per CPU s", loading))
        state = loop.LoopState()
        training = measured(
            lambda: sum(loop.one_step(trainer, state, batch) or batch_size for batch in trainer.loader.batches(4))
        )
        rows.append(("demo training step, loader included", "images per CPU s", training))
    write_results(rows)


def write_results(rows: list[tuple[str, str, tuple[float, float, float]]]) -> None:
    """Print the table and keep it."""
    lines = [
        f"# Foundation, {today()}",
        "",
        f"{versions()}. Command: `make bench`. Median of {REPEATS} (10 for start-up), spread in brackets.",
        "",
        "| what | figure | unit |",
        "|---|---|---|",
    ]
    lines += [f"| {what} | {median:.4g} ({low:.4g} to {high:.4g}) | {unit} |" for what, unit, (median, low, high) in rows]
    write_result("foundation", lines, cpu_hardware())


if __name__ == "__main__":
    main()

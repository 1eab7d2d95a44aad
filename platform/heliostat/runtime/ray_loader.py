"""The other way of images into a training worker: Ray Data reads, decodes and crops them on any node of the cluster.

The global sequence does not depend on the number of workers. So data worker a of A that serves rank r of W is an `ImageLoader`
of rank r * A + a in a world of W * A: its slices, laid side by side, are the batch that the rank's own threads would have made.
A data worker is one read task of a Ray Data stream of its own, which yields a block for each step. Blocks wait in the object
store; Ray Data's back-pressure bounds their bytes.

A data worker that is lost is not retried by Ray, which would begin its stream anew: the training worker opens another stream at
the step that it needs. What was measured: docs/decisions/0011-ray-data-ingest.md.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import ray
import ray.data
import torch
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from heliostat.data.batch import Batch
from heliostat.data.batch_arrays import CropArrays, new_crop_arrays
from heliostat.data.loader_counts import LoaderCounts, LoaderStatistics
from heliostat.data.loading import Loading
from heliostat.data.position import Position
from heliostat.data.quarantine import Rejection
from heliostat.errors import ClusterError, HeliostatError
from heliostat.runtime.ray_blocks import Slice, error_block, from_block, num_patches, slice_bytes, to_block

_MOST_LOSSES = 5  # data workers lost in a row at one step before the cluster, not chance, is at fault
_JOINED_AHEAD = 2  # the batch that is waited for, and one that is joined while the training worker computes


@dataclass(frozen=True)
class _DataWorker:
    """What a read task needs: its place, and where the images are described; `loading` itself has no sources."""

    loading: Loading
    sources: "ray.ObjectRef"
    rank: int
    world_size: int

    def blocks(self, first: int, num_steps: int, state: dict[str, Any]) -> Iterator[pa.Table]:
        """A block for each step from `first` on; an error of ours is the last block."""
        try:
            loading = replace(self.loading, sources=ray.get(self.sources))
            loader = loading.image_loader(self.rank, self.world_size, pinned=False)
            loader.load_state_dict(state)
            num_bytes = 0
            with closing(loader.batches(num_steps)) as batches:
                for step, batch in enumerate(batches, start=first):
                    before, num_bytes = num_bytes, loader.statistics().bytes
                    yield to_block(step, batch, loader.take_rejections(), num_bytes - before)
        except HeliostatError as error:
            yield error_block(error)


class _Crops(Datasource):  # type: ignore[misc]
    """The blocks of one data worker, as one read task."""

    def __init__(self, read: Callable[[], Iterator[pa.Table]]) -> None:
        self._read = read

    def estimate_inmemory_data_size(self) -> None:
        """Unknown before it is read."""

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """The one task, however many are asked for."""
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(self._read, unknown)]


@dataclass
class _Stream:
    """The slices of one data worker, in order; opened again at the step that is needed when the worker is lost."""

    worker: _DataWorker
    stop: int
    order: str
    notify: Callable[[str], None]
    _blocks: Iterator[pa.Table] | None = None
    _executor: Any = None
    _is_closed: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, step: int) -> Slice:
        """The slice of a step; steps rise by one. Raises what the data worker raised, ClusterError when it is lost often."""
        for _ in range(_MOST_LOSSES):
            try:
                block, reason = next(self.open(step), None), "its stream ended"
            except ray.exceptions.RayTaskError:
                raise  # an error of the code itself would come again
            except ray.exceptions.RayError as error:
                block, reason = None, type(error).__name__
            if block is not None:
                return from_block(block)
            self._end()
            if not self._is_closed:
                self.notify(f"data worker {self.worker.rank} was lost before step {step} ({reason}); another one goes on there")
        raise ClusterError(
            f"data worker {self.worker.rank} was lost {_MOST_LOSSES} times in a row before step {step}; look at the memory of "
            "the nodes that it runs on, lower loader.workers, or use loader.via=threads"
        )

    def open(self, step: int) -> Iterator[pa.Table]:
        """The blocks from `step` on; starts the data worker unless it runs."""
        with self._lock:
            if self._is_closed:
                raise ClusterError("the data workers were stopped")
            if self._blocks is None:
                dataset = self._stream(step)
                # iter_batches shows its executor only after the first block, too late for close.
                create = dataset._create_executor

                def remembered() -> Any:
                    self._executor = create()
                    return self._executor

                dataset._create_executor = remembered
                self._blocks = iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))
            return self._blocks

    def _stream(self, step: int) -> Any:
        worker, stop = self.worker, self.stop
        loading, loader = worker.loading, worker.loading.loader
        state = Position(self.order, loading.global_batch_size, step).state_dict()
        waiting_bytes = loader.prefetch_batches * slice_bytes(loading, loading.global_batch_size // worker.world_size)
        with ray.data.DataContext.current(_context(waiting_bytes)):
            return ray.data.read_datasource(
                _Crops(lambda: worker.blocks(step, stop - step, state)),
                override_num_blocks=1,
                num_cpus=loader.cpus_of_data_worker,
                resources=loader.ray_resources or None,
                ray_remote_args={"max_retries": 0},
            )

    def _end(self) -> None:
        with self._lock:
            self._blocks, executor = None, self._executor
        if executor is not None:
            executor.shutdown(force=True)  # at once, whoever waits for a block; closing the iterator only works between blocks

    def close(self) -> None:
        """End the data worker; a `take` that waits in another thread ends as well. May be called again."""
        self._is_closed = True
        self._end()


def _close(streams: Sequence[_Stream], waiting: Collection[Future[Any]]) -> None:
    """Close the streams until nobody waits for them: one that was just being opened is closed in the next round."""
    while True:
        for stream in streams:
            stream.close()
        if all(future.done() for future in waiting):
            return
        time.sleep(0.05)


def _context(waiting_bytes: int) -> Any:
    """Ray Data's settings for a stream of blocks that are passed on as they are."""
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # a lost worker is told by us, in one line
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = 1  # a block is never joined with the next one
    context.memory_usage_poll_interval_s = None
    context.execution_no_progress_timeout_s = -1  # a training worker that writes a checkpoint may take its time
    limits = context.execution_options.resource_limits
    context.execution_options.resource_limits = limits.copy(object_store_memory=waiting_bytes)
    return context


class RayLoader:
    """Batches of one rank from its data workers; interchangeable with `ImageLoader` at any step."""

    def __init__(
        self,
        loading: Loading,
        sources: "ray.ObjectRef",
        *,
        rank: int,
        world_size: int,
        notify: Callable[[str], None],
        start_timeout_seconds: float,
    ) -> None:
        """Assign; nothing is read yet.

        sources: `loading.sources`, put once for all ranks. notify takes what a person should know. Raises what `ImageLoader`
        raises for a batch that cannot be divided.
        """
        self._num_workers = loading.loader.ray_workers
        first = loading.image_loader(rank * self._num_workers, world_size * self._num_workers)
        self._order = str(first.state_dict()["order"])
        self._position = Position(self._order, loading.global_batch_size)
        self._loading, self._sources = replace(loading, sources=()), sources
        self._rank, self._world_size = rank, world_size
        self._notify, self._start_timeout_seconds = notify, start_timeout_seconds
        self._batch_size = loading.global_batch_size // world_size
        self._counts = LoaderCounts()

    def state_dict(self) -> dict[str, Any]:
        """As of `ImageLoader`."""
        return self._position.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As of `ImageLoader`."""
        self._position.load_state_dict(state)

    def statistics(self) -> LoaderStatistics:
        """What arrived so far; callable at any time from any thread."""
        return self._counts.statistics()

    def take_rejections(self) -> list[Rejection]:
        """What was turned away in the batches that were handed out since the last call."""
        return self._counts.take_rejections()

    def batches(self, num_steps: int) -> Generator[Batch, None, None]:
        """Yield the next `num_steps` batches; closing the iterator ends the data workers.

        Raises ClusterError when no data worker can be placed in time, or one is lost again and again.
        """
        first = self._position.next_step
        stop = first + num_steps
        streams = [self._stream(number, stop) for number in range(self._num_workers)]
        pool = ThreadPoolExecutor(1, thread_name_prefix="heliostat-ray-loader")
        readers = ThreadPoolExecutor(len(streams), thread_name_prefix="heliostat-ray-loader-stream")
        waiting: deque[Future[tuple[CropArrays, list[Slice]]]] = deque()
        try:
            for step in range(first, stop):
                for ahead in range(step + len(waiting), min(step + _JOINED_AHEAD, stop)):
                    waiting.append(pool.submit(self._joined, streams, ahead, readers))
                arrays, slices = self._wait_for(waiting[0], is_first=step == first)
                waiting.popleft()
                yield self._handed_out(step, arrays, slices)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            _close(streams, waiting)
            readers.shutdown(wait=True, cancel_futures=True)

    def _stream(self, number: int, stop: int) -> _Stream:
        rank, world_size = self._rank * self._num_workers + number, self._world_size * self._num_workers
        return _Stream(_DataWorker(self._loading, self._sources, rank, world_size), stop, self._order, self._notify)

    def _joined(self, streams: list[_Stream], step: int, readers: ThreadPoolExecutor) -> tuple[CropArrays, list[Slice]]:
        """The slices of a step laid into one batch; their blocks are free again afterwards."""
        pinned = torch.cuda.is_available()
        arrays = new_crop_arrays(self._batch_size, self._loading.crops, num_patches(self._loading), pinned=pinned)

        def lay(number: int) -> Slice:
            one = streams[number].take(step)
            if one.step != step:
                raise ClusterError(f"data worker {streams[number].worker.rank} gave step {one.step} where {step} was due")
            arrays.write_slice(number * len(one.image_ids), one.crops_and_masks, one.image_ids)
            return replace(one, crops_and_masks=())

        return arrays, list(
            readers.map(lay, range(len(streams)))
        )  # in threads: a stream starts when its first block is asked for

    def _wait_for(self, joined: Future[tuple[CropArrays, list[Slice]]], *, is_first: bool) -> tuple[CropArrays, list[Slice]]:
        began = time.perf_counter()
        try:
            return joined.result(self._start_timeout_seconds if is_first else None)
        except TimeoutError as error:
            cpus = self._loading.loader.cpus_of_data_worker
            raise ClusterError(
                f"no batch came from {self._num_workers} data workers in {self._start_timeout_seconds:g} s; each needs {cpus} "
                "free CPUs (loader.workers) and its loader.ray_resources; add nodes, lower these, or raise "
                "scaling.start_timeout_seconds"
            ) from error
        finally:
            self._counts.add(data_wait_seconds=time.perf_counter() - began)

    def _handed_out(self, step: int, arrays: CropArrays, slices: list[Slice]) -> Batch:
        self._counts.add(images=self._batch_size)
        for one in slices:
            self._counts.add(num_bytes=one.num_bytes, rejections=one.rejections)
        self._position.next_step = step + 1
        return arrays.batch()

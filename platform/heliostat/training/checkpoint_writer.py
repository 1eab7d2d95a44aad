"""Writes checkpoints beside the training steps: the ranks go on as soon as their tensors are copied.

Each rank hashes and writes its own shard in a thread. Between steps the ranks tell each other whether they are done; when all
are, the main rank writes the manifest, which makes the checkpoint visible.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from heliostat.data.quarantine import Rejection
from heliostat.errors import HeliostatError, StorageError
from heliostat.storage import Store
from heliostat.training.checkpoint import commit, complete_steps, prune, write_history, write_rejections, write_shard
from heliostat.training.pieces import Piece
from heliostat.training.run_config import TrainConfig
from heliostat.training.world import World

_LONGEST_PAUSE_SECONDS = 60.0


@dataclass(frozen=True)
class Snapshot:
    """What one rank writes for one step. Values are on the CPU and nobody changes them."""

    step: int
    pieces: Sequence[Piece]
    history: Sequence[Mapping[str, Any]]
    rejections: Sequence[Rejection]
    state: Mapping[str, Any]


class CheckpointWriter:
    """The writer of one rank. Every rank calls the same methods at the same steps.

    start: the step whose checkpoint the run goes on from, 0 for none. Complete ones of later steps were passed over as damaged.
    """

    def __init__(
        self, files: Store, world: World, train: TrainConfig, notify: Callable[[str], None], *, start: int = 0
    ) -> None:
        self._files, self._world, self._train, self._notify = files, world, train, notify
        self._damaged = {step for step in complete_steps(files) if step > start} if world.is_main else set()
        self._thread: threading.Thread | None = None
        self._pending: Snapshot | None = None
        self._is_committing = False
        self._error: BaseException | None = None
        self._failed: Snapshot | None = None
        self._buffers: dict[tuple[str, int], Tensor] = {}

    def begin(
        self,
        step: int,
        pieces: Sequence[Piece],
        *,
        history: Sequence[Mapping[str, Any]],
        rejections: Sequence[Rejection],
        state: Mapping[str, Any],
    ) -> None:
        """Copy the pieces to the host, which is all that a step waits for, and write them in the background.

        Waits for the checkpoint before. History that could not be written with that one goes along.
        """
        self.wait()
        if self._failed is not None:
            history, rejections = (*self._failed.history, *history), (*self._failed.rejections, *rejections)
            self._failed = None
        copies = [replace(piece, values=self._host_copy(piece)) for piece in pieces]
        if self._world.device.type == "cuda":
            torch.cuda.synchronize(self._world.device)
        self._write_again(Snapshot(step, copies, tuple(history), tuple(rejections), dict(state)))

    def _write_again(self, snapshot: Snapshot) -> None:
        self._pending, self._is_committing = snapshot, False
        self._start(self._write, snapshot)

    def _host_copy(self, piece: Piece) -> Tensor:
        """The values in memory that is kept for the next checkpoint: fresh pages cost as much again as the copy (measured)."""
        key, values = (piece.name, piece.start), piece.values.detach()
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != values.shape or buffer.dtype != values.dtype:
            buffer = self._buffers[key] = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
        return buffer.copy_(values, non_blocking=True)

    def _start(self, work: Callable[[Snapshot], None], snapshot: Snapshot) -> None:
        def run() -> None:
            try:
                work(snapshot)
            except BaseException as error:  # noqa: BLE001  (told to all ranks by `settle`)
                self._error = error

        self._error = None
        self._thread = threading.Thread(target=run, daemon=True, name="heliostat-checkpoint")
        self._thread.start()

    def _write(self, snapshot: Snapshot) -> None:
        write_rejections(self._files, snapshot.step, self._world.rank, list(snapshot.rejections))
        write_shard(self._files, snapshot.step, self._world.rank, snapshot.pieces)
        if self._world.is_main:
            write_history(self._files, snapshot.step, [dict(row) for row in snapshot.history])

    def _commit(self, snapshot: Snapshot) -> None:
        if self._world.is_main:
            commit(self._files, snapshot.step, self._world.size, snapshot.state)
            self._damaged.discard(snapshot.step)
            keep_last, keep_every = self._train.keep_last, self._train.keep_every
            prune(self._files, snapshot.step, damaged=self._damaged, keep_last=keep_last, keep_every=keep_every)

    def flags(self) -> list[bool]:
        """[this rank has ended its part of what is going on, it went well], for the ranks' agreement between two steps."""
        return [self._thread is not None and not self._thread.is_alive(), self._error is None]

    def settle(self, all_ended: bool, all_well: bool) -> None:
        """Take note of what the ranks agreed on: shards, then the manifest, then nothing is pending any more."""
        if self._pending is None or not all_ended:
            return
        if all_well and not self._is_committing:
            self._is_committing = True
            self._start(self._commit, self._pending)
            return
        snapshot, self._pending = self._pending, None
        if all_well:
            return
        self._failed = snapshot
        if self._error is not None and not isinstance(self._error, HeliostatError | OSError):
            raise self._error
        if self._error is not None or self._world.is_main:
            reason = self._error or "another rank could not write its shard"
            self._notify(
                f"the checkpoint of step {snapshot.step} could not be written: {reason}; training goes on, the next one holds "
                "everything"
            )

    def wait(self) -> None:
        """Wait until a pending checkpoint is settled on all ranks."""
        while self._pending is not None:
            if self._thread is not None:
                self._thread.join()
            self.settle(*self._world.agree(self.flags()))

    def abandon(self) -> None:
        """After an error: let what is being written end, and without other ranks to ask commit it too."""
        while self._pending is not None and self._thread is not None:
            self._thread.join()
            if self._world.size > 1:
                return
            self.settle(*self.flags())

    def finish(self, deadline_seconds: float) -> None:
        """Wait for the last checkpoint; one that cannot be written is tried again until the deadline, then StorageError."""
        self.wait()
        started, pause = time.monotonic(), 1.0
        while self._failed is not None:
            late = time.monotonic() - started > deadline_seconds
            if not self._world.agree([not late])[0]:
                raise StorageError(
                    f"the checkpoint of step {self._failed.step} could not be written for {deadline_seconds:g} s "
                    f"(train.storage_patience_seconds); make room or bring {self._files.uri} back and run the command again"
                )
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
            again, self._failed = self._failed, None
            self._write_again(again)
            self.wait()


@contextmanager
def abandoned_on_error(writer: CheckpointWriter) -> Iterator[None]:
    """Leave no thread behind that writes, whatever ends the body."""
    try:
        yield
    except BaseException:
        writer.abandon()
        raise

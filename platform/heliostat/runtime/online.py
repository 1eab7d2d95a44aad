"""Evaluation while training: the teacher of every evaluation point is judged beside the training, which goes on at once.

    teacher/step-00000100/pca.png        images above, their patch tokens' principal components below
    teacher/step-00000100/pca.npy        the colours of the patches, for the next picture to agree with
    teacher/step-00000100/metrics.json   what was found, written last: a point that has it is not evaluated again

Points wait in a queue of the main rank; a thread hands them one after the other to an evaluator: an actor under Ray, this
process without. What the evaluator finds is a function of weights and images alone, so a resumed run leaves the same files.
"""

import io
import json
import queue
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np

from heliostat.errors import ObjectNotFoundError
from heliostat.evaluation.online import OnlineImages, Pixels, evaluate_online
from heliostat.models.stored import MODEL_JSON, read_backbone_files
from heliostat.runtime.online_images import OnlineDraw, decode_drawn
from heliostat.storage import Store
from heliostat.tracking import Run
from heliostat.training.teacher_files import FOLDER, METRICS, folder_of, step_of
from heliostat.training.trainer import Evaluate, Report, leave_unevaluated

PICTURE = "pca.png"
COLORS = "pca.npy"
_BEHIND = 2  # points that wait when a new one comes: the evaluations are slower than the training


class Evaluator(Protocol):
    """Judges the teacher of one evaluation point."""

    def prepare(self) -> list[str]:
        """Load the images; returns lines to tell. Raises DataError, StorageError or ClusterError."""

    def evaluate(self, step: int, files: Store, before: Store | None) -> dict[str, float]:
        """Metrics of the weights in `files`, where the picture is put; `before` is the folder of the point before."""

    def close(self) -> None:
        """Give its resources back."""


class LocalEvaluator:
    """An evaluator in this process."""

    def __init__(self, draw: OnlineDraw, device: str = "cpu") -> None:
        self._draw, self._device = draw, device
        self._images: OnlineImages | None = None

    def prepare(self) -> list[str]:
        notes: list[str] = []
        self._load(notes.append)
        return notes

    def _load(self, notify: Callable[[str], None]) -> OnlineImages:
        if self._images is None:
            self._images = decode_drawn(self._draw, notify)
        return self._images

    def evaluate(self, step: int, files: Store, before: Store | None) -> dict[str, float]:
        images = self._load(_told_already)  # a restarted actor has lost them
        backbone, info = read_backbone_files(files, f"the teacher of step {step}")
        earlier = _read_colors(before) if before is not None else None
        result = evaluate_online(backbone.to(self._device), info, images, before_T3=earlier)
        if result.picture:
            files.put(PICTURE, result.picture)
            files.put(COLORS, _colors_to_bytes(result.colors_T3))
        return result.metrics

    def close(self) -> None:
        self._images = None


def _told_already(line: str) -> None:
    """What was left out was said when the images were loaded for the first time."""


def _colors_to_bytes(colors_T3: Pixels) -> bytes:
    sink = io.BytesIO()
    np.save(sink, colors_T3)
    return sink.getvalue()


def _read_colors(files: Store) -> Pixels | None:
    """The colours of an earlier picture; None where none was made."""
    try:
        return np.asarray(np.load(io.BytesIO(files.read(COLORS)), allow_pickle=False), np.uint8)
    except ObjectNotFoundError:
        return None


@dataclass(frozen=True)
class _Point:
    """The teacher of one network after `step` steps. The order is that of the steps: a picture agrees with the one before."""

    step: int
    model: str
    files: Store


class OnlineEvaluation:
    """An `Evaluate` of the training loop: queues the point and returns. A context manager that waits for all points at its end.

    outputs: where each network's files go, by name. report: receives metrics with the step of their weights, in a thread of
    this class. runs: the tracker's run of each network, which receives the pictures. Evaluation points of an interrupted run
    that have no metrics.json yet are taken up first.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        outputs: Mapping[str, Store],
        *,
        runs: Mapping[str, Run],
        report: Report,
        notify: Callable[[str], None],
    ) -> None:
        self._evaluator, self._outputs, self._runs = evaluator, outputs, runs
        self._report, self._notify = report, notify
        self._queue: queue.Queue[_Point | None] = queue.Queue()
        self._seen: set[tuple[str, int]] = set()
        self._failures = dict.fromkeys(outputs, 0)
        self._is_behind = self._is_abandoned = False
        self._thread = threading.Thread(target=self._work, daemon=True, name="heliostat-evaluation")

    def __enter__(self) -> Self:
        for point in self._left_over():
            self._add(point)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._is_abandoned = error is not None  # points that wait are taken up when the run is resumed
        self._queue.put(None)
        if error is None:
            self.finish()
        else:
            self._evaluator.close()

    def __call__(self, model: str, step: int, files: Store) -> None:
        """Have the weights in `files` evaluated; returns at once. A point that is known or has its metrics is left alone."""
        self._add(_Point(step, model, files))

    def finish(self) -> None:
        """Wait for every evaluation that was asked for."""
        waiting = self._queue.qsize() - 1
        if waiting > 0:
            self._notify(f"waiting for {waiting} evaluation{'s' if waiting > 1 else ''} of the teacher")
        self._thread.join()

    def _add(self, point: _Point) -> None:
        if (point.model, point.step) in self._seen:
            return
        self._seen.add((point.model, point.step))
        if self._queue.qsize() >= _BEHIND * len(self._outputs) and not self._is_behind:
            self._is_behind = True
            self._notify(
                f"step {point.step}: {self._queue.qsize()} evaluations wait, they are slower than the training; none is lost, "
                "raise online.every_steps, lower online.max_images or give them a GPU by online.num_gpus"
            )
        self._queue.put(point)

    def _left_over(self) -> list[_Point]:
        """Points of an interrupted run whose weights are complete and that nobody evaluated, in the order of their steps."""
        points = []
        for model, output in self._outputs.items():
            there = {entry.key for entry in output.list(FOLDER)}
            for key in there:
                folder, _, name = key.rpartition("/")
                step = step_of(folder)
                if name == MODEL_JSON and step is not None and f"{folder}/{METRICS}" not in there:
                    points.append(_Point(step, model, output.child(folder)))
        return sorted(points, key=lambda point: (point.step, point.model))

    def _work(self) -> None:
        """The thread: one point after the other. Nothing that happens here ends the training."""
        is_ready = False
        while (point := self._queue.get()) is not None and not self._is_abandoned:
            try:
                if not is_ready:
                    for line in self._evaluator.prepare():
                        self._notify(line)
                    is_ready = True
                self._evaluate(point)
            except Exception as error:  # noqa: BLE001  (counted and told; the training does not depend on it)
                if not self._is_abandoned:
                    self._fail(point, error)
        self._evaluator.close()

    def _evaluate(self, point: _Point) -> None:
        """Metrics are written last: until then the point is evaluated again by a resumed run."""
        if point.files.size(METRICS) is not None:
            return
        metrics = self._evaluator.evaluate(point.step, point.files, self._before(point))
        if self._is_abandoned:
            return
        self._report({**metrics, "online/failures": float(self._failures[point.model])}, point.step, point.model)
        if point.files.size(PICTURE) is not None:
            self._log_picture(point)
        point.files.put(METRICS, (json.dumps(metrics, indent=1, sort_keys=True) + "\n").encode())

    def _before(self, point: _Point) -> Store | None:
        """The folder of the newest earlier point of the same network that has a picture."""
        output = self._outputs[point.model]
        folders = [entry.key.removesuffix(f"/{COLORS}") for entry in output.list(FOLDER) if entry.key.endswith(f"/{COLORS}")]
        earlier = [folder for folder in folders if folder < folder_of(point.step)]
        return output.child(max(earlier)) if earlier else None

    def _log_picture(self, point: _Point) -> None:
        with tempfile.TemporaryDirectory(prefix="heliostat-online-") as folder:
            path = Path(folder) / f"pca-step-{point.step:08d}.png"
            path.write_bytes(point.files.read(PICTURE))
            self._runs[point.model].log_file(path, "online")

    def _fail(self, point: _Point, error: Exception) -> None:
        self._failures[point.model] += 1
        name = f"{point.model}: " if point.model else ""
        cause = " ".join(str(error).split())[-300:] or type(error).__name__
        self._notify(f"{name}evaluation of step {point.step} failed, the training goes on: {cause}")
        try:
            self._report({"online/failures": float(self._failures[point.model])}, point.step, point.model)
        except Exception as unreported:  # noqa: BLE001  (the tracker may be what failed)
            self._notify(f"{name}the failure could not be recorded: {' '.join(str(unreported).split())[:300]}")


@contextmanager
def open_evaluation(
    make_evaluator: Callable[[OnlineDraw], Evaluator],
    draw: OnlineDraw | None,
    outputs: Mapping[str, Store],
    *,
    runs: Mapping[str, Run],
    report: Report,
    notify: Callable[[str], None],
) -> Iterator[Evaluate]:
    """What the main rank gives to `run_training` as `evaluate`, for as long as the block lasts; no draw evaluates nothing."""
    if draw is None:
        yield leave_unevaluated
        return
    with OnlineEvaluation(make_evaluator(draw), outputs, runs=runs, report=report, notify=notify) as evaluation:
        yield evaluation

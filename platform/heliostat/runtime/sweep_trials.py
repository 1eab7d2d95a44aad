"""What is known of the trials of a sweep: the files that tell it, and the trials as models to judge.

trials/000/trial.json, model.json, backbone.safetensors ...   a trial that finished or was stopped, trial.json written last
trials/000/teacher/step-00000050/metrics.json                 what its evaluations found
trials.json                                                   the table
_work/points/000.json                                         the settings that a trial was given, before it runs
_work/trials/000/...                                          its checkpoints and its metric by step
_work/failures/000.json                                       why it failed
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

from heliostat.artifacts import Artifact
from heliostat.errors import ObjectExistsError, ObjectNotFoundError
from heliostat.evaluation.judge import Candidate
from heliostat.models.stored import BACKBONE, MODEL_JSON, read_backbone_files
from heliostat.runtime.sweep_points import SEED, Point, short
from heliostat.storage import Store, read_json
from heliostat.training.checkpoint import FOLDER as CHECKPOINTS
from heliostat.training.teacher_files import FOLDER

TRIALS = "trials.json"
RECORD = "trial.json"
_CURVE = "curve.json"
_FORGET = "remove it: the trial runs again"

Curve = list[tuple[int, float]]
"""The metric that trials are compared by, as (step, value) in rising order of steps."""


@dataclass(frozen=True)
class Trial:
    """How one trial ended: at its last step, stopped by comparison with others, or with an error.

    `value` is the sweep's metric at `step`; None where a failed trial has none.
    """

    name: str
    overrides: dict[str, Any]
    status: Literal["finished", "stopped", "failed"]
    step: int
    value: float | None = None
    label: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    curve: Curve = field(default_factory=list)
    error: str = ""

    @property
    def point(self) -> Point:
        """The settings of the trial."""
        return Point(int(self.name), self.overrides, self.label)


def trial_files(files: Store, index: int) -> Store:
    """Where a trial's model goes. `files`: of the sweep."""
    return files.child(f"trials/{index:03d}")


def trial_scratch(files: Store, index: int) -> Store:
    """Where a trial's checkpoints are: apart from its model, for a stopped one may still write some when it is recorded."""
    return files.child(f"_work/trials/{index:03d}")


def write_point(files: Store, point: Point, run_id: str) -> None:
    """Keep the settings of a trial and its tracker's run, before it starts."""
    text = json.dumps({"overrides": dict(point.overrides), "step": point.step, "run_id": run_id})
    files.put(f"_work/points/{point.name}.json", text.encode())


def read_points(files: Store) -> dict[int, tuple[Point, str]]:
    """The settings that trials were given so far, with their runs, by number."""
    found = {}
    for entry in files.list("_work/points/"):
        index = _number_of(entry.key)
        if index is not None:
            fix = "remove it: the same settings are drawn again, with another run in the tracker"
            found[index] = read_json(files, entry.key, partial(_point_of, index), fix)
    return found


def _number_of(key: str) -> int | None:
    """The trial that a file below `_work/` belongs to; None for a file that a sweep did not write."""
    stem = key.rpartition("/")[2].removesuffix(".json")
    return int(stem) if stem.isascii() and stem.isdigit() else None


def _point_of(index: int, plain: Any) -> tuple[Point, str]:
    return Point(index, dict(plain["overrides"]), plain["step"]), str(plain["run_id"])


def write_trial(files: Store, trial: Trial) -> bool:
    """Record how a trial ended, once: False when it was recorded before, and the earlier record stays."""
    try:
        trial_files(files, int(trial.name)).put(RECORD, trial_bytes([trial])[2:-2], overwrite=False)
    except ObjectExistsError:
        return False
    return True


def read_trial(files: Store, index: int) -> Trial | None:
    """How a trial ended; None while it has not finished and was not stopped."""
    try:
        fix = "remove it: the trial goes on from its checkpoint, or runs again"
        return read_json(trial_files(files, index), RECORD, _trial, fix)
    except ObjectNotFoundError:
        return None


def _trial(plain: Mapping[str, Any]) -> Trial:
    return Trial(**{**plain, "curve": _curve_of(plain["curve"])})


def _curve_of(plain: Any) -> Curve:
    return [(int(step), float(value)) for step, value in plain]


def trial_bytes(trials: Sequence[Trial]) -> bytes:
    """The table as JSON, one trial a line."""
    return ("[\n" + ",\n".join(json.dumps(asdict(trial)) for trial in trials) + "\n]").encode()


def write_curve(files: Store, index: int, curve: Curve) -> None:
    """Keep the metric of a running trial by step: after an interruption it is compared as if there had been none."""
    trial_scratch(files, index).put(_CURVE, json.dumps(curve).encode())


def read_curve(files: Store, index: int) -> Curve:
    """What `write_curve` kept; empty for a trial that begins."""
    try:
        fix = "remove it: the trial is compared by what it reaches from here on"
        return read_json(trial_scratch(files, index), _CURVE, _curve_of, fix)
    except ObjectNotFoundError:
        return []


def write_failure(files: Store, index: int, error: str) -> None:
    """Keep the line that says why a trial failed."""
    files.put(f"_work/failures/{index:03d}.json", json.dumps({"error": error}).encode())


def _error_of(plain: Any) -> str:
    return str(plain["error"])


def take_failures(files: Store) -> dict[int, str]:
    """Why trials failed, by number; forgets it, since they run again."""
    found = {}
    for entry in list(files.list("_work/failures/")):
        index = _number_of(entry.key)
        if index is not None:
            found[index] = read_json(files, entry.key, _error_of, _FORGET)
            files.delete(entry.key)
    return found


def read_failure(files: Store, index: int) -> str | None:
    """Why a trial failed; None where it did not, or left no word."""
    try:
        return read_json(files, f"_work/failures/{index:03d}.json", _error_of, _FORGET)
    except ObjectNotFoundError:
        return None


def drop_scratch(files: Store, index: int) -> None:
    """Remove what an ended trial needs no more and what is large: checkpoints, and the weights of its evaluation points."""
    scratch, results = trial_scratch(files, index), trial_files(files, index)
    for entry in list(scratch.list(CHECKPOINTS)):
        scratch.delete(entry.key)
    for entry in list(results.list(FOLDER)):
        if entry.key.endswith((BACKBONE, MODEL_JSON)):
            results.delete(entry.key)


def read_trials(artifact: Artifact) -> list[Trial]:
    """The table of a sweep artifact, in the order of its trials."""
    return [_trial(plain) for plain in artifact.read_json(TRIALS)]


def trial_candidates(artifact: Artifact) -> list[list[Candidate]]:
    """The backbones of finished trials, grouped by their settings apart from the seed. Raises CheckpointError for damaged ones.

    Stopped trials are left out: they have seen fewer images.
    """
    groups: dict[str, list[Candidate]] = {}
    for trial in read_trials(artifact):
        if trial.status != "finished":
            continue
        backbone, info = read_backbone_files(trial_files(artifact.files, int(trial.name)), f"{artifact.ref} trial {trial.name}")
        settings = trial.point.settings
        shown = [f"{key}={short(value)}" for key, value in settings.items() if key != "crops.grayscale_probability"]
        name = f"sweep, {trial.label or ', '.join(shown) or 'all seeds'}"  # whether it is grey, a column tells
        groups.setdefault(json.dumps([trial.label, settings], sort_keys=True), []).append(Candidate(name, info, backbone))
    return list(groups.values())


def seeds_of(trials: Sequence[Trial]) -> list[list[Trial]]:
    """Trials grouped by their settings apart from the seed of training, in order of their first."""
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(json.dumps([trial.label, trial.point.settings], sort_keys=True), []).append(trial)
    return list(groups.values())


def has_seeds(trials: Sequence[Trial]) -> bool:
    """Whether the seed of training varies."""
    return len({trial.overrides.get(SEED) for trial in trials}) > 1

"""sweep: a grid of trials of the pretrain section on Ray Tune, each a training run that leaves its weights.

    trials/000/trial.json, model.json, backbone.safetensors ...     one folder per trial, trial.json written last
    trials.json                                                     the table

A trial that has its trial.json is finished: a sweep that was interrupted runs only the others again, each from its newest
checkpoint.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from heliostat.artifacts import Artifact, Draft, clean
from heliostat.errors import ConfigError, TrainingError
from heliostat.evaluation.judge import Candidate
from heliostat.models.stored import read_backbone_files
from heliostat.runtime.config import SweepConfig
from heliostat.runtime.interrupt import run_interruptible
from heliostat.runtime.pipelines import Context, Summary, config_of, make
from heliostat.runtime.progress import bar
from heliostat.runtime.relay import Relay, Watcher
from heliostat.runtime.stage_train import NOT_IN_FINGERPRINT
from heliostat.runtime.sweep_grid import grid_points, trial_configs
from heliostat.runtime.training_data import training_data
from heliostat.tracking import Run, Tracker
from heliostat.training.run import TrainingJob, run_training
from heliostat.training.world import World

TRIALS = "trials.json"
_TRIAL = "trial.json"


@dataclass(frozen=True)
class Trial:
    """One point of the grid."""

    index: int
    overrides: Mapping[str, Any]
    job: TrainingJob

    @property
    def name(self) -> str:
        """`000`, `001`, ... in the order of the grid."""
        return f"{self.index:03d}"


def sweep(context: Context, config: SweepConfig) -> Artifact:
    """Run the recipe's grid of trials."""
    base = context.recipe.pretrain
    if base is None:
        raise ConfigError("a sweep needs the pretrain section that its trials vary; add pretrain: to the recipe")
    points = grid_points(config.grid)
    configs = trial_configs(base, config)
    images = training_data(context, base.data)

    def work(draft: Draft, run: Run) -> Summary:
        context.need_ray()
        sources = images.sources()
        trials = [
            Trial(index, points[index], TrainingJob(one, sources, draft.files.child(f"trials/{index:03d}")))
            for index, one in enumerate(configs)
        ]
        waiting = [trial for trial in trials if trial.job.files.size(_TRIAL) is None]
        if len(waiting) < len(trials):
            context.progress.say(f"  {len(trials) - len(waiting)} of {len(trials)} trials are finished already")
        if waiting:
            _run_trials(context, config, waiting, run.id)
        table = [json.loads(trial.job.files.read(_TRIAL)) for trial in trials]
        draft.put(TRIALS, json.dumps(table, indent=1).encode())
        return Summary({"trials": len(trials)})

    settings = {
        "sweep": config_of(config, without=("max_concurrent_trials", "cpus_per_trial", "gpus_per_trial", "report_every_steps")),
        "pretrain": config_of(base, without=NOT_IN_FINGERPRINT) | images.identity,
    }
    return make(context, context.recipe.ref("sweep"), stage="sweep", config=settings, inputs=images.inputs, work=work)


def _run_trials(context: Context, config: SweepConfig, trials: Sequence[Trial], parent_run: str) -> None:
    from ray import tune

    total = sum(trial.job.config.train.steps for trial in trials)
    steps: dict[str, int] = {}

    def show(source: str, metrics: dict[str, float], step: int) -> None:
        if step < 0:
            context.progress.say(f"  {source}")
            return
        steps[source] = step
        done = sum(steps.values())
        context.progress.update(f"{len(trials)} trials {bar(done, total)} step {done}/{total}", final=done == total)

    resources = {"cpu": config.cpus_per_trial} | ({"gpu": config.gpus_per_trial} if config.gpus_per_trial else {})
    storage = tempfile.TemporaryDirectory(prefix="heliostat-sweep-", ignore_cleanup_errors=True)
    with Watcher(Relay(), show) as relay, storage as folder:
        shared = _Shared({trial.name: trial for trial in trials}, context.tracker, parent_run, relay, config.report_every_steps)
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(_run_trial, shared=shared), resources),
            param_space={"trial": tune.grid_search([trial.name for trial in trials])},
            tune_config=tune.TuneConfig(max_concurrent_trials=config.max_concurrent_trials),
            run_config=tune.RunConfig(name="sweep", storage_path=folder, verbose=0),
        )
        results = run_interruptible(tuner.fit)
    if results.errors:
        text = str(results.errors[0]).strip().splitlines()
        raise TrainingError(f"{len(results.errors)} of {len(trials)} trials failed, first: {text[-1] if text else 'unknown'}")


@dataclass(frozen=True)
class _Shared:
    """What every trial's process gets."""

    trials: Mapping[str, Trial]
    tracker: Tracker
    parent_run: str
    relay: Relay
    report_every_steps: int


def _run_trial(parameters: dict[str, Any], *, shared: _Shared) -> None:
    """Runs in a trial's process."""
    from ray import tune

    trial = shared.trials[parameters["trial"]]
    relay, files, config = shared.relay, trial.job.files, trial.job.config
    tags = {"mlflow.parentRunId": shared.parent_run} if shared.parent_run else {}
    run = shared.tracker.start(f"trial {trial.name}", config=config_of(config), tags=tags)

    def report(metrics: Mapping[str, float], step: int, model: str = "") -> None:
        run.log_metrics(metrics, step)
        relay.push(f"trial {trial.name}", metrics, step)
        if step % shared.report_every_steps == 0 or step == config.train.steps:
            tune.report({"step": step, **{name.replace("/", "_"): value for name, value in metrics.items()}})

    status = "FAILED"
    try:
        summary = run_training(trial.job, World(), report, lambda text: relay.note(trial.name, f"trial {trial.name}: {text}"))
        record = {"name": trial.name, "overrides": dict(trial.overrides), "metrics": summary["metrics"][""]}
        files.put(_TRIAL, json.dumps(record, indent=1).encode())
        clean(files)
        status = "FINISHED"
    finally:
        run.finish(status)


def read_trials(artifact: Artifact) -> list[dict[str, Any]]:
    """The table of a sweep artifact: name, overrides and last metrics of each trial."""
    table: list[dict[str, Any]] = artifact.read_json(TRIALS)
    return table


def trial_candidates(artifact: Artifact) -> list[list[Candidate]]:
    """The trials' backbones, grouped by their settings apart from the seed. Raises CheckpointError for damaged ones."""
    groups: dict[str, list[Candidate]] = {}
    for trial in read_trials(artifact):
        backbone, info = read_backbone_files(
            artifact.files.child(f"trials/{trial['name']}"), f"{artifact.ref} trial {trial['name']}"
        )
        settings = {key: value for key, value in trial["overrides"].items() if key != "train.seed"}
        shown = [
            f"{key}={value}" for key, value in settings.items() if key != "crops.grayscale_probability"
        ]  # a column tells it
        name = f"sweep, {', '.join(shown) or 'all seeds'}"
        groups.setdefault(json.dumps(settings, sort_keys=True), []).append(Candidate(name, info, backbone))
    return list(groups.values())

"""sweep: trials of the pretrain section on Ray Tune, each a training run of its own, compared in a table and a plot.

    trials/000/...                 the model of a trial, its evaluations, and how it ended (`sweep_trials`)
    trials.json, table.md, .csv    the table
    plot.png                       the trials in one picture
    best.yaml                      the recipe of the best settings

A sweep that was interrupted goes on: what ended stays, what ran goes on from its newest checkpoint, no point is drawn twice.
"""

import tempfile
from pathlib import Path
from typing import Any

from heliostat.artifacts import Artifact, ArtifactRef, Draft
from heliostat.errors import ConfigError, TrainingError
from heliostat.runtime.online_images import draw_images
from heliostat.runtime.pipelines import Context, Summary, config_of, make
from heliostat.runtime.stage_train import NOT_IN_FINGERPRINT
from heliostat.runtime.sweep_best import BEST, best_recipe, words
from heliostat.runtime.sweep_config import SweepConfig
from heliostat.runtime.sweep_metric import check_metric, compared_every, is_online, labelled_ref
from heliostat.runtime.sweep_plot import draw_trials
from heliostat.runtime.sweep_points import trial_config, trial_configs
from heliostat.runtime.sweep_state import SweepState
from heliostat.runtime.sweep_table import best_group, csv_text, markdown_table, table_lines
from heliostat.runtime.sweep_trials import TRIALS, drop_scratch, trial_bytes
from heliostat.runtime.training_data import TrainingData, training_data
from heliostat.runtime.weights import WeightSource, open_weights
from heliostat.tracking import Run
from heliostat.training.recipe import PretrainConfig
from heliostat.training.start import StartingWeights, check_fit

_NOT_IN_FINGERPRINT = ("max_concurrent_trials", "max_failed_trials")
_OF_ONLINE = ("enabled", "every_steps", "labelled", "num_pictures", "num_cpus", "num_gpus")


def sweep(context: Context, config: SweepConfig) -> Artifact:
    """Run the recipe's trials. Returns the artifact with their table, plot and models."""
    base = context.recipe.pretrain
    if base is None:
        raise ConfigError("a sweep needs the pretrain section that its trials vary; add pretrain: to the recipe")
    configs = trial_configs(base, config)
    common = trial_config(base, config, {})
    check_metric(context.recipe, config, common)
    images = training_data(context, base.data)
    init = open_weights(context, base.init.weights, num_heads=base.student.num_heads) if base.init.weights else None
    for one in configs if init is not None else ():
        check_fit(init.what, init.config, one.student)  # type: ignore[union-attr]

    def work(draft: Draft, run: Run) -> Summary:
        state = SweepState(
            base,
            config,
            draft.files,
            tracker=context.tracker,
            parent_run=run.id,
            notify=lambda text: context.progress.say(f"  {text}"),
        )
        state.take_up()
        if state.ends:
            context.progress.say(f"  {len(state.ends)} of {state.count} trials ended before")
        if state.waiting:
            _run(context, state, common, images=images, ref=draft.ref, start=_start(base, init))
        return _conclude(context, draft, run, state)

    labelled = labelled_ref(context.recipe, common) if is_online(config) else ""
    inputs = images.inputs | ({"init": init.artifact} if init is not None and init.artifact is not None else {})
    inputs |= {"labelled": context.load(ArtifactRef.parse(labelled))} if labelled else {}
    settings = _settings(base, config, common) | images.identity
    settings |= {"init_sha256": init.sha256} if init is not None and init.sha256 else {}
    return make(context, context.recipe.ref("sweep"), stage="sweep", config=settings, inputs=inputs, work=work)


def _settings(base: PretrainConfig, config: SweepConfig, common: PretrainConfig) -> dict[str, Any]:
    """What belongs into the fingerprint: not speed and place, but how results are measured where trials depend on it."""
    plain = config_of(config, without=_NOT_IN_FINGERPRINT)
    shared = plain["overrides"].items()
    plain["overrides"] = {key: value for key, value in shared if not {key, key.partition(".")[0]} & set(NOT_IN_FINGERPRINT)}
    if config.space and config.search == "optuna":
        plain["max_concurrent_trials"] = config.max_concurrent_trials  # how many results a draw does without
    settings: dict[str, Any] = {"sweep": plain, "pretrain": config_of(base, without=(*NOT_IN_FINGERPRINT, "init.weights"))}
    if is_online(config):
        settings["online"] = config_of(common.online, without=_OF_ONLINE)
    if config.asha is not None:
        settings["compared_every_steps"] = compared_every(config, common)
    return settings


def _start(base: PretrainConfig, init: WeightSource | None) -> StartingWeights | None:
    if init is None:
        return None
    weights = init.read()
    return weights.without_heads() if base.init.heads == "fresh" else weights


def _run(
    context: Context,
    state: SweepState,
    common: PretrainConfig,
    *,
    images: TrainingData,
    ref: ArtifactRef,
    start: StartingWeights | None,
) -> None:
    context.need_ray()
    from heliostat.runtime.sweep_board import Board
    from heliostat.runtime.sweep_trial import SweepJob
    from heliostat.runtime.sweep_tune import run_trials  # Ray Tune is a second's import, for this stage alone

    sources = images.sources()
    online = draw_images(context, common, sources)
    job = SweepJob(
        str(ref), state.base, state.sweep, sources, state.files, context.tracker, Board(), start, online, images.labels
    )
    try:
        run_trials(state, job, context.progress)
    except BaseException:
        state.abandon()
        raise


def _conclude(context: Context, draft: Draft, run: Run, state: SweepState) -> Summary:
    """Table, plot and recipe of the best, in the artifact and in the tracker's run. Raises TrainingError for failed trials."""
    trials, config = state.table(), state.sweep
    _refuse_failures(state)
    for trial in trials:
        if trial.status == "stopped":  # its workers may have written on for a moment
            drop_scratch(state.files, trial.point.index)
    best = best_group(trials, config)
    if best is None:
        raise TrainingError(
            f"none of {state.count} trials ran to its end with a finite {config.metric}; look at {draft.files.uri}"
        )
    for line in table_lines(trials, config):
        context.progress.say(f"          {line}")
    files = {
        TRIALS: trial_bytes(trials),
        "table.md": markdown_table(trials, config, str(draft.ref)).encode(),
        "table.csv": csv_text(trials, config).encode(),
        "plot.png": draw_trials(trials, config, str(draft.ref)),
        BEST: best_recipe(context.recipe, config, best, inputs=draft.inputs).encode(),
    }
    with tempfile.TemporaryDirectory(prefix="heliostat-sweep-") as folder:
        for name, data in files.items():
            draft.put(name, data)
            (Path(folder) / name).write_bytes(data)
            run.log_file(Path(folder) / name)
    context.progress.say(f"          best: {' '.join(words(best)) or 'the recipe as it is'}")
    metrics = {config.metric: best.value} if best.value is not None else {}
    run.log_metrics(metrics, best.step)
    stopped = sum(trial.status == "stopped" for trial in trials)
    counts = {"trials": len(trials)} | ({"stopped": stopped} if stopped else {})
    counts |= {"failed": state.num_failed} if state.num_failed else {}
    return Summary(counts, metrics)


def _refuse_failures(state: SweepState) -> None:
    """Raises TrainingError when more trials failed than may."""
    failed = [trial for trial in state.table() if trial.status == "failed"]
    if len(failed) <= state.sweep.max_failed_trials:
        if state.waiting:
            raise TrainingError(f"{len(state.waiting)} of {state.count} trials did not run; the same command takes them up")
        return
    raise TrainingError(
        f"{len(failed)} of {state.count} trials failed (sweep.max_failed_trials is {state.sweep.max_failed_trials}), first "
        f"{failed[0].name} ({failed[0].point.shown()}): {failed[0].error}; the same command takes up what is left"
    )

"""pretrain and distill: images -> model artifacts."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from heliostat.artifacts import Artifact, ArtifactRef, Draft
from heliostat.data.quarantine import QUARANTINE, Rejection, quarantine_to_bytes
from heliostat.errors import DataError
from heliostat.models.stored import read_info, teacher_state
from heliostat.runtime.banner import TrainingFacts, indented, training_banner
from heliostat.runtime.online_images import draw_images
from heliostat.runtime.pipelines import Context, Plan, Summary, config_of, make_together
from heliostat.runtime.trainer import TrainingRequest, train
from heliostat.runtime.training_data import TrainingData, training_data
from heliostat.runtime.weights import WeightSource, open_weights
from heliostat.tracking import Run, without_secrets
from heliostat.training.checkpoint import read_rejections
from heliostat.training.recipe import (
    DistillConfig,
    PretrainConfig,
    TrainingConfig,
    alone,
    phase_config,
    teacher_heads,
)
from heliostat.training.run import FrozenTeacher, TrainingJob
from heliostat.training.start import StartingWeights, check_fit, check_heads, fit_backbone

# What changes speed, safety or place but not the result. Names of other artifacts enter through the inputs' fingerprints.
NOT_IN_FINGERPRINT = (
    "data",
    "scaling",
    "loader",
    "online",
    "phases",
    "train.checkpoint_every_steps",
    "train.log_every_steps",
    "train.keep_last",
    "train.keep_every",
    "train.storage_patience_seconds",
    "train.nonfinite_policy",
    "train.max_nonfinite_steps",
)
_OF_INIT = ("init.weights",)
_OF_DISTILL = ("teacher", "teacher_head_steps", "students", "compare_with_scratch")


def pretrain(context: Context, config: PretrainConfig) -> Artifact:
    """Train the recipe's model, then its further phases, each from the weights of the one before. Returns the last one."""
    images = training_data(context, config.data)
    init = None
    if config.init.weights:
        init = open_weights(context, config.init.weights, num_heads=config.student.num_heads)
    model = _pretrain_one(context, config, context.recipe.ref("model"), images=images, init=init)
    for phase in config.phases:
        ref, before = context.recipe.ref("model", f"-{phase.name}"), WeightSource.of_artifact(model)
        model = _pretrain_one(context, phase_config(config, phase), ref, images=images, init=before)
    return model


def _pretrain_one(
    context: Context,
    config: PretrainConfig,
    ref: ArtifactRef,
    *,
    images: TrainingData,
    init: WeightSource | None,
    stage: str = "pretrain",
) -> Artifact:
    if init is not None:
        check_fit(init.what, init.config, config.student)
    settings = config_of(config, without=NOT_IN_FINGERPRINT + _OF_INIT)
    plan = Plan(ref, settings | images.identity | _identity(init=init), images.inputs | _inputs(init=init))

    def start() -> dict[str, StartingWeights]:
        if init is None:
            return {}
        weights = init.read()
        if config.init.heads == "fresh":
            weights = weights.without_heads()
        if not weights.has_heads and not config.init.head_warmup_steps:
            context.progress.say(
                f"          {weights.what} brings no heads and init.head_warmup_steps is 0: fresh heads will pull at the "
                "trained backbone from the first step"
            )
        return {"": fit_backbone(weights, config.student)}

    return _train(context, config, {"": plan}, images=images, stage=stage, start=start)[""]


def distill(context: Context, config: DistillConfig) -> Artifact:
    """Train the recipe's students against one frozen teacher, their phases, and their like without it. Returns the first."""
    images = training_data(context, config.data)
    teacher = _teacher(context, config, images)
    results = _distill_together(context, config, "", images=images, teacher=teacher, before={})
    first, before = next(iter(results.values())), results
    for phase in config.phases:
        before = _distill_together(
            context, phase_config(config, phase), f"-{phase.name}", images=images, teacher=teacher, before=before
        )
    if config.compare_with_scratch:
        for name, backbone in config.backbones.items():
            ref = context.recipe.ref("model", f"-{name or 'student'}-scratch")
            _pretrain_one(context, alone(config, backbone), ref, images=images, init=None, stage="distill")
    return first


def _teacher(context: Context, config: DistillConfig, images: TrainingData) -> WeightSource:
    """The teacher with heads: the artifact, the public weights, or these after heads were trained on them."""
    source = open_weights(context, config.teacher or str(context.recipe.ref("model")))
    if source.artifact is not None:
        check_heads(source.what, read_info(source.artifact), config.method)
        return source
    weights = source.read()
    if weights.has_heads:
        return source
    if not config.teacher_head_steps:
        raise DataError(
            f"distill.teacher={config.teacher} has no heads, and students are compared prototype by prototype; give "
            "distill.teacher_head_steps (for example 5000) to train heads on the frozen teacher first"
        )
    ref, section = context.recipe.ref("model", "-teacher"), teacher_heads(config, weights.config)
    return WeightSource.of_artifact(_pretrain_one(context, section, ref, images=images, init=source, stage="distill"))


def _distill_together(
    context: Context,
    config: DistillConfig,
    suffix: str,
    *,
    images: TrainingData,
    teacher: WeightSource,
    before: Mapping[str, Artifact],
) -> dict[str, Artifact]:
    plans = {}
    for name, backbone in config.backbones.items():
        init = WeightSource.of_artifact(before[name]) if before else None
        settings = config_of(config, without=NOT_IN_FINGERPRINT + _OF_DISTILL) | {"student": backbone.model_dump(mode="json")}
        inputs = images.inputs | _inputs(teacher=teacher, init=init)
        ref = context.recipe.ref("model", f"-{name or 'student'}{suffix}")
        plans[name] = Plan(ref, settings | images.identity | _identity(teacher=teacher), inputs)

    def start() -> dict[str, StartingWeights]:
        return {
            name: fit_backbone(WeightSource.of_artifact(model).read(), config.backbones[name]) for name, model in before.items()
        }

    return _train(context, config, plans, images=images, stage="distill", start=start, teacher=teacher)


def _inputs(**sources: WeightSource | None) -> dict[str, Artifact]:
    """Weights that are artifacts, as inputs by role."""
    return {role: source.artifact for role, source in sources.items() if source is not None and source.artifact is not None}


def _identity(**sources: WeightSource | None) -> dict[str, str]:
    """Weights that are files, as entries of the fingerprint: their content, not their place."""
    return {f"{role}_sha256": source.sha256 for role, source in sources.items() if source is not None and source.sha256}


def _train(
    context: Context,
    config: TrainingConfig,
    plans: Mapping[str, Plan],
    *,
    images: TrainingData,
    stage: str,
    start: Any,
    teacher: WeightSource | None = None,
) -> dict[str, Artifact]:
    """One training run that makes the artifacts of the plans, one for each network."""

    def work(opened: Mapping[str, tuple[Draft, Run]]) -> dict[str, Summary]:
        own = _only(config, opened)
        sources = images.sources()
        stores = {name: draft.files for name, (draft, _) in opened.items()}
        weights = {name: one for name, one in start().items() if name in opened}
        run_ids = {f"tracker_run{f'.{name}' if name else ''}": run.id for name, (_, run) in opened.items()}
        labels = run_ids | images.labels
        job = TrainingJob(own, sources, next(iter(stores.values())), _frozen(teacher), weights, stores, labels=labels)
        artifacts = {name: str(draft.ref) for name, (draft, _) in opened.items()}
        runs = {name: run for name, (_, run) in opened.items()}
        online = draw_images(context, own, sources)  # whatever is missing is refused before Ray starts
        if config.scaling.num_workers > 0:
            context.need_ray()
        data = {str(one.ref): source.table.num_images for one, source in zip(images.artifacts, sources, strict=True)}
        facts = TrainingFacts(
            config=own,
            artifacts=artifacts,
            data=data,
            places={name: store.uri for name, store in stores.items()},
            tracker=without_secrets(context.tracker.uri),
            evaluation=online.line() if online is not None else "",
            teacher=teacher.config if teacher is not None else None,
            teacher_name=teacher.what if teacher is not None else "",
        )
        for line in indented(training_banner(facts)):
            context.progress.say(line)
        request = TrainingRequest(artifacts, job, context.tracker, {name: run.id for name, run in runs.items()}, online)
        summary = train(request, runs, context.progress)
        rejections = images.named(read_rejections(job.files))
        if rejections:
            for draft, _ in opened.values():
                draft.put(QUARANTINE, quarantine_to_bytes(rejections))
            context.progress.say(
                f"          {len(rejections)} images could not be used, see {QUARANTINE}: {_reasons(rejections)}"
            )
        return {name: _summary(config, summary, name, len(rejections)) for name in opened}

    return make_together(context, plans, stage=stage, work=work)


def _only(config: TrainingConfig, names: Mapping[str, object]) -> TrainingConfig:
    """The section with the students that still have to be trained: those that are complete stay as they are."""
    if not isinstance(config, DistillConfig) or not config.students:
        return config
    return config.model_copy(update={"students": {name: config.students[name] for name in names}})


def _reasons(rejections: Sequence[Rejection]) -> str:
    counts = Counter(rejection.reason for rejection in rejections)
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))


def _frozen(teacher: WeightSource | None) -> FrozenTeacher | None:
    if teacher is None:
        return None
    weights = teacher.read()
    return FrozenTeacher(weights.config, teacher_state(weights.backbone, weights.heads))


def _summary(config: TrainingConfig, summary: dict[str, Any], name: str, num_turned_away: int) -> Summary:
    counts = {"steps": config.train.steps, "images_seen": config.train.steps * config.train.global_batch_size}
    bad = {"images_turned_away": num_turned_away} if num_turned_away else {}
    return Summary(counts | bad, summary["metrics"][name])

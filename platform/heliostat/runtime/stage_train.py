"""pretrain and distill: images -> model artifacts."""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from heliostat.artifacts import Artifact, ArtifactRef, Draft
from heliostat.data.shards import manifest_from_bytes
from heliostat.errors import DataError
from heliostat.models.stored import read_info, read_teacher_state
from heliostat.runtime.pipelines import Context, Summary, config_of, make
from heliostat.runtime.stage_ingest import MANIFEST
from heliostat.runtime.trainer import TrainingRequest, train, training_job
from heliostat.tracking import Run
from heliostat.training.recipe import DistillConfig, PretrainConfig, TrainingConfig
from heliostat.training.run import FrozenTeacher

# What changes speed, safety or place but not the result.
NOT_IN_FINGERPRINT = ("data", "scaling", "loader", "train.checkpoint_every_steps", "train.keep_checkpoints")


def training_images(context: Context, data: str) -> Artifact:
    """The artifact that a training stage reads: the one named, else the recipe's curated one, else its raw one."""
    if data:
        return context.load(ArtifactRef.parse(data))
    kind = "curated" if context.recipe.curate is not None or context.recipe.ingest is None else "raw"
    return context.load(context.recipe.ref(kind))


def readable_rows(images: Artifact) -> pa.Table:
    """The manifest without the files whose header could not be read. Raises DataError when nothing is left."""
    manifest = manifest_from_bytes(images.files.read(MANIFEST))
    rows = manifest.filter(pc.greater(manifest["width"], 0))
    if rows.num_rows == 0:
        raise DataError(f"{images.ref} holds no readable image; look at its manifest")
    return rows


def pretrain(context: Context, config: PretrainConfig) -> Artifact:
    """Train the recipe's model."""
    images = training_images(context, config.data)
    return _train(context, config, context.recipe.ref("model"), stage="pretrain", images=images, teacher=None)


def distill(context: Context, config: DistillConfig) -> Artifact:
    """Train the recipe's student against its model, or against the teacher that is named."""
    images = training_images(context, config.data)
    teacher_ref = ArtifactRef.parse(config.teacher) if config.teacher else context.recipe.ref("model")
    teacher = context.load(teacher_ref)
    return _train(context, config, context.recipe.ref("model", "-student"), stage="distill", images=images, teacher=teacher)


def _train(
    context: Context, config: TrainingConfig, ref: ArtifactRef, *, stage: str, images: Artifact, teacher: Artifact | None
) -> Artifact:
    def work(draft: Draft, run: Run) -> Summary:
        if config.scaling.num_workers > 0:
            context.need_ray()
        frozen = FrozenTeacher(read_info(teacher), read_teacher_state(teacher)) if teacher else None
        manifest = readable_rows(images)
        context.progress.say(f"          {describe_training(config, manifest.num_rows)}")
        job = training_job(config, manifest, images.files, draft, frozen)
        summary = train(TrainingRequest(str(ref), job, context.tracker, run.id), run, context.progress)
        return _summary(config, summary)

    skip = NOT_IN_FINGERPRINT + (("teacher",) if isinstance(config, DistillConfig) else ())
    inputs = {"data": images} | ({"teacher": teacher} if teacher else {})
    return make(context, ref, stage=stage, config=config_of(config, without=skip), inputs=inputs, work=work)


def _summary(config: TrainingConfig, summary: dict[str, Any]) -> Summary:
    counts = {"steps": config.train.steps, "images_seen": config.train.steps * config.train.global_batch_size}
    failures = {"decode_failures": summary["decode_failures"]} if summary["decode_failures"] else {}
    return Summary(counts | failures, summary["metrics"])


def describe_training(config: TrainingConfig, num_images: int) -> str:
    """One line: what is trained on how much, where."""
    student, train = config.student, config.train
    epochs = train.steps * train.global_batch_size / max(num_images, 1)
    where = f"{config.scaling.num_workers} workers" if config.scaling.num_workers else "this process"
    return (
        f"{student.arch} {student.embed_dim}x{student.depth} patch {student.patch_size}: {train.steps:,} steps of "
        f"{train.global_batch_size} images from {num_images:,} ({epochs:.1f} epochs), {where}"
    )

"""embed: raw images -> features: hashes, detectors' findings and embeddings of every image, each decoded once."""

import json
from dataclasses import dataclass
from pathlib import Path

from heliostat.artifacts import WORK, Artifact, ArtifactRef, ArtifactStore, Draft, FileRecord
from heliostat.curation.config import EmbedConfig
from heliostat.curation.detectors import open_faces, open_nsfw
from heliostat.curation.embed import Embedder
from heliostat.curation.features import LEAST_SIDE_PIXELS, FeatureShard, Instruments, plan_features
from heliostat.curation.open_embedder import OpenEmbedderConfig, open_embedder
from heliostat.curation.pca_hash import PcaHash
from heliostat.curation.pool import FEATURES_JSON, ROWS, FeatureFiles, FeaturesInfo, VectorSpace
from heliostat.data.manifest import read_manifest
from heliostat.runtime.pipelines import Context, Summary, config_of, make
from heliostat.runtime.recipe import EmbedStage
from heliostat.runtime.relay import Gauges
from heliostat.runtime.revised_inputs import start_again_if_revised
from heliostat.runtime.shards import RayTasks
from heliostat.runtime.step_times import TIMES, StepTimes
from heliostat.runtime.weight_names import names_artifact
from heliostat.storage import Store
from heliostat.tracking import Run

_PIECES = f"{WORK}pieces/"
NO_EFFECT = ("raw", "batch_size", "device", "gpus_per_actor")
"""Keys of the section that change no result."""


@dataclass(frozen=True)
class OpenInstruments:
    """Opens what the recipe names, in the process that measures."""

    config: EmbedConfig
    artifacts: Store

    def _embedder(self, name: str, options: OpenEmbedderConfig) -> Embedder:
        return open_embedder(name, options, artifacts=ArtifactStore(self.artifacts), device=self.config.device)

    def __call__(self) -> Instruments:
        """Everything that measures, ready. Raises DataError or UsageError for what is not installed or not there."""
        config = self.config
        least_side = config.detectors.face_image_side if config.detectors.faces != "none" else 0
        return Instruments(
            least_side=max(LEAST_SIDE_PIXELS, least_side),
            hash=PcaHash.load(Path(config.hash_fit) if config.hash_fit else None),
            nsfw=open_nsfw(config.detectors.nsfw),
            faces=open_faces(config.detectors.faces, longest_side_pixels=config.detectors.face_image_side),
            copy=self._embedder(config.copy_embedder, config.copy_options),
            semantic=self._embedder(config.semantic_embedder, config.semantic_options) if config.semantic_embedder else None,
        )


def embed(context: Context, config: EmbedStage) -> Artifact:
    """Make the features of the pool and of every set that the recipe names; returns the pool's."""
    named = {"": config.raw or str(context.recipe.ref("raw"))}
    named |= {f"-{name}": raw for name, raw in context.recipe.embedded_sets().items()}
    raws = {suffix: context.load(ArtifactRef.parse(name)) for suffix, name in named.items()}  # a missing one is said first
    made = [_embed_one(context, config, suffix, raw) for suffix, raw in raws.items()]
    return made[0]


def _embed_one(context: Context, config: EmbedStage, suffix: str, raw: Artifact) -> Artifact:
    inputs = {"raw": raw}
    for role in ("copy_embedder", "semantic_embedder"):
        name = getattr(config, role)
        if names_artifact(name):
            inputs[role] = context.load(ArtifactRef.parse(name))
    open_instruments = OpenInstruments(config, context.artifacts.store)
    tools = open_instruments()  # what is missing is said here, before any worker starts; weights given by path enter by content
    info = _info(tools, ())
    settings = config_of(config, without=NO_EFFECT) | {"spaces": info.model_dump(mode="json", exclude={"starts"})}

    def work(draft: Draft, run: Run) -> Summary:
        times = StepTimes()
        start_again_if_revised(context, draft, [raw])
        with times.step("plan"):
            manifest = read_manifest(raw.files)
            tasks = plan_features(manifest, draft.files, _PIECES, max_images=config.images_per_task)
        starts = [0]
        for task in tasks:
            starts.append(starts[-1] + task["stop"] - task["start"])
        finished = {entry.key for entry in draft.files.list(ROWS)}
        waiting = [task for task in tasks if f"{ROWS}{task['index']:06d}.parquet" not in finished]
        if waiting:
            context.need_ray()
        function = FeatureShard(
            raw.files, draft.files, _PIECES, ROWS, config.decode, open_instruments, batch_size=config.batch_size
        )
        gauges, done = Gauges(), len(tasks) - len(waiting)
        run_tasks = RayTasks(context.progress, times, config.gpus_per_actor)
        for result in run_tasks(function, waiting, label=f"embedding {raw.ref.name}", has_state=True):
            draft.note(result["key"], FileRecord(**result["file"]))
            done += 1
            gauges.set(str(draft.ref), {"curate/shards_done": float(done)})
        full = _info(tools, tuple(starts))
        draft.put(FEATURES_JSON, (full.model_dump_json(indent=1) + "\n").encode())
        draft.put(TIMES, json.dumps(times.rows("embed"), indent=1).encode())
        return Summary({"images": starts[-1], **_undecodable(FeatureFiles(str(draft.ref), draft.files, full))})

    return make(context, context.recipe.ref("features", suffix), stage="embed", config=settings, inputs=inputs, work=work)


def _info(tools: Instruments, starts: tuple[int, ...]) -> FeaturesInfo:
    return FeaturesInfo(
        starts=starts or (0,),
        copy_space=_space(tools.copy),
        semantic_space=None if tools.semantic is None else _space(tools.semantic),
        hash_version=tools.hash.version,
        nsfw="" if tools.nsfw is None else f"{tools.nsfw.name} {tools.nsfw.version}",
        faces="" if tools.faces is None else f"{tools.faces.name} {tools.faces.version}",
    )


def _space(embedder: Embedder) -> VectorSpace:
    return VectorSpace(name=embedder.name, version=embedder.version, dimension=embedder.dimension)


def _undecodable(features: FeatureFiles) -> dict[str, int]:
    """How many images do not decode, by the files that were written."""
    count = 0
    for block in range(len(features.keys)):
        reasons = features.read(block, ["reason"])["reason"]
        count += sum(1 for reason in reasons.to_pylist() if reason)
    return {"undecodable": count} if count else {}


def open_features(artifact: Artifact) -> FeatureFiles:
    """The files of a features artifact."""
    info = FeaturesInfo.model_validate_json(artifact.files.read(FEATURES_JSON))
    return FeatureFiles(str(artifact.ref), artifact.files, info)

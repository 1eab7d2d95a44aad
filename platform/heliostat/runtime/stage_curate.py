"""curate: raw images -> a deduplicated, relevant, balanced training set with a ledger."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from heliostat.artifacts import WORK, Artifact, ArtifactRef, ArtifactStore, Draft, FileRecord, describe
from heliostat.curation.curate import Curation, curate
from heliostat.curation.embed import BackboneEmbedder, Embedder, ThumbnailEmbedder
from heliostat.curation.report import copy_report, render_funnel
from heliostat.data.config import DecodeConfig
from heliostat.data.decode import ImageRejected, decode
from heliostat.data.packing import shard_key
from heliostat.data.shard_image import EXTENSION_OF_FORMAT, IMAGE_EXTENSIONS
from heliostat.data.shard_reader import ShardReader, image_runs, read_run
from heliostat.data.shards import (
    ShardImage,
    image_id,
    make_shard_image,
    manifest_from_bytes,
    manifest_rows,
    manifest_to_bytes,
    write_shard,
)
from heliostat.errors import DataError
from heliostat.models.stored import read_backbone
from heliostat.runtime.pipelines import Context, Summary, config_of, make
from heliostat.runtime.recipe import CurateStage
from heliostat.runtime.relay import Gauges
from heliostat.runtime.shards import map_shards
from heliostat.runtime.stage_ingest import MANIFEST, TRUTH, rows_key
from heliostat.storage import Store
from heliostat.tracking import Run

LEDGER = "ledger.parquet"
FUNNEL = "funnel.json"
COPY_REPORT = "copy_report.json"
STATISTICS = "statistics.json"
_EMBEDDINGS = f"{WORK}embeddings/"


@dataclass(frozen=True)
class EmbedShard:
    """Decodes every image of one run of a shard once and writes its embedding, or the reason why there is none."""

    raw: Store
    files: Store
    prefix: str
    limits: DecodeConfig
    artifacts: Store
    embedder_name: str
    image_size: int
    batch_size: int

    @cached_property
    def embedder(self) -> Embedder:
        """Built once per actor."""
        if self.embedder_name == "thumbnail":
            return ThumbnailEmbedder()
        model = ArtifactStore(self.artifacts).load(ArtifactRef.parse(self.embedder_name))
        backbone, info = read_backbone(model)
        return BackboneEmbedder(
            self.embedder_name,
            info.backbone.embed_dim,
            backbone,
            mean=info.mean,
            std=info.std,
            image_size=self.image_size,
            batch_size=self.batch_size,
        )

    def __call__(self, task: Mapping[str, Any]) -> Mapping[str, Any]:
        """task: index, shard, rows [(offset, length, id, source)]. Writes one Parquet file with a row per image, in order.

        Raises DataError when bytes are not those that the manifest was made of.
        """
        rows = task["rows"]
        found = read_run(ShardReader(self.raw), task["shard"], [(offset, length) for offset, length, _, _ in rows])
        images: list[NDArray[np.uint8]] = []
        reasons: list[tuple[str, str]] = []
        for (_, _, identity, source), data in zip(rows, found, strict=True):
            if image_id(data) != identity:
                raise DataError(f"{source} in {task['shard']} does not match its id {identity[:12]}; the shard is damaged")
            try:
                images.append(decode(bytes(data), self.limits))
                reasons.append(("", ""))
            except ImageRejected as rejected:
                reasons.append((rejected.reason, rejected.detail))
        vectors = self.embedder(images)
        table = pa.table(
            {
                "source": [source for _, _, _, source in rows],
                "reason": [reason for reason, _ in reasons],
                "detail": [detail for _, detail in reasons],
                "embedding": _scatter(vectors, [not reason for reason, _ in reasons]),
            }
        )
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        self.files.put(f"{self.prefix}{task['index']:06d}.parquet", sink.getvalue())
        return {"index": task["index"]}


def _scatter(vectors: NDArray[np.float32], present: Sequence[bool]) -> pa.Array:
    """Vectors as a list column with nulls where there is none."""
    remaining = iter(vectors.tolist())
    return pa.array([next(remaining) if here else None for here in present], pa.list_(pa.float32()))


@dataclass(frozen=True)
class RepackShard:
    """Copies the kept images of one output shard out of the raw shards, bytes unchanged."""

    raw: Store
    files: Store

    def __call__(self, task: Mapping[str, Any]) -> Mapping[str, Any]:
        """task: index, rows [manifest rows]."""
        images: list[ShardImage] = []
        for row in task["rows"]:
            data = ShardReader(self.raw)(row["shard"], row["offset"], row["length"])
            suffix = row["source"].rpartition(".")[2].lower()
            if suffix not in IMAGE_EXTENSIONS:  # a row of a Parquet file, an entry of a list
                suffix = EXTENSION_OF_FORMAT[row["format"]]
            image = make_shard_image(data, suffix, row["source"], label=row["label"])
            if image.id != row["id"]:
                raise DataError(
                    f"{row['source']} in {row['shard']} does not match its id {row['id'][:12]}; the raw shard is damaged"
                )
            images.append(image)
        key = shard_key(task["index"])
        tar = write_shard(images)
        self.files.put(key, tar)
        self.files.put(rows_key(task["index"]), manifest_to_bytes(manifest_rows(key, tar)))
        return {"key": key, "file": describe(tar).model_dump()}


@dataclass(frozen=True)
class Embedded:
    """The images of one raw artifact that decode, with their embeddings, and those that do not."""

    manifest: pa.Table
    rejected: pa.Table
    embeddings: NDArray[np.float32] = field(repr=False)


def _inputs(context: Context, config: CurateStage) -> dict[str, Artifact]:
    recipe = context.recipe
    named = {"raw": config.raw, "curated": config.curated, "evaluation": config.evaluation}
    named["embedder"] = "" if config.embed.embedder == "thumbnail" else config.embed.embedder
    inputs = {role: context.load(ArtifactRef.parse(name)) for role, name in named.items() if name}
    if "raw" not in inputs:
        inputs["raw"] = context.load(recipe.ref("raw"))
    if "curated" not in inputs and recipe.ingest is not None and recipe.ingest.curated:
        inputs["curated"] = context.load(recipe.ref("raw", "-curated"))
    return inputs


def run_curate(context: Context, config: CurateStage) -> Artifact:
    """Make the recipe's curated artifact."""
    inputs = _inputs(context, config)
    raw = inputs["raw"]

    def work(draft: Draft, run: Run) -> Summary:
        context.need_ray()
        pool = _embed(context, config, draft, raw, "raw")
        references = {
            role: _embed(context, config, draft, inputs[role], role) for role in ("curated", "evaluation") if role in inputs
        }
        arguments: dict[str, Any] = {}
        for role, found in references.items():
            arguments[f"{role}_embeddings"] = found.embeddings
            arguments[f"{role}_ids"] = found.manifest["id"].to_pylist()
        result = curate(pool.manifest, rejected=pool.rejected, embeddings=pool.embeddings, config=config, **arguments)
        kept = _kept_rows(pool.manifest, result)
        _repack(context, config, draft, raw, kept)
        _write_reports(context, draft, raw, result)
        rows_in = result.funnel[0].rows_in
        totals = {"curate/rows_in": float(rows_in), "curate/rows_kept": float(len(kept))}
        run.log_metrics(totals, 0)
        Gauges().set(str(draft.ref), totals)
        return Summary({"images": len(kept), "images_in": rows_in})

    settings = config_of(config, without=("raw", "curated", "evaluation"))
    return make(context, context.recipe.ref("curated"), stage="curate", config=settings, inputs=inputs, work=work)


def _embed(context: Context, config: CurateStage, draft: Draft, source: Artifact, role: str) -> Embedded:
    manifest = manifest_from_bytes(source.files.read(MANIFEST))
    runs = image_runs(manifest)
    prefix = f"{_EMBEDDINGS}{role}/"
    finished = {entry.key for entry in draft.files.list(prefix)}
    tasks = [_task(index, manifest, run) for index, run in enumerate(runs) if f"{prefix}{index:06d}.parquet" not in finished]
    embed = config.embed
    function = EmbedShard(
        source.files,
        draft.files,
        prefix,
        config.decode,
        context.artifacts.store,
        embed.embedder,
        embed.image_size,
        embed.batch_size,
    )
    has_state = config.embed.embedder != "thumbnail"
    label = f"decoding and embedding {role}"
    gauges, done = Gauges(), len(runs) - len(tasks)
    for _ in map_shards(function, tasks, label=label, progress=context.progress, has_state=has_state):
        done += 1
        gauges.set(str(draft.ref), {"curate/shards_done": float(done)})
    tables = [pq.read_table(io.BytesIO(draft.files.read(f"{prefix}{index:06d}.parquet"))) for index in range(len(runs))]
    return _split(manifest, pa.concat_tables(tables), source)


def _task(index: int, manifest: pa.Table, run: range) -> dict[str, Any]:
    rows = manifest.slice(run.start, len(run))
    columns = (rows[name].to_pylist() for name in ("offset", "length", "id", "source"))
    return {"index": index, "shard": rows["shard"][0].as_py(), "rows": list(zip(*columns, strict=True))}


def _split(manifest: pa.Table, embedded: pa.Table, source: Artifact) -> Embedded:
    """Separate what decodes from what does not. Both tables are in the order of shards and members."""
    if manifest["source"].to_pylist() != embedded["source"].to_pylist():
        raise DataError(
            f"{source.ref}: the embeddings do not belong to its manifest; remove the unfinished artifact and run again"
        )
    good = np.array([not reason for reason in embedded["reason"].to_pylist()], bool)
    vectors = embedded["embedding"].filter(pa.array(good)).to_pylist()
    return Embedded(
        manifest.filter(pa.array(good)),
        embedded.select(["source", "reason", "detail"]).filter(pa.array(~good)),
        np.asarray(vectors, np.float32).reshape(int(good.sum()), -1),
    )


def _kept_rows(manifest: pa.Table, result: Curation) -> list[dict[str, Any]]:
    """Manifest rows of the kept images, in the order of the curation."""
    kept_sources = {
        row["id"]: row["source"]
        for row in result.ledger.select(["id", "source", "decision"]).to_pylist()
        if row["decision"] == "kept"
    }
    by_source = {(row["id"], row["source"]): row for row in manifest.to_pylist()}  # shards of others may repeat their names
    return [by_source[identity, kept_sources[identity]] for identity in result.kept_ids]


def _repack(context: Context, config: CurateStage, draft: Draft, raw: Artifact, kept: list[dict[str, Any]]) -> None:
    if not kept:
        raise DataError(f"curation of {raw.ref} keeps no image; loosen the thresholds (heliostat --dry-run shows them)")
    size = config.images_per_shard
    groups = [kept[start : start + size] for start in range(0, len(kept), size)]
    finished = {entry.key for entry in draft.files.list(f"{WORK}rows/")}
    tasks = [{"index": index, "rows": rows} for index, rows in enumerate(groups) if rows_key(index) not in finished]
    for result in map_shards(RepackShard(raw.files, draft.files), tasks, label="packing the kept", progress=context.progress):
        draft.note(result["key"], FileRecord(**result["file"]))
    tables = [manifest_from_bytes(draft.files.read(rows_key(index))) for index in range(len(groups))]
    draft.put(MANIFEST, manifest_to_bytes(pa.concat_tables(tables)))


def _write_reports(context: Context, draft: Draft, raw: Artifact, result: Curation) -> None:
    sink = io.BytesIO()
    pq.write_table(result.ledger, sink, compression="zstd")
    draft.put(LEDGER, sink.getvalue())
    draft.put(FUNNEL, json.dumps([asdict(step) for step in result.funnel], indent=1).encode())
    draft.put(STATISTICS, json.dumps(result.statistics, indent=1).encode())
    for line in render_funnel(result.funnel).splitlines():
        context.progress.say(f"          {line}")
    if raw.files.size(TRUTH) is not None:
        truth = raw.read_json(TRUTH)
        score = copy_report(
            result.ledger,
            {entry["file"]: entry["original"] for entry in truth["planted"]},
            kinds={entry["file"]: entry["kind"] for entry in truth["planted"]},
            same=list(truth["video"].values()),
        )
        draft.put(
            COPY_REPORT, json.dumps({**score.as_dict(), "wrongly_dropped": list(score.wrongly_dropped)}, indent=1).encode()
        )
        context.progress.say(f"          planted copies: recall {score.recall:.3f}, precision {score.precision:.3f}")

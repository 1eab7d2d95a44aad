"""ingest: image files -> raw artifacts."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from heliostat.artifacts import WORK, Artifact, Draft, FileRecord, describe
from heliostat.data import photographs
from heliostat.data.ingest import Source, SourceFile, open_source, pack_files, shard_key
from heliostat.data.shards import manifest_from_bytes, manifest_to_bytes
from heliostat.runtime.pipelines import Context, Summary, make
from heliostat.runtime.recipe import IngestConfig
from heliostat.runtime.shards import map_shards
from heliostat.storage import Store
from heliostat.tracking import Run

MANIFEST = "manifest.parquet"
TRUTH = "truth.json"
_PHOTOGRAPHS = "photographs"


@dataclass(frozen=True)
class PackShard:
    """Packs one shard: source files -> tar and manifest rows, the rows written last."""

    source: Store
    files: Store

    def __call__(self, task: Mapping[str, Any]) -> Mapping[str, Any]:
        """task: index, files [(key, bytes)]."""
        key = shard_key(task["index"])
        data, rows = pack_files(self.source, [SourceFile(*file) for file in task["files"]], key)
        self.files.put(key, data)
        self.files.put(rows_key(task["index"]), manifest_to_bytes(rows))
        return {"index": task["index"], "key": key, "file": describe(data).model_dump()}


def rows_key(index: int) -> str:
    """Where the manifest rows of a finished shard lie until the artifact is complete."""
    return f"{WORK}rows/{index:06d}.parquet"


def pack_source(context: Context, draft: Draft, source: Source, images_per_shard: int) -> pa.Table:
    """Pack all files of a source into the draft's shards, skipping those that are there, and write the manifest."""
    groups = [source.files[start : start + images_per_shard] for start in range(0, len(source.files), images_per_shard)]
    finished = {entry.key for entry in draft.files.list(f"{WORK}rows/")}
    tasks = [
        {"index": index, "files": [(file.key, file.num_bytes) for file in group]}
        for index, group in enumerate(groups)
        if rows_key(index) not in finished
    ]
    if tasks:
        context.need_ray()
    packer = PackShard(source.store, draft.files)
    for result in map_shards(packer, tasks, label="packing", progress=context.progress):
        draft.note(result["key"], FileRecord(**result["file"]))
    manifest = pa.concat_tables([manifest_from_bytes(draft.files.read(rows_key(index))) for index in range(len(groups))])
    draft.put(MANIFEST, manifest_to_bytes(manifest))
    return manifest


def ingest(context: Context, config: IngestConfig) -> Artifact:
    """Make the raw artifacts of a recipe; returns the pool's."""
    pool = _ingest_one(context, config, "", config.pool)
    for suffix in ("curated", "labelled", "heldout", "pictures"):
        if uri := getattr(config, suffix):
            _ingest_one(context, config, suffix, uri)
    return pool


def _ingest_one(context: Context, config: IngestConfig, suffix: str, uri: str) -> Artifact:
    source = None if uri == _PHOTOGRAPHS else open_source(uri)
    if source is None:
        identity: dict[str, Any] = {"photographs": config.photographs.model_dump(mode="json"), "role": suffix or "pool"}
        if suffix == "curated":
            identity["crops_per_photograph"] = config.curated_crops_per_photograph
    else:
        identity = {"source_digest": source.digest}

    def work(draft: Draft, run: Run) -> Summary:
        with tempfile.TemporaryDirectory(prefix="heliostat-photographs-") as folder:
            if source is None:
                write_photographs(Path(folder) / "images", config, suffix)
                truth = Path(folder) / "images" / TRUTH
                if truth.is_file():
                    draft.put(TRUTH, truth.read_bytes())
            packed = source or open_source(str(Path(folder) / "images"))
            manifest = pack_source(context, draft, packed, config.images_per_shard)
        return Summary({"images": manifest.num_rows, "shards": len(set(manifest["shard"].to_pylist()))})

    ref = context.recipe.ref("raw", f"-{suffix}" if suffix else "")
    settings = {**identity, "images_per_shard": config.images_per_shard}
    return make(context, ref, stage="ingest", config=settings, inputs={}, work=work)


def write_photographs(folder: Path, config: IngestConfig, suffix: str) -> None:
    """Lay the demo's photographs below a folder as a user's own would lie there."""
    settings = config.photographs
    if not suffix:
        photographs.write_pool(folder, settings)
        return
    if suffix == "pictures":
        photographs.write_whole(folder)
        return
    region: photographs.Region = "right" if suffix == "heldout" else "left"
    count = config.curated_crops_per_photograph if suffix == "curated" else settings.crops_per_photograph
    seed = settings.seed + (1 if suffix == "curated" else 0)
    photographs.write_crops(folder, region, count=count, seed=seed)

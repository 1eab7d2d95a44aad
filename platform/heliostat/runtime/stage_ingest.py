"""ingest: image files, tars or Parquet files -> raw artifacts."""

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from heliostat.artifacts import WORK, Artifact, Draft, FileRecord, describe
from heliostat.curation.forget_list import read_forget_list
from heliostat.data import photograph_pool, photographs
from heliostat.data.manifest import join_manifests, manifest_to_bytes, read_manifest
from heliostat.data.packing import Packed, Packing, group_files, index_in_place, pack_container, pack_files, reasons
from heliostat.data.quarantine import QUARANTINE, Rejection, quarantine_from_bytes, quarantine_to_bytes
from heliostat.data.sources import Source, SourceFile, open_source
from heliostat.data.tar_index import Account
from heliostat.errors import DataError, UsageError
from heliostat.runtime.pipelines import Context, Summary, make
from heliostat.runtime.progress import Progress
from heliostat.runtime.recipe import SETS, IngestConfig
from heliostat.runtime.shards import map_shards
from heliostat.storage import Store
from heliostat.tracking import Run

MANIFEST = "manifest.parquet"
TRUTH = "truth.json"
_PHOTOGRAPHS = "photographs"


@dataclass(frozen=True)
class PackTask:
    """Does one task: image files -> one shard, or one tar or Parquet file -> its shards. The manifest rows come last."""

    source: Source
    files: Store
    packing: Packing
    in_place: bool

    def __call__(self, task: Mapping[str, Any]) -> Mapping[str, Any]:
        """task: index, files [(key, bytes, label)]."""
        index, files = task["index"], [SourceFile(*file) for file in task["files"]]
        written: dict[str, Any] = {}

        def put(key: str, data: bytes) -> None:
            self.files.put(key, data)
            written[key] = describe(data).model_dump()

        if self.source.kind == "images":
            packed = pack_files(self.source.store, files, index, self.packing, put)
        elif self.in_place:
            packed = index_in_place(self.source, files[0])
        else:
            packed = pack_container(self.source, files[0], index, self.packing, put)
        self._finish(index, packed)
        return {"index": index, "written": written}

    def _finish(self, index: int, packed: Packed) -> None:
        self.files.put(_work_key("quarantine", index), quarantine_to_bytes(packed.rejections))
        self.files.put(_work_key("account", index, "json"), json.dumps(asdict(packed.account)).encode())
        self.files.put(rows_key(index), manifest_to_bytes(packed.rows))


def rows_key(index: int) -> str:
    """Where the manifest rows of a finished task lie until the artifact is complete."""
    return _work_key("rows", index)


def _work_key(what: str, index: int, suffix: str = "parquet") -> str:
    return f"{WORK}{what}/{index:06d}.{suffix}"


def pack_source(context: Context, draft: Draft, source: Source, packing: Packing, *, in_place: bool = False) -> Summary:
    """Pack a source into the draft's shards, skipping what is done, and write the manifest and the quarantine.

    Raises DataError when no image is left, or when something vanished on the way.
    """
    is_packed = source.kind == "images"
    groups = group_files(source, packing) if is_packed else [range(index, index + 1) for index in range(len(source.keys))]
    finished = {entry.key for entry in draft.files.list(f"{WORK}rows/")}
    waiting = [index for index in range(len(groups)) if rows_key(index) not in finished]
    tasks = [
        {"index": index, "files": [(file.key, file.num_bytes, file.label) for file in source.files[_slice(groups[index])]]}
        for index in waiting
    ]
    if tasks:
        context.need_ray()
    light = Source(source.store, source.kind, (), ())  # the workers need where and what, not a million names
    function = PackTask(light, draft.files, packing, in_place)
    for result in map_shards(function, tasks, label="packing", progress=context.progress):
        for key, file in result["written"].items():
            draft.note(key, FileRecord(**file))
    return _assemble(context.progress, draft, source, len(groups))


def _slice(numbers: range) -> slice:
    return slice(numbers.start, numbers.stop)


@dataclass(frozen=True)
class Assembled:
    """What the tasks left behind, joined."""

    manifest: pa.Table
    rejections: list[Rejection]
    account: Account

    @property
    def num_unreadable(self) -> int:
        """Packed images whose header cannot be read; they have a rejection too."""
        return int(self.manifest.num_rows - (pc.sum(pc.greater(self.manifest["width"], 0)).as_py() or 0))


def assemble(draft: Draft, num_tasks: int, rejected: Sequence[Rejection] = ()) -> Assembled:
    """Join the manifest rows, rejections and accounts of all tasks. rejected: what was turned away before any task.

    Raises DataError when what came in is not what is there.
    """
    tasks = range(num_tasks)
    manifest = join_manifests([read_manifest(draft.files, rows_key(index)) for index in tasks])
    rejections = list(rejected)
    total = Account(num_in=len(rejections), num_rejected=len(rejections))
    for index in tasks:
        rejections += quarantine_from_bytes(draft.files.read(_work_key("quarantine", index)))
        total += Account(**json.loads(draft.files.read(_work_key("account", index, "json"))))
    total.check(str(draft.ref))
    return Assembled(manifest, rejections, total)


def put_raw(draft: Draft, found: Assembled) -> Summary:
    """Write the manifest and the quarantine of a raw artifact."""
    draft.put(MANIFEST, manifest_to_bytes(found.manifest))
    draft.put(QUARANTINE, quarantine_to_bytes(found.rejections))
    shards = pc.count_distinct(found.manifest["shard"]).as_py()
    num_quarantined = found.account.num_rejected + found.num_unreadable
    quarantined = {"quarantined": num_quarantined} if num_quarantined else {}
    return Summary({"images": found.manifest.num_rows, "shards": shards, **quarantined})


def _assemble(progress: Progress, draft: Draft, source: Source, num_tasks: int) -> Summary:
    """Join what the tasks left behind, and check that everything that came in is there."""
    found = assemble(draft, num_tasks, source.rejected)
    num_rows, rejections = found.manifest.num_rows, found.rejections
    if source.kind != "parquet":  # there one entry stands for all rows of a damaged group
        num_quarantined = found.account.num_rejected + found.num_unreadable
        Account(num_rows + num_quarantined, num_rows, 0, len(rejections)).check(str(draft.ref))
    _say(progress, source, found.account, found.num_unreadable, rejections)
    if num_rows == found.num_unreadable:
        first = min(rejections).detail if rejections else "it is empty"
        raise DataError(f"{source.store.uri} holds no image that can be packed: {first}")
    return put_raw(draft, found)


def _say(progress: Progress, source: Source, total: Account, num_unreadable: int, rejections: list[Rejection]) -> None:
    what = {"images": "files", "tars": "members", "parquet": "rows"}[source.kind]
    parts = [f"{total.num_images - num_unreadable:,} images"]
    parts += [f"{total.num_sidecars:,} sidecars"] if total.num_sidecars else []
    parts += [f"{total.num_rejected + num_unreadable:,} quarantined"]
    why = ", ".join(f"{count:,} {reason}" for reason, count in reasons(rejections).items())
    progress.say(f"          {total.num_in:,} {what} in = {' + '.join(parts)}{f' ({why})' if why else ''}")
    if passed_over := source.describe_passed_over():
        progress.say(f"          {passed_over}")


def ingest(context: Context, config: IngestConfig) -> Artifact:
    """Make the raw artifacts of a recipe; returns the pool's, or the first when a crawl makes the pool."""
    sources = {"": config.pool, **{suffix: getattr(config, suffix) for suffix in SETS}}
    made = [_ingest_one(context, config, suffix, uri) for suffix, uri in sources.items() if uri]
    if not made:
        raise UsageError(f"ingest names no source; give ingest.pool or one of ingest.{', ingest.'.join(SETS)}")
    return made[0]


def _ingest_one(context: Context, config: IngestConfig, suffix: str, uri: str) -> Artifact:
    source = None if uri == _PHOTOGRAPHS else open_source(uri)
    if source is None:
        identity: dict[str, Any] = {"photographs": config.photographs.model_dump(mode="json"), "role": suffix or "pool"}
        if suffix == "curated":
            identity["crops_per_photograph"] = config.curated_crops_per_photograph
    else:
        identity = {"source_digest": source.digest}
    in_place = _is_in_place(config, source, uri)
    if in_place and source is not None:
        identity["place_digest"] = hashlib.sha256(source.store.uri.encode()).hexdigest()  # paths are in no record
    refusal = read_forget_list(context.artifacts.store)
    packing = Packing(config.images_per_shard, config.shard_bytes, config.format, None if refusal.is_empty else refusal)

    def work(draft: Draft, run: Run) -> Summary:
        with tempfile.TemporaryDirectory(prefix="heliostat-photographs-") as folder:
            if source is None:
                write_photographs(Path(folder) / "images", config, suffix)
                truth = Path(folder) / "images" / TRUTH
                if truth.is_file():
                    draft.put(TRUTH, truth.read_bytes())
            packed = source or open_source(str(Path(folder) / "images"))
            return pack_source(context, draft, packed, packing, in_place=in_place)

    ref = context.recipe.ref("raw", f"-{suffix}" if suffix else "")
    settings = identity if in_place else {**identity, **packing.settings}
    return make(context, ref, stage="ingest", config=settings, inputs={}, work=work)


def _is_in_place(config: IngestConfig, source: Source | None, uri: str) -> bool:
    if not config.in_place:
        return False
    if source is None or source.kind != "tars":
        raise UsageError(f"in_place=true works for tars, and {uri} holds none; leave it out and the images are copied")
    return True


def write_photographs(folder: Path, config: IngestConfig, suffix: str) -> None:
    """Lay the demo's photographs below a folder as a user's own would lie there."""
    settings = config.photographs
    if not suffix:
        photograph_pool.write_pool(folder, settings)
        return
    if suffix == "evaluation":
        photograph_pool.write_evaluation(folder, settings)
        return
    if suffix == "pictures":
        photographs.write_whole(folder)
        return
    region: photographs.Region = "right" if suffix == "heldout" else "left"
    count = config.curated_crops_per_photograph if suffix == "curated" else settings.crops_per_photograph
    seed = settings.seed + (1 if suffix == "curated" else 0)
    photographs.write_crops(folder, region, count=count, seed=seed)

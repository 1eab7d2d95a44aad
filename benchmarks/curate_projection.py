"""What curating a crawl of any size costs: a formula over what curate.py measures and assumptions that are all named here.

Left out, each below a hundredth of the whole: fitting centroids, connected components, k-means, balance. Left out because they
depend on the crawl and on the sets: fetching, retrieval, encoding again what is blurred, packing.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from heliostat.config import StrictModel
from heliostat.curation.buckets import bucket_record
from heliostat.curation.copies_config import JoinConfig
from heliostat.models.config import BackboneConfig
from heliostat.models.flops import backbone_forward_flops

SEMANTIC = {
    "ViT-L/14": BackboneConfig(arch="vit_large", patch_size=14),
    "ViT-H/16": BackboneConfig(embed_dim=1280, depth=32, num_heads=16, patch_size=16),
}
"""Semantic embedders, at 224 pixels. DINOv2 A: a self-supervised ViT-H/16."""

PEAK_FLOPS = {"H100": 989e12, "A100": 312e12}
"""Dense bfloat16, from the maker's data sheets; as in runtime/dry_run.py."""

_RUN_BYTES = 2**28  # of one range read: data/shard_reader.py, image_runs
_PIECE_ROWS = 65_536  # of one piece of a manifest: curation/features.py


class Assumptions(StrictModel):
    """Everything in the projection that is not measured. Prices are of 2026-11, rounded, of no provider in particular."""

    num_images: int = 1_200_000_000
    """Images in the pool (DINOv2: 1.2 billion unique images before curation)."""

    core_busy_ratio: float = 0.85
    """Share of the paid core time that does this work; the rest waits, starts, or is repeated. Assumption, not studied."""

    model_utilisation: float = 0.35
    """Share of a GPU's peak that a forward pass reaches. Assumption: that of runtime/dry_run.py for training."""

    join_utilisation: float = 0.10
    """Share of a GPU's peak that the join reaches: at 256 values a product is bound by the memory it is searched in.
    Assumption, not measured."""

    images_per_task: int = 4096
    """embed.images_per_task."""

    edges_per_image: float = 5.0
    """Pairs above the floor that the join keeps. Assumption; crawls differ."""

    bytes_per_edge: float = 20.0
    """Of the Parquet files of edges before compression: two rows and a similarity."""

    ledger_bytes_per_image: float = 250.0
    """Of the ledger. Assumption: the plan of the ledger, not measured here."""

    months_kept: float = 1.0
    """How long features, edges and ledger are paid for."""

    shuffle_days: float = 3.0
    """How long the vectors in buckets lie in the store."""

    core_hour_dollars: float = 0.045
    """A vCPU with its memory, on demand. Assumption."""

    h100_hour_dollars: float = 3.0
    """Assumption: between large providers (more) and specialists (less)."""

    a100_hour_dollars: float = 1.5
    """Assumption, as above."""

    gigabyte_month_dollars: float = 0.023
    """Object storage. Assumption: the usual list price of the first tier."""

    thousand_puts_dollars: float = 0.005
    """Writing requests. Assumption: the usual list price."""

    thousand_gets_dollars: float = 0.0004
    """Reading requests. Assumption: the usual list price. Traffic within a region is free."""

    def gpu_hour_dollars(self, card: str) -> float:
        """Of a kind of GPU."""
        return {"H100": self.h100_hour_dollars, "A100": self.a100_hour_dollars}[card]


@dataclass(frozen=True)
class Measured:
    """What curate.py found. cpu_ms: CPU milliseconds an image by part of the pass.

    prepare_ms: of making pixels ready for a network on a GPU, `copy` and `semantic`. image_bytes, feature_bytes: of a file, and
    of a row of features without vectors. dimension, copy_flops: of the copy network (a forward is two, the mirror image too).
    join_rate, assign_rate: FLOP/s of one core in `similar_pairs` and `nearest_centroids`.
    """

    cpu_ms: Mapping[str, float]
    prepare_ms: Mapping[str, float]
    image_bytes: float
    feature_bytes: float
    dimension: int
    copy_flops: float
    join_rate: float
    assign_rate: float


@dataclass(frozen=True)
class JoinWork:
    """What the bucket join does. products: vectors times centroids; comparisons: pairs of vectors; the rest counts objects."""

    products: float
    comparisons: float
    strips: int
    tasks: int
    buckets: int


def join_work(num_images: int, join: JoinConfig) -> JoinWork:
    """Expected work with even buckets: each image is in `overlap` of them, and a bucket that is too large is split likewise."""
    buckets = max(1, min(join.max_buckets, math.ceil(num_images / join.bucket_rows)))
    memberships = num_images * min(join.overlap, buckets)
    members, products = memberships / buckets, float(num_images) * buckets
    tasks = math.ceil(buckets / max(1, int(join.rows_per_task // members)))
    while members > join.max_bucket_rows:
        children = math.ceil(members / join.bucket_rows)
        overlap = min(join.overlap, children)
        products += memberships * children
        memberships, members = memberships * overlap, members * overlap / children
    return JoinWork(products, memberships * members / 2, math.ceil(num_images / join.rows_per_strip), tasks, buckets)


@dataclass(frozen=True)
class Line:
    """One line of a bill. gigabyte_months: stored; puts, gets: requests."""

    name: str
    core_hours: float = 0.0
    gpu_hours: float = 0.0
    gigabyte_months: float = 0.0
    puts: float = 0.0
    gets: float = 0.0

    def dollars(self, prices: Assumptions, card: str | None) -> float:
        """card: the kind of GPU, None without."""
        gpus = self.gpu_hours * prices.gpu_hour_dollars(card) if card else 0.0
        storage = self.gigabyte_months * prices.gigabyte_month_dollars
        requests = self.puts / 1000 * prices.thousand_puts_dollars + self.gets / 1000 * prices.thousand_gets_dollars
        return self.core_hours * prices.core_hour_dollars + gpus + storage + requests


def project(
    measured: Measured,
    assumed: Assumptions,
    *,
    card: str | None = None,
    semantic: BackboneConfig | None = None,
    join: JoinConfig | None = None,
) -> list[Line]:
    """The bill, line by line. card: the kind of GPU that runs networks and the join, None for CPUs alone.

    semantic: the semantic embedder, which needs a card.
    """
    if semantic is not None and card is None:
        raise ValueError("a semantic embedder is projected on GPUs; name the card")
    join = join or JoinConfig()
    lines = [*_pass_lines(measured, assumed, card, semantic), *_join_lines(measured, assumed, card, join)]
    width = measured.dimension + (semantic.embed_dim if semantic else 0)
    features = (measured.feature_bytes + 2 * width) * assumed.num_images / 1e9
    edges = assumed.edges_per_image * assumed.bytes_per_edge * assumed.num_images / 1e9
    ledger = assumed.ledger_bytes_per_image * assumed.num_images / 1e9
    kept = (("features", features), ("edges", edges), ("ledger", ledger))
    return [*lines, *(Line(f"kept: {name}", gigabyte_months=size * assumed.months_kept) for name, size in kept)]


def _core_hours(seconds: float, assumed: Assumptions) -> float:
    return seconds / assumed.core_busy_ratio / 3600


def _pass_lines(measured: Measured, assumed: Assumptions, card: str | None, semantic: BackboneConfig | None) -> list[Line]:
    def core(milliseconds: float) -> float:
        return _core_hours(milliseconds / 1000 * assumed.num_images, assumed)

    def gpu(flops: float) -> float:
        return assumed.num_images * flops / (PEAK_FLOPS[card] * assumed.model_utilisation) / 3600 if card else 0.0

    parts = measured.cpu_ms
    tasks = math.ceil(assumed.num_images / min(assumed.images_per_task, max(1, int(_RUN_BYTES // measured.image_bytes))))
    pieces = math.ceil(assumed.num_images / _PIECE_ROWS)
    # A task reads its piece and its run; a write is read back once (storage/s3.py).
    requests = {"puts": float(tasks + pieces), "gets": 2.0 * tasks + tasks + pieces}
    lines = [Line("pass: read, verify, write", core(parts["read"] + parts["write"]), **requests)]
    lines += [Line(f"pass: {name}", core(parts[name])) for name in ("decode", "hash", "nsfw", "faces") if name in parts]
    if card is None:
        return [*lines, Line("pass: copy embedding", core(parts["copy"]))]
    lines.append(Line("pass: copy embedding", core(measured.prepare_ms["copy"]), gpu(measured.copy_flops)))
    if semantic is not None:
        flops = backbone_forward_flops(semantic, 224)
        lines.append(Line("pass: semantic embedding", core(measured.prepare_ms["semantic"]), gpu(flops)))
    return lines


def _join_lines(measured: Measured, assumed: Assumptions, card: str | None, join: JoinConfig) -> list[Line]:
    work = join_work(assumed.num_images, join)

    def hours(count: float, rate: float) -> dict[str, float]:
        flops = 2.0 * measured.dimension * count
        if card is None:
            return {"core_hours": _core_hours(flops / rate, assumed)}
        return {"gpu_hours": flops / (PEAK_FLOPS[card] * assumed.join_utilisation) / 3600}

    record = bucket_record(measured.dimension).itemsize
    shuffled = assumed.num_images * join.overlap * record / 1e9 * assumed.shuffle_days / 30
    blocks = math.ceil(join.rows_per_strip / assumed.images_per_task)
    ranges = math.ceil(assumed.num_images / join.rows_per_range)
    # A join task asks every strip for its offsets and for its share; a range of edges asks every join task likewise.
    return [
        Line(
            "join: vectors into buckets",
            **hours(work.products, measured.assign_rate),
            gigabyte_months=shuffled,
            puts=2.0 * work.strips,
            gets=work.strips * (blocks + 1.0 + 2.0),
        ),
        Line(
            "join: comparisons",
            **hours(work.comparisons, measured.join_rate),
            puts=2.0 * work.tasks + 3.0 * ranges,
            gets=2.0 * work.strips * work.tasks + 2.0 * work.tasks * ranges,
        ),
    ]


def offsets_traffic_bytes(num_images: int, join: JoinConfig) -> float:
    """Bytes that join tasks read to learn where their shares lie: all offsets of every strip, in every task."""
    work = join_work(num_images, join)
    return 8.0 * (work.buckets + 1) * work.strips * work.tasks


def total(lines: Sequence[Line]) -> Line:
    """The sum."""
    fields = ("core_hours", "gpu_hours", "gigabyte_months", "puts", "gets")
    return Line("together", **{name: sum(getattr(line, name) for line in lines) for name in fields})


def bill(lines: Sequence[Line], assumed: Assumptions, card: str | None) -> list[str]:
    """A table of the lines and their sum."""
    rows = [f"| | core-hours | {card or 'GPU'}-hours | GB-months | PUT, 1,000 | GET, 1,000 | dollars |", "|---|" + "---:|" * 6]
    for line in [*lines, total(lines)]:
        numbers = (line.core_hours, line.gpu_hours, line.gigabyte_months, line.puts / 1000, line.gets / 1000)
        cells = " | ".join(f"{value:,.0f}" if value >= 10 or value == 0 else f"{value:.1f}" for value in numbers)
        rows.append(f"| {line.name} | {cells} | {line.dollars(assumed, card):,.0f} |")
    return rows


def assumption_lines(assumed: Assumptions) -> list[str]:
    """Every assumption with its value and what is to be said about it."""
    rows = ["| assumption | value | |", "|---|---:|---|"]
    for name, info in type(assumed).model_fields.items():
        rows.append(f"| `{name}` | {getattr(assumed, name):,} | {' '.join((info.description or '').split())} |")
    return rows

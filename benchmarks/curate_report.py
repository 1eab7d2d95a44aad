"""The result file of curate.py: tables, and the projection with what is published by others beside it."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray
from curate_projection import (
    SEMANTIC,
    Assumptions,
    Measured,
    assumption_lines,
    bill,
    join_work,
    offsets_traffic_bytes,
    project,
    total,
)
from results_file import today, versions

from heliostat.curation.copies_config import JoinConfig
from heliostat.curation.features import LEAST_SIDE_PIXELS

Rounds = Mapping[str, Sequence[Mapping[str, float]]]

_CONCLUSIVE_SPREAD = 1.5  # greatest over least quotient of the rounds

PARTS = ("read", "decode", "hash", "nsfw", "faces", "copy", "write")
BARE, WHOLE, SCALED = "simplejpeg, nothing else", "data.decode, whole size", "data.decode, scaled as in the pass"
SCRIPT_PARTS = ("hash", "nsfw", "faces", "copy")


@dataclass(frozen=True)
class Size:
    """What was measured at one size in one process. found: CPU seconds by part of every side and round."""

    label: str
    images: int
    image_bytes: float
    found: Rounds
    changed: Mapping[str, float]
    measured: Measured


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median (least to greatest)."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def result(
    sizes: Sequence[Size],
    ray_costs: Mapping[str, Sequence[tuple[float, float]]],
    idle_and_cpus: tuple[float, int],
    loads: Sequence[tuple[float, float, float]],
    *,
    rounds: int,
    command: str,
) -> list[str]:
    """All lines."""
    load = "; ".join(", ".join(f"{value:.1f}" for value in one) for one in loads)
    lines = [
        f"# Curating a crawl, {today()}",
        "",
        f"{versions()}, Ray {ray.__version__}. Command: `{command}`. Medians of {rounds} interleaved "
        f"rounds ({len(next(iter(ray_costs.values())))} inside Ray), spread in brackets; quotients are taken within "
        "a round. Figures are CPU time.",
        "",
        f"Load averages before, between and after: {load}. A shared machine: quotients hold better than times. A core is one "
        "logical CPU of it.",
        "",
        "Caveats: cuts of 17 photographs, enlarged, with noise added, so that files have a camera's size; few faces; local "
        "shards, page cache warm; nothing is fetched from an object store. The detectors and the copy network run on the CPU. "
        "Tasks are of a sixth of the images where the default is 1,024, so read, write and bytes of a row are upper bounds.",
        "",
    ]
    for size in sizes:
        lines += _size_lines(size)
    lines += _ray_lines(ray_costs, *idle_and_cpus)
    return [*lines, *_projection_lines(sizes)]


def _size_lines(size: Size) -> list[str]:
    changed = size.changed
    lines = [
        f"## JPEG {size.label}, {size.image_bytes / 1000:.0f} kB, {size.images} images a round",
        "",
        "The gate: on the same pixels ours and the scripts gave the same ids, hashes, scores, numbers of faces and vectors "
        f"within float16. Where scripts decode whole images and the pass down to {LEAST_SIDE_PIXELS} pixels, hashes differ by "
        f"at most {changed['bits']:.0f} of 64 bits, vectors have a cosine of at least {changed['cosine']:.4f}, NSFW scores "
        f"differ by at most {changed['nsfw']:.3f}, and {changed['faces']:.0f} of {size.images} have another number of faces.",
        "",
        "| side | CPU ms an image | images per CPU-second | share of the bare loop's speed | of the same decoding's |",
        "|---|---|---|---|---|",
    ]
    for name, rows in size.found.items():
        cpu = [row["all"] / size.images * 1e3 for row in rows]
        shares = [
            spread([limit["all"] / row["all"] for limit, row in zip(size.found[other], rows, strict=True)], 3)
            for other in (BARE, WHOLE if name == "one script per question" else SCALED)
        ]
        lines.append(f"| {name} | {spread(cpu)} | {spread([1e3 / one for one in cpu], 1)} | {' | '.join(shares)} |")
    return [*lines, "", *_part_lines(size), "", *_script_lines(size), ""]


def _part_lines(size: Size) -> list[str]:
    rows = size.found["ours"]
    lines = ["Where our pass spends it:", "", "| part | CPU ms an image | share |", "|---|---|---|"]
    for part in PARTS:
        cpu = [row[part] / size.images * 1e3 for row in rows]
        lines.append(f"| {part} | {spread(cpu)} | {statistics.median(row[part] / row['all'] for row in rows):.1%} |")
    rest = statistics.median(1 - sum(row[part] for part in PARTS) / row["all"] for row in rows)
    share = {part: statistics.median(row[part] / row["all"] for row in rows) for part in PARTS}
    most = max(share, key=lambda part: share[part])
    return [
        *lines,
        f"| between the parts | | {rest:.1%} |",
        "",
        f"The bottleneck is {most} with {share[most]:.0%}; decoding is {share['decode']:.0%}.",
    ]


def _script_lines(size: Size) -> list[str]:
    ours, scripts = size.found["ours"], size.found["one script per question"]
    whole = spread([their["all"] / own["all"] for their, own in zip(scripts, ours, strict=True)])
    few = size.found["ours: hash, copy"]
    two = spread([(their["hash"] + their["copy"]) / own["all"] for their, own in zip(scripts, few, strict=True)])
    parts = ", ".join(f"{part} {spread([row[part] / size.images * 1e3 for row in scripts])}" for part in SCRIPT_PARTS)
    return [
        f"One script per question costs {whole} times our pass; hash and copy embedding alone, without detectors, {two} times. "
        f"Its scripts, CPU ms an image, decoding with Pillow each time: {parts}.",
    ]


def _ray_lines(costs: Mapping[str, Sequence[tuple[float, float]]], idle: float, num_cpus: int) -> list[str]:
    notes: list[str] = []
    lines = [
        "## Inside Ray Data",
        "",
        f"A local Ray of {num_cpus} CPUs. The cost of one more image: a run over all images less a run over the first third, "
        f"CPU time of the whole process tree, without the idle cluster ({idle * 1e3:.0f} CPU ms a second). Plain: "
        "`read_webdataset` with its default decoder, a map to float32 as a stage of its own, a map in an actor with the same "
        "instruments, `write_parquet`. Ours: the embed stage's `FeatureShard` through `RayTasks`. The gate: each gives what it "
        "gives without Ray.",
        "",
        "| size | ours, CPU ms an image | plain | plain / ours |",
        "|---|---|---|---|",
    ]
    for label, rows in costs.items():
        quotients = [theirs / own for own, theirs in rows]
        cells = (spread([own for own, _ in rows], 1), spread([theirs for _, theirs in rows], 1), spread(quotients))
        lines.append(f"| {label} | {' | '.join(cells)} |")
        if max(quotients) > _CONCLUSIVE_SPREAD * max(min(quotients), 0.0):
            notes.append(
                f"The quotient at {label} is INCONCLUSIVE: starting workers varies by more than the images cost; "
                "run it with more images on a quieter machine."
            )
    return [*lines, "", *notes, ""]


def _projection_lines(sizes: Sequence[Size]) -> list[str]:
    assumed = Assumptions()
    first = sizes[0].measured
    work = join_work(assumed.num_images, JoinConfig())
    lines = [
        f"## Projected to {assumed.num_images:,} images",
        "",
        "By formula (benchmarks/curate_projection.py) from the CPU times above; nothing below was run. Images of a crawl "
        "differ in size, and both sizes are given. Left out, each below a hundredth of the whole: fitting centroids, connected "
        "components, k-means, balance. Left out because they depend on the crawl and the sets: fetching, retrieval (10^6 "
        "queries are 3e18 FLOPs at 1,280 values), blurring, packing what stays.",
        "",
        f"The join by buckets at its defaults: {work.comparisons:.3g} comparisons (of {assumed.num_images**2 / 2:.3g} pairs) "
        f"and {work.products:.3g} products with centroids at {first.dimension} values; measured here on one core "
        f"{first.join_rate / 1e9:.0f} and {first.assign_rate / 1e9:.0f} GFLOP/s, searching included; "
        "comparisons run in bfloat16 on a CPU with matrix units. "
        "Copy network "
        f"{first.copy_flops / 1e9:.2f} GFLOP an image and its mirror image; pixels for it on a GPU "
        f"{first.prepare_ms['copy']:.2f} CPU ms, for a semantic embedder {first.prepare_ms['semantic']:.2f}. A row of "
        f"features without vectors {first.feature_bytes:.0f} bytes.",
        "",
        f"Its {work.tasks:,} tasks read all offsets of {work.strips:,} strips: "
        f"{offsets_traffic_bytes(assumed.num_images, JoinConfig()) / 1e12:,.0f} TB beside "
        f"{assumed.num_images * JoinConfig().overlap * (12 + 2 * first.dimension) / 1e12:,.0f} TB of vectors, and most of all "
        "requests. By the assumptions traffic within a region is free; its time is not counted. `join.rows_per_strip` "
        "divides both.",
        "",
    ]
    for size in sizes:
        lines += [
            f"### {size.label}, CPUs alone, copy embedding only",
            "",
            *bill(project(size.measured, assumed), assumed, None),
            "",
        ]
    for size in sizes:
        lines += _card_lines(size, assumed)
    detailed = project(first, assumed, card="H100", semantic=SEMANTIC["ViT-H/16"])
    lines += [f"### {sizes[0].label}, H100 and ViT-H/16, line by line", "", *bill(detailed, assumed, "H100"), ""]
    return [*lines, *_context_lines(assumed), "### Assumptions", "", *assumption_lines(assumed), ""]


def _card_lines(size: Size, assumed: Assumptions) -> list[str]:
    lines = [
        f"### {size.label}, networks and join on GPUs",
        "",
        "| GPU | semantic embedder | core-hours | GPU-hours | cores that keep one GPU busy | dollars |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for card in ("H100", "A100"):
        for name, semantic in {"none": None, **SEMANTIC}.items():
            whole = total(project(size.measured, assumed, card=card, semantic=semantic))
            ratio = whole.core_hours / whole.gpu_hours
            lines.append(
                f"| {card} | {name} | {whole.core_hours:,.0f} | {whole.gpu_hours:,.0f} | {ratio:,.0f} "
                f"| {whole.dollars(assumed, card):,.0f} |"
            )
    return [*lines, ""]


def _context_lines(assumed: Assumptions) -> list[str]:
    floors = {rate: assumed.num_images / rate * 8 / 3600 for rate in (350, 900)}
    return [
        "### Published by others, not measured here, and not the same work",
        "",
        "- DINOv2 (arXiv 2304.07193): deduplication and retrieval on 20 nodes of 8 V100-32GB in less than two days, at most "
        "7,680 V100-hours; embedding and decoding are not in it.",
        "- NeMo Curator gates its own nightly benchmark (decode, CLIP ViT-L/14, aesthetic score, write) at 350 images/s "
        f"by Ray Data and 900 by Xenna on 8 GPUs: for as many images {floors[350]:,.0f} and {floors[900]:,.0f} GPU-hours.",
        "",
    ]

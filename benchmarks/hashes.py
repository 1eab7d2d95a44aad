"""PCA hash beside pHash and PDQ on planted copies: recall per kind at no false merge and at 1 in 10,000 pairs, CPU time.

    python benchmarks/hashes.py            # needs: pip install pdqhash==0.2.8

Originals are tiles of the right halves of the demo's photographs; the shipped PCA hash was fitted on the left ones. Copies are
those of heliostat.data.planted_copies. A false merge is a pair of an original and another original or its copy. Pages of text
and films are shown apart: their pictures are not copies, and a thumbnail cannot tell some of them from one.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
import pdqhash
from results_file import cpu_hardware, today, versions, write_result

from heliostat.curation.features_config import HashConfig
from heliostat.curation.hash_copies import hash_copies
from heliostat.curation.pca_hash import COARSE_STEPS, HashColumns, PcaHash, thumbnail_of
from heliostat.curation.pca_hash_fit import random_thumbnails
from heliostat.data.config import DecodeConfig
from heliostat.data.decode import decode
from heliostat.data.photographs import photographs, video_frames
from heliostat.data.planted_copies import REPORT_ONLY, TRANSFORMS, planted_copy, planted_tiles

CONFIG = HashConfig()
PHASH_LIMIT, PDQ_LIMIT, PDQ_QUALITY = 6, 31, 50  # usual for pHash; PDQ's own documentation for PDQ
NUM_PAGES = 600
NUM_FIELDS = 20_000
Images = list[np.ndarray]
Distances = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Method:
    """hash: images to rows, NaN in the first column where an image is not to be merged; distances: rows x rows to a matrix."""

    name: str
    hash: Callable[[Images], np.ndarray]
    distances: Distances
    limit: float


def pca_rows(images: Images) -> np.ndarray:
    """Contrast gate, 64 bits and 16 coarse values as one float row."""
    columns = PcaHash.load().hash(np.stack([thumbnail_of(image) for image in images]))
    bits = np.unpackbits(columns.code.view(np.uint8).reshape(-1, 8), axis=1)
    gate = np.where(columns.contrast >= CONFIG.min_contrast, 0.0, np.nan)[:, None]
    return np.concatenate([gate, bits, columns.coarse], axis=1)


def pca_distances(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Larger of both distances, each in units of its limit: a copy is at most 1."""
    apart = ((rows[:, None, 65:] - others[None, :, 65:]) ** 2).sum(axis=2)
    coarse = np.sqrt(apart) / COARSE_STEPS / CONFIG.max_distance
    return np.maximum(bit_distances(rows[:, :65], others[:, :65]) / CONFIG.max_differing_bits, coarse)


def phash_rows(images: Images) -> np.ndarray:
    """The 64-bit DCT hash: 8 x 8 low frequencies of a grey 32 x 32 thumbnail against their median."""
    grey = [cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (32, 32), interpolation=cv2.INTER_AREA) for image in images]
    low = np.stack([cv2.dct(one.astype(np.float32))[:8, :8].ravel() for one in grey])
    return np.concatenate([np.zeros((len(low), 1)), low > np.median(low, axis=1, keepdims=True)], axis=1)


def pdq_rows(images: Images) -> np.ndarray:
    """256 bits of PDQ; low quality is not to be merged."""
    found = [pdqhash.compute(np.ascontiguousarray(image)) for image in images]
    gate = np.array([0.0 if quality >= PDQ_QUALITY else np.nan for _, quality in found])[:, None]
    return np.concatenate([gate, np.stack([bits for bits, _ in found])], axis=1)


def bit_distances(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Differing bits of all pairs; NaN (from the gates) where one is not to be merged."""
    a, b = rows[:, 1:] * 2.0 - 1, others[:, 1:] * 2.0 - 1
    return (a.shape[1] - a @ b.T) / 2 + rows[:, :1] + others[None, :, 0]


METHODS = (
    Method("PCA hash", pca_rows, pca_distances, 1.0),
    Method("pHash 64", phash_rows, bit_distances, PHASH_LIMIT),
    Method("PDQ 256", pdq_rows, bit_distances, PDQ_LIMIT),
)


def planted() -> tuple[Images, dict[str, Images]]:
    """(originals, kind -> their copies in the same order)."""
    originals = [tile.pixels for tile in planted_tiles("right")]
    copies: dict[str, Images] = {}
    for kind in TRANSFORMS:
        files = [planted_copy(image, kind, seed=1, number=number) for number, image in enumerate(originals)]
        copies[kind] = [decode(file.data, DecodeConfig()) for file in files]
    return originals, copies


def page(seed: int) -> np.ndarray:
    """A page of random letters in 23 lines: same layout, other text."""
    rng, image = np.random.default_rng(seed), np.full((600, 450, 3), 255, np.uint8)
    for line in range(60, 560, 22):
        text = "".join(rng.choice(list("abcdefg hij klm no pq rstu"), int(rng.integers(20, 34))))
        cv2.putText(image, text, (30, line), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (20, 20, 20), 1, cv2.LINE_AA)
    return image


def shape(seed: int) -> np.ndarray:
    """An ellipse of random size and colour on white: what a shop's picture of a plain product comes to at 32 pixels."""
    rng, image = np.random.default_rng(seed), np.full((300, 300, 3), 255, np.uint8)
    axes, colour = rng.integers(60, 121, 2).tolist(), rng.integers(0, 200, 3).tolist()
    return np.asarray(cv2.ellipse(image, (150, 150), axes, 0, 0, 360, colour, -1), np.uint8)


def other_pairs(distances: np.ndarray) -> np.ndarray:
    """Off-diagonal entries, gated ones as infinity."""
    return np.nan_to_num(distances[~np.eye(len(distances), dtype=bool)], nan=np.inf)


def recalls() -> list[str]:
    """A row for each kind: recall of each method at no false merge, at 1e-4, and at its working limit."""
    originals, copies = planted()
    table: dict[str, list[str]] = {kind: [] for kind in TRANSFORMS}
    summary: dict[str, list[str]] = {"all but the collage": [], "false merges at the limit": []}
    for method in METHODS:
        base = method.hash(originals)
        matrices = {kind: method.distances(base, method.hash(images)) for kind, images in copies.items()}
        wrong = [other_pairs(method.distances(base, base))]
        wrong += [other_pairs(matrix) for kind, matrix in matrices.items() if kind not in REPORT_ONLY]
        false = np.sort(np.concatenate(wrong))
        limits = (float(np.nextafter(false[0], -1)), float(false[len(false) // 10_000]), method.limit)
        found = {kind: np.nan_to_num(np.diag(matrix), nan=np.inf) for kind, matrix in matrices.items()}
        for kind, own in found.items():
            table[kind] += [f"{np.mean(own <= limit):.2f}" for limit in limits]
        total = np.concatenate([own for kind, own in found.items() if kind not in REPORT_ONLY])
        summary["all but the collage"] += [f"{np.mean(total <= limit):.2f}" for limit in limits]
        summary["false merges at the limit"] += ["0", "1e-4", f"{np.mean(false <= method.limit):.1e} of {len(false):,}"]
    return [f"| {kind} | " + " | ".join(cells) + " |" for kind, cells in (table | summary).items()]


def hard_negatives() -> list[str]:
    """Share of pairs within the working limit: pages of text, and film frames by the time between them."""
    pages, shapes = [page(seed) for seed in range(NUM_PAGES)], [shape(seed) for seed in range(NUM_PAGES)]
    frames = [frame for _, frame in video_frames(264)]
    rows = []
    for label, images, apart in (
        (f"{NUM_PAGES} pages of other text, all pairs", pages, None),
        (f"{NUM_PAGES} ellipses on white of other size and colour, all pairs", shapes, None),
        ("film frames next to each other", frames, 1),
        ("film frames 12 apart (half a second)", frames, 12),
        ("film frames 48 apart (two seconds)", frames, 48),
    ):
        cells = []
        for method in METHODS:
            hashed = method.hash(images)
            matrix = method.distances(hashed, hashed)
            values = other_pairs(matrix) if apart is None else np.nan_to_num(np.diag(matrix, apart), nan=np.inf)
            cells.append(f"{np.mean(values <= method.limit):.4f}")
        rows.append(f"| {label} | " + " | ".join(cells) + " |")
    return rows


def grouping() -> list[str]:
    """What `hash_copies` itself finds: candidates by shared blocks miss some pairs that are within the limits."""
    originals, copies = planted()
    kinds = [kind for kind in TRANSFORMS if kind not in REPORT_ONLY]
    images = originals + [image for kind in kinds for image in copies[kind]]
    columns = PcaHash.load().hash(np.stack([thumbnail_of(image) for image in images]))
    result = hash_copies(columns, np.arange(len(images)), CONFIG)
    source = np.tile(np.arange(len(originals)), len(kinds) + 1)
    dropped = np.flatnonzero(result.dropped)
    wrong_at = source[result.survivor] != source
    wrong = int(wrong_at.sum())
    no_frames = wrong - int(sum(kinds[row // len(originals) - 1] == "screenshot_frame" for row in dropped if wrong_at[row]))
    fields = PcaHash.load().hash(random_thumbnails(NUM_FIELDS, np.random.default_rng(1)))
    merged = int(hash_copies(fields, np.arange(NUM_FIELDS), CONFIG).dropped.sum())
    return [
        f"| {len(images)} originals and copies | {len(dropped)} | {wrong}, {no_frames} of them no screenshots |",
        f"| {NUM_FIELDS} random fields like photographs | {merged} | {merged} |",
    ]


def costs() -> list[str]:
    """CPU ms for each image from decoded pixels, the best of three rounds over the 17 photographs; and of the grouping."""
    images, rows = list(photographs().values()), []
    for method in METHODS:
        spent = []
        for _ in range(3):
            started = time.process_time()
            method.hash(images)
            spent.append((time.process_time() - started) / len(images) * 1e3)
        rows.append(f"| {method.name} | {min(spent):.2f} ms per image |")
    rng, num_images = np.random.default_rng(0), 1_000_000
    columns = HashColumns(
        rng.integers(0, 2**64, num_images, dtype=np.uint64),
        rng.integers(-60, 61, (num_images, 16)).astype(np.int8),
        np.full(num_images, 20.0, np.float32),
    )
    started = time.process_time()
    hash_copies(columns, rng.permutation(num_images), CONFIG)
    rows.append(
        f"| hash_copies, 10^6 different images | {(time.process_time() - started) / num_images * 1e6:.2f} µs per image |"
    )
    return rows


def main() -> None:
    """Run everything and write one result file."""
    cv2.setNumThreads(1)
    columns = " | ".join(f"{method.name}: none | 1e-4 | limit" for method in METHODS)
    lines = [
        f"# Hashes, {today()}",
        "",
        f"{versions()}, pdqhash 0.2.8. `python benchmarks/hashes.py`",
        "",
        f"Caveats: {len(planted_tiles('right'))} originals, tiles of 17 photographs, 112 to 200 pixels a side; thresholds of",
        "the first two columns are chosen on the same pairs, which favours every method alike. Limits: PCA hash at most",
        f"{CONFIG.max_differing_bits} bits and distance {CONFIG.max_distance}, contrast {CONFIG.min_contrast:g} or more; "
        f"pHash at most {PHASH_LIMIT} bits; PDQ at most {PDQ_LIMIT} bits, quality {PDQ_QUALITY} or more.",
        "",
        f"| recall at false merges: | {columns} |",
        "| --- |" + " --- |" * (3 * len(METHODS)),
        *recalls(),
        "",
        "| not copies, share of pairs within the limit | " + " | ".join(method.name for method in METHODS) + " |",
        "| --- |" + " --- |" * len(METHODS),
        *hard_negatives(),
        "",
        "| grouped by hash_copies | dropped | under a wrong survivor |",
        "| --- | --- | --- |",
        *grouping(),
        "",
        "| what | CPU |",
        "| --- | --- |",
        *costs(),
    ]
    write_result("hashes", lines, cpu_hardware())


if __name__ == "__main__":
    main()

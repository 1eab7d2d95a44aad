"""Descriptors side by side on one planted pool: each says how alike two images are, and the same truth scores them all.

A descriptor is scored pair by pair, without components: it finds a copy when copy and original are alike enough, and makes a
wrong merge when two images that have nothing to do with each other are. All pairs are compared, so this is for thousands of
images, not for a crawl. pHash is our own small reference; PDQ needs `pip install pdqhash` (MIT) and is for benchmarks only.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from heliostat.curation.copies_config import THUMBNAIL_LIMITS
from heliostat.curation.embed import ThumbnailEmbedder
from heliostat.curation.planted_score import Curve, Share, counts, pair_curve, share, share_by_kind
from heliostat.curation.planted_truth import DIFFERENT, PlantedTruth, read_truth
from heliostat.data.planted_copies import EASY, REPORT_ONLY
from heliostat.errors import DataError

# Shapes: N images, D dimension or bits, M planted copies, P pairs.

MAX_IMAGES = 20_000  # 2e8 pairs: about 100 seconds of one core per descriptor (arithmetic from 3,700 images)
_BLOCK_ROWS = 512
_CANDIDATES_PER_IMAGE = 64

Images = Sequence[NDArray[np.uint8]]
Description = tuple[NDArray[Any], NDArray[np.bool_]]


@dataclass(frozen=True)
class Descriptor:
    """A way to compare images.

    describe: images (H, W, 3) uint8 RGB -> vectors and whether each says anything. metric: "cosine" takes (N, D) float32,
    L2-normalised, and counts pairs whose similarity exceeds `threshold`; "hamming" takes (N, D) bool and counts pairs that
    differ in at most `threshold` bits. An image whose vector says nothing is alike to none.
    """

    describe: Callable[[Images], Description]
    metric: Literal["cosine", "hamming"]
    threshold: float


@dataclass(frozen=True)
class PairScore:
    """One descriptor on one pool, JSON-ready through `as_dict`.

    num_unusable: images whose vector says nothing. recall: of planted copies against their originals, report-only kinds left
    out. num_wrong_pairs: alike though they have nothing to do with each other; num_wrongly_merged: images in one such pair or
    more.
    curve: over the 64 most similar others of each image and all planted pairs.
    """

    threshold: float
    num_images: int
    num_unusable: int
    recall: Share
    easy_recall: Share
    recall_by_kind: Mapping[str, Share]
    num_wrong_pairs: int
    num_wrongly_merged: int
    wrong_pairs_by_kind: Mapping[str, int]
    wrong_pairs_by_transforms: Mapping[str, int]
    curve: Curve

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def perceptual_hashes(images: Images) -> Description:
    """pHash, (N, 64) bool: which of the 8 x 8 lowest frequencies of a 32 x 32 thumbnail exceed their median.

    As phash.org and imagededup define it (cosine transform of the luminance, median without the constant term); Zauner,
    Implementation and Benchmarking of Perceptual Image Hash Functions, 2010.
    """
    bits_N64 = np.empty((len(images), 64), np.bool_)
    for number, image in enumerate(images):
        small = cv2.resize(image, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
        low = cv2.dct(cv2.cvtColor(small, cv2.COLOR_RGB2GRAY))[:8, :8].ravel()
        bits_N64[number] = low > np.median(low[1:])
    return bits_N64, np.ones(len(images), np.bool_)


def pdq_hashes(images: Images) -> Description:
    """PDQ: (N, 256) bool; usable above quality 49, as its authors advise. DataError when pdqhash is not installed."""
    if not has_pdq():
        raise DataError("PDQ is not installed; run: pip install pdqhash")
    pdqhash = importlib.import_module("pdqhash")
    bits_ND, usable_N = np.zeros((len(images), 256), np.bool_), np.zeros(len(images), np.bool_)
    for number, image in enumerate(images):
        bits, quality = pdqhash.compute(np.ascontiguousarray(image))
        bits_ND[number], usable_N[number] = np.asarray(bits, np.bool_), quality > 49
    return bits_ND, usable_N


def has_pdq() -> bool:
    """Whether pdqhash can be imported."""
    return importlib.util.find_spec("pdqhash") is not None


def thumbnails(images: Images) -> Description:
    """`embed.ThumbnailEmbedder`; every image is usable."""
    return ThumbnailEmbedder()(images), np.ones(len(images), np.bool_)


def baseline_descriptors() -> dict[str, Descriptor]:
    """Name -> descriptor with its customary threshold: thumbnail, pHash, and PDQ where it is installed.

    pHash: 10 of 64 bits, the default of imagededup. PDQ: 31 of 256 bits, the distance that its authors recommend.
    """
    found = {
        "thumbnail": Descriptor(thumbnails, "cosine", THUMBNAIL_LIMITS.threshold),
        "pHash": Descriptor(perceptual_hashes, "hamming", 10),
    }
    return found | ({"PDQ": Descriptor(pdq_hashes, "hamming", 31)} if has_pdq() else {})


def baseline_table(
    images: Images, truth: Mapping[str, Any], methods: Mapping[str, Descriptor], *, sources: Sequence[str]
) -> dict[str, PairScore]:
    """Score several descriptors on the same images; images and sources in the same order, broken files left out."""
    return {name: score_pairs_by_descriptor(images, truth, method, sources=sources) for name, method in methods.items()}


def score_pairs_by_descriptor(
    images: Images, truth: Mapping[str, Any], descriptor: Descriptor, *, sources: Sequence[str]
) -> PairScore:
    """Score one descriptor at its threshold. Raises DataError for more than 20,000 images or when images and sources differ."""
    num_images = len(images)
    if num_images != len(sources) or num_images > MAX_IMAGES:
        raise DataError(f"{num_images} images and {len(sources)} names; give as many of each, at most {MAX_IMAGES:,}")
    table = read_truth(truth, sources)
    vectors_ND, usable_N = descriptor.describe(images)
    compare = _comparison(descriptor.metric, vectors_ND, usable_N)
    limit = descriptor.threshold if descriptor.metric == "cosine" else -descriptor.threshold - 0.5
    planted_M = np.concatenate(
        [np.diagonal(compare(table.copy_M[rows], table.original_M[rows])) for rows in _blocks(len(table.copy_M))]
        or [np.empty(0, np.float32)]
    )
    alike_P2, candidates = _all_pairs(compare, num_images, limit)
    wrong_P2 = alike_P2[table.relation(alike_P2[:, 0], alike_P2[:, 1]) == DIFFERENT]
    found_M = planted_M > limit
    counted_M, easy_M = ~np.isin(table.kind_M, list(REPORT_ONLY)), np.isin(table.kind_M, list(EASY))
    return PairScore(
        threshold=descriptor.threshold,
        num_images=num_images,
        num_unusable=int((~usable_N).sum()),
        recall=share(int(counted_M.sum()), int(found_M[counted_M].sum())),
        easy_recall=share(int(easy_M.sum()), int(found_M[easy_M].sum())),
        recall_by_kind=share_by_kind(table.kind_M, found_M),
        num_wrong_pairs=len(wrong_P2),
        num_wrongly_merged=len(np.unique(wrong_P2)),
        wrong_pairs_by_kind=counts(table.kinds_of_pairs(wrong_P2[:, 0], wrong_P2[:, 1])),
        wrong_pairs_by_transforms=counts(table.transforms_of_pairs(wrong_P2[:, 0], wrong_P2[:, 1])),
        curve=_curve_with_planted(table, candidates, planted_M),
    )


Comparison = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]]


def _comparison(metric: str, vectors_ND: NDArray[Any], usable_N: NDArray[np.bool_]) -> Comparison:
    """A function of two lists of rows that gives their similarities; bits that differ count negatively."""
    signs_ND = vectors_ND.astype(np.float32) if metric == "cosine" else np.where(vectors_ND, 1.0, -1.0).astype(np.float32)
    num_bits = signs_ND.shape[1]

    def compare(first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.float32]:
        products = signs_ND[first] @ signs_ND[second].T
        similarity = products if metric == "cosine" else (products - num_bits) / 2
        usable = usable_N[first][:, None] & usable_N[second]
        return np.where(usable, similarity, np.float32(-np.inf)).astype(np.float32)

    return compare


def _blocks(count: int) -> Iterator[NDArray[np.int64]]:
    for start in range(0, count, _BLOCK_ROWS):
        yield np.arange(start, min(start + _BLOCK_ROWS, count))


def _all_pairs(
    compare: Comparison, num_images: int, limit: float
) -> tuple[NDArray[np.int64], tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Pairs above the limit, each once, and the most similar others of each image with their similarities."""
    alike, candidates, similarities = [np.empty((0, 2), np.int64)], [np.empty((0, 2), np.int64)], [np.empty(0, np.float32)]
    everyone = np.arange(num_images)
    num_candidates = min(_CANDIDATES_PER_IMAGE, num_images - 1)
    for rows in _blocks(num_images):
        similarity = compare(rows, everyone)
        similarity[np.arange(len(rows)), rows] = -np.inf
        near, far = np.nonzero(similarity > limit)
        pairs = np.stack([rows[near], far], axis=1)
        alike.append(pairs[pairs[:, 0] < pairs[:, 1]])
        best = np.argpartition(-similarity, num_candidates - 1, axis=1)[:, :num_candidates] if num_candidates else far[:0, None]
        values = np.take_along_axis(similarity, best, axis=1) if num_candidates else similarity[:, :0]
        real = np.isfinite(values)
        candidates.append(np.stack([np.repeat(rows, num_candidates)[real.ravel()], best[real]], axis=1))
        similarities.append(values[real])
    return np.concatenate(alike), (np.concatenate(candidates), np.concatenate(similarities))


def _curve_with_planted(
    table: PlantedTruth, candidates: tuple[NDArray[np.int64], NDArray[np.float32]], planted_M: NDArray[np.float32]
) -> Curve:
    """The curve over the candidates and all planted pairs that say anything."""
    pairs_P2, similarity_P = candidates
    says_M = np.isfinite(planted_M)
    planted_pairs = np.stack([table.copy_M, table.original_M], axis=1)[says_M]
    return pair_curve(table, np.concatenate([pairs_P2, planted_pairs]), np.r_[similarity_P, planted_M[says_M]])

"""Copy descriptors side by side: our copy embedder, the classical thumbnail, pHash and PDQ.

    python benchmarks/copy_embedder.py [--pictures FOLDER] [--calibrate]

On the planted suite of the right halves of the demo's photographs, of which no pixel was trained or calibrated on: recall of
every kind of copy, wrong pairs by kind, precision and recall over all thresholds, CPU milliseconds per image. `--pictures` adds
a folder of real pictures in several sizes and shapes, one subfolder for each: every two files of a subfolder are a true pair.
`--calibrate` only prints the limits that the calibration pictures call for: copies above the lowest threshold with at most a
fifth of the thumbnail's wrong pairs at its own limit, contamination above the lowest with no more of them than it.
PDQ takes part where pdqhash is installed (`pip install pdqhash`).
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from results_file import cpu_hardware, versions, write_result

from heliostat.curation.copies_config import COPY_LIMITS
from heliostat.curation.copy_network import open_copy_embedder
from heliostat.curation.copy_pictures import calibration_scenes, drawn_family
from heliostat.curation.planted_baselines import (
    Description,
    Descriptor,
    PairScore,
    baseline_descriptors,
    score_pairs_by_descriptor,
)
from heliostat.data.config import DecodeConfig
from heliostat.data.decode import decode
from heliostat.data.photograph_pool import write_suite
from heliostat.data.photographs import PhotographCrop
from heliostat.data.planted_copies import REPORT_ONLY, TRANSFORMS, planted_tiles

_MIN_DEVIATION = 4.0
_FAMILIES = 6
Images = list[NDArray[np.uint8]]
_LARGEST_SIDE = 1024
_SUFFIXES = {".jpg", ".jpeg", ".png"}


def methods() -> dict[str, Descriptor]:
    """Ours, then the others, each at its threshold."""
    embedder = open_copy_embedder()

    def describe(images: Sequence[NDArray[np.uint8]]) -> Description:
        return embedder(images), np.ones(len(images), np.bool_)

    return {"copy": Descriptor(describe, "cosine", COPY_LIMITS.threshold), **baseline_descriptors()}


def described(descriptor: Descriptor, images: Images) -> tuple[Descriptor, float]:
    """The descriptor with its vectors of these images already made, and the CPU seconds per image that took."""
    started = time.process_time()
    found = descriptor.describe(images)
    return replace(descriptor, describe=lambda _: found), (time.process_time() - started) / len(images)


def written(tiles: Sequence[PhotographCrop], seed: int, per_kind: int | None) -> tuple[Images, dict[str, Any], list[str]]:
    """Images, truth and names of a planted suite."""
    with tempfile.TemporaryDirectory() as folder:
        truth = write_suite(Path(folder), tiles, seed=seed, per_kind=per_kind)
        files = [path for path in Path(folder).rglob("*") if path.is_file() and path.suffix != ".json"]
        sources = sorted(path.relative_to(folder).as_posix() for path in files)
        return [decode((Path(folder) / source).read_bytes(), DecodeConfig()) for source in sources], truth, sources


def calibration_tiles() -> list[PhotographCrop]:
    """Squares of the calibration scenes, and drawings; places that frames of a film share are neutral to each other."""
    tiles = []
    for label, scene in enumerate(calibration_scenes()):
        for image in scene[::5]:
            side = min(128 if min(image.shape[:2]) > 200 else 96, *image.shape[:2])
            for top in range(0, image.shape[0] - side + 1, side):
                for left in range(0, image.shape[1] - side + 1, side):
                    pixels = np.ascontiguousarray(image[top : top + side, left : left + side])
                    if pixels.std() > _MIN_DEVIATION:
                        tiles.append(PhotographCrop(f"scene{label}", label, pixels, left, top))
    rng = np.random.default_rng(77)
    for label in range(_FAMILIES):
        for place, drawing in enumerate(drawn_family(rng, 3)):
            tiles.append(PhotographCrop(f"drawing{label}", 1000 + label, drawing, 1000 * place, 0))
    return tiles


def calibrate() -> None:
    """Print wrong pairs and recall of the thumbnail at its limit, and of the copy embedder at thresholds around that."""
    images, truth, sources = written(calibration_tiles(), 1, 80)
    found = methods()
    thumbnail = score_pairs_by_descriptor(images, truth, found["thumbnail"], sources=sources)
    print(f"{len(images)} images; thumbnail: {thumbnail.num_wrong_pairs} wrong pairs, recall {thumbnail.recall.ratio:.3f}")
    copy, _ = described(found["copy"], images)
    for threshold in np.arange(0.6, 0.96, 0.02):
        score = score_pairs_by_descriptor(images, truth, replace(copy, threshold=float(threshold)), sources=sources)
        print(
            f"copy above {threshold:.2f}: {score.num_wrong_pairs} wrong pairs {dict(score.wrong_pairs_by_kind)}, "
            f"recall {score.recall.ratio:.3f}, identical, re-encoded, resized {score.easy_recall.ratio:.4f}"
        )


def table(scores: dict[str, PairScore]) -> list[str]:
    """Recall by kind, then wrong pairs by kind."""
    names = list(scores)
    lines = [f"| recall of | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for kind in TRANSFORMS:
        label = f"{kind} (reported only)" if kind in REPORT_ONLY else kind
        lines.append(f"| {label} | {' | '.join(f'{scores[name].recall_by_kind[kind].ratio:.3f}' for name in names)} |")
    rows = {
        "all counted kinds": lambda score: f"{score.recall.ratio:.3f}",
        "identical, re-encoded, resized": lambda score: f"{score.easy_recall.ratio:.4f}",
        "µAP": lambda score: f"{score.curve.average_precision:.3f}",
        "recall at precision 0.9": lambda score: f"{score.curve.recall_at_precision_90:.3f}",
        "wrong pairs": lambda score: str(score.num_wrong_pairs),
        "images in a wrong pair": lambda score: str(score.num_wrongly_merged),
        "images that say nothing": lambda score: str(score.num_unusable),
    }
    lines += [f"| **{label}** | {' | '.join(cell(scores[name]) for name in names)} |" for label, cell in rows.items()]
    kinds = sorted({kind for score in scores.values() for kind in score.wrong_pairs_by_kind})
    for kind in kinds:
        lines.append(f"| wrong: {kind} | {' | '.join(str(scores[name].wrong_pairs_by_kind.get(kind, 0)) for name in names)} |")
    return lines


def suite(descriptors: dict[str, Descriptor]) -> list[str]:
    """Scores on the planted suite of the right halves."""
    images, truth, sources = written(planted_tiles("right"), 0, None)
    scores, seconds = {}, {}
    for name, descriptor in descriptors.items():
        fixed, seconds[name] = described(descriptor, images)
        scores[name] = score_pairs_by_descriptor(images, truth, fixed, sources=sources)
        if name == "copy":
            low = replace(fixed, threshold=COPY_LIMITS.decontamination_threshold)
            scores[f"copy above {low.threshold:g}"] = score_pairs_by_descriptor(images, truth, low, sources=sources)
    times = ", ".join(f"{name} {1e3 * value:.1f}" for name, value in seconds.items())
    return [
        f"{len(images)} images: {len(truth['planted'])} copies and their originals, hard negatives.",
        f"Thresholds: {', '.join(f'{name} {score.threshold:g}' for name, score in scores.items())}.",
        "",
        *table(scores),
        "",
        f"CPU milliseconds per image, decoding left out: {times}.",
    ]


def read_small(path: Path) -> NDArray[np.uint8]:
    """RGB pixels, the longer side at most 1,024: what a descriptor sees of a wallpaper does not change, the time does."""
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise SystemExit(f"{path} is not an image")
    scale = min(1.0, _LARGEST_SIDE / max(image.shape[:2]))
    small = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else image
    return np.ascontiguousarray(small[:, :, ::-1], np.uint8)


def pictures(folder: Path, descriptors: dict[str, Descriptor]) -> list[str]:
    """Recall of true pairs and wrong pairs among real pictures of several sizes and shapes."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in _SUFFIXES)
    read = {path: read_small(path) for path in {file.resolve() for file in files}}
    images = [read[path.resolve()] for path in files]
    groups = np.unique([path.relative_to(folder).parts[0] for path in files], return_inverse=True)[1]
    upper = np.triu_indices(len(files), 1)
    is_true = groups[upper[0]] == groups[upper[1]]
    lines = [
        f"{len(files)} files of {groups.max() + 1} pictures, {is_true.sum()} true pairs of {len(is_true)}.",
        "",
        "| | threshold | recall | wrong pairs | precision | best F1 over thresholds |",
        "|---|---|---|---|---|---|",
    ]
    for name, descriptor in descriptors.items():
        vectors, usable = descriptor.describe(images)
        signs = vectors if descriptor.metric == "cosine" else np.where(vectors, 1.0, -1.0)
        similarity = signs @ signs.T
        limit = descriptor.threshold if descriptor.metric == "cosine" else signs.shape[1] - 2 * descriptor.threshold - 1
        similarity = np.where(usable[:, None] & usable[None, :], similarity, -np.inf)[upper]
        found = similarity > limit
        right = int((found & is_true).sum())
        order = np.argsort(-similarity, kind="stable")
        hits = np.cumsum(is_true[order])
        best = float((2 * hits / (np.arange(1, len(hits) + 1) + is_true.sum())).max())
        lines.append(
            f"| {name} | {descriptor.threshold:g} | {right / is_true.sum():.3f} | {int(found.sum()) - right} | "
            f"{right / max(1, int(found.sum())):.3f} | {best:.3f} |"
        )
    return lines


def main() -> None:
    """Run, and write results/copy_embedder_<hardware>_<date>.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=Path, default=None, help="a folder of real pictures, one subfolder for each")
    parser.add_argument("--calibrate", action="store_true", help="print what the limits follow from, and stop")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    if arguments.calibrate:
        calibrate()
        return
    descriptors = methods()
    lines = [
        "# Copy descriptors",
        "",
        "All pairs are compared; no components are built: a wrong pair here is an edge, not yet a lost image. Times are of a",
        "shared machine. A copy is found when it and its original are more alike than the threshold of the descriptor.",
        "",
        f"{versions()}; copy embedder version {open_copy_embedder().version}.",
        f"Limits: {COPY_LIMITS}.",
        "",
        "## Planted suite, right halves of the demo's photographs",
        "",
        *suite(descriptors),
    ]
    if arguments.pictures is not None:
        lines += ["", f"## Real pictures: {arguments.pictures.name}", "", *pictures(arguments.pictures, descriptors)]
    write_result("copy_embedder", lines, cpu_hardware())


if __name__ == "__main__":
    main()

"""One table: baselines, random weights and models, judged alike on held-out labelled images."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from heliostat.errors import DataError
from heliostat.evaluation.config import EvaluateConfig
from heliostat.evaluation.features import (
    backbone_features,
    grey_histogram_features,
    histogram_features,
    pixel_features,
    resize_all,
    to_grey,
)
from heliostat.evaluation.knn import knn_accuracy
from heliostat.evaluation.linear import linear_accuracy
from heliostat.models.config import BackboneConfig
from heliostat.models.stored import ModelInfo
from heliostat.models.vit import VisionTransformer

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class LabelledImages:
    """Decoded RGB images of any size with their class numbers, int64 (N,), and the names of the classes."""

    images: Sequence[Pixels]
    labels_N: NDArray[np.int64]
    names: tuple[str, ...]

    @classmethod
    def from_names(cls, images: Sequence[Pixels], labels: Sequence[str | None], names: Sequence[str] = ()) -> "LabelledImages":
        """Number the labels in sorted order, or in the order of `names`. Raises DataError for a missing or foreign label."""
        known = tuple(names) or tuple(sorted({label for label in labels if label is not None}))
        number = {name: index for index, name in enumerate(known)}
        for label in labels:
            if label not in number:
                raise DataError(f"label {label!r} is not one of the {len(known)} classes; lay images in one folder per class")
        return cls(images, np.array([number[label] for label in labels if label is not None], np.int64), known)


@dataclass(frozen=True)
class Candidate:
    """Weights to judge: what they are called, what they expect, and the backbone."""

    name: str
    info: ModelInfo
    backbone: VisionTransformer


@dataclass(frozen=True)
class Row:
    """One line of the table: accuracies in 0..1, mean and standard deviation over `num_seeds` sets of weights."""

    name: str
    version: str
    knn: float
    linear: float
    knn_std: float = 0.0
    linear_std: float = 0.0
    num_seeds: int = 1


FROM_SCRATCH = " from scratch"  # ends the name of a row whose student had no teacher

Features = Callable[[Pixels], NDArray[np.float32]]


class Judge:
    """Scores feature functions on one pair of labelled sets, in colour and in grey."""

    def __init__(self, bank: LabelledImages, heldout: LabelledImages, config: EvaluateConfig) -> None:
        self.bank, self.heldout, self._config = bank, heldout, config
        colour = resize_all(bank.images, config.image_size), resize_all(heldout.images, config.image_size)
        self.pixels = {"colour": colour, "grey": (to_grey(colour[0]), to_grey(colour[1]))}

    def score(self, features: Features, version: str) -> tuple[float, float]:
        """(k-NN, linear probe) accuracy of a feature function on one version of the images."""
        bank, heldout = (features(pixels) for pixels in self.pixels[version])
        labels, truth = self.bank.labels_N, self.heldout.labels_N
        knn = knn_accuracy(bank, labels, heldout, truth, config=self._config.knn)
        return knn, linear_accuracy(bank, labels, heldout, truth, config=self._config.linear)

    def features_of(self, candidate: Candidate) -> Features:
        """The class tokens of a candidate's backbone."""
        info = candidate.info
        return lambda pixels: backbone_features(
            candidate.backbone, pixels, mean=info.mean, std=info.std, batch_size=self._config.batch_size
        )

    def row(self, name: str, version: str, scores: Sequence[tuple[float, float]]) -> Row:
        """Mean and standard deviation over seeds."""
        knn, linear = np.array(scores).T
        spread = 1 if len(scores) > 1 else 0
        return Row(
            name,
            version,
            float(knn.mean()),
            float(linear.mean()),
            float(knn.std(ddof=1)) if spread else 0.0,
            float(linear.std(ddof=1)) if spread else 0.0,
            len(scores),
        )

    def baselines(self, version: str) -> list[Row]:
        """Raw pixels and a colour histogram."""
        histogram = histogram_features if version == "colour" else grey_histogram_features
        return [
            self.row("raw pixels", version, [self.score(pixel_features, version)]),
            self.row(
                f"{'colour' if version == 'colour' else 'luminance'} histogram", version, [self.score(histogram, version)]
            ),
        ]

    def random_weights(self, info: ModelInfo, version: str) -> Row:
        """The same architecture with freshly drawn weights, over `random_seeds` seeds."""
        scores = []
        for seed in range(self._config.random_seeds):
            candidate = Candidate("random weights", info, random_backbone(info.backbone, seed))
            scores.append(self.score(self.features_of(candidate), version))
        return self.row("random weights", version, scores)


def random_backbone(config: BackboneConfig, seed: int) -> VisionTransformer:
    """A backbone as it is before training; the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(10_000 + seed)
        return VisionTransformer(config).eval().requires_grad_(False)


def judge_all(judge: Judge, models: Sequence[Candidate], seeds: Sequence[Sequence[Candidate]]) -> list[Row]:
    """The whole table. `models` are single artifacts, `seeds` are groups of the same settings under several seeds.

    A candidate is judged on the version it was trained on; a version without candidates is left out.
    """
    rows: list[Row] = []
    for version in ("colour", "grey"):
        single = [one for one in models if version_of(one.info) == version]
        groups = [group for group in seeds if version_of(group[0].info) == version]
        if not single and not groups:
            continue
        first = single[0] if single else groups[0][0]
        rows += [*judge.baselines(version), judge.random_weights(first.info, version)]
        for one in single:
            rows.append(judge.row(one.name, version, [judge.score(judge.features_of(one), version)]))
        for group in groups:
            rows.append(judge.row(group[0].name, version, [judge.score(judge.features_of(one), version) for one in group]))
    return rows


def version_of(info: ModelInfo) -> str:
    """`grey` for a model that was trained without colour, else `colour`."""
    return "grey" if info.grayscale else "colour"


def margins(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """k-NN points of every model above random weights and above the best baseline of its version, in percentage points."""
    found = []
    for row in rows:
        same = [other for other in rows if other.version == row.version]
        random = next((other for other in same if other.name == "random weights"), None)
        fixed = [other for other in same if other.name in ("raw pixels", "colour histogram", "luminance histogram")]
        if random is None or row is random or row in fixed:
            continue
        best = max(fixed, key=lambda other: other.knn)
        found.append(
            {
                "name": row.name,
                "version": row.version,
                "num_seeds": row.num_seeds,
                "above_random_points": 100 * (row.knn - random.knn),
                "spread_points": 100 * float(np.hypot(row.knn_std, random.knn_std)),
                "above_best_baseline_points": 100 * (row.knn - best.knn),
                "best_baseline": best.name,
            }
        )
    return found


def scratch_margins(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """k-NN and probe points of every distilled student above the same student trained without the teacher."""
    found = []
    for scratch in rows:
        if not scratch.name.endswith(FROM_SCRATCH):
            continue
        name = scratch.name.removesuffix(FROM_SCRATCH)
        student = next(row for row in rows if row.name == name and row.version == scratch.version)
        knn, linear = 100 * (student.knn - scratch.knn), 100 * (student.linear - scratch.linear)
        found.append({"name": name, "version": scratch.version, "knn_points": knn, "linear_points": linear})
    return found


def scratch_lines(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """The same as sentences, whichever way it went."""
    return [
        f"{one['name']}: distillation {'beats' if one['knn_points'] > 0 else 'does not beat'} the same steps from scratch, "
        f"k-NN {one['knn_points']:+.1f} points, probe {one['linear_points']:+.1f} points ({one['version']})"
        for one in found
    ]


def rows_as_dicts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """JSON-ready rows."""
    return [asdict(row) for row in rows]

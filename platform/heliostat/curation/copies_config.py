"""Configuration of copy detection: the limits that decide about copies, and the join that finds similar pairs.

Sources: "DINOv2 A" is appendix A of arXiv 2304.07193. A default that is ours says so.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from heliostat.config import StrictModel
from heliostat.errors import ConfigError

Similarity = Annotated[float, Field(ge=-1.0, lt=1.0)]
Floor = Annotated[float, Field(gt=0.0, lt=1.0)]


@dataclass(frozen=True)
class CopyLimits:
    """Cosine similarities that decide about copies: see the fields of CopiesConfig with these names."""

    threshold: float
    min_similarity_to_representative: float
    decontamination_threshold: float


SSCD_LIMITS = CopyLimits(threshold=0.6, min_similarity_to_representative=0.5, decontamination_threshold=0.45)
"""DINOv2 A for SSCD embeddings; the guard is ours (assumption, not studied)."""

THUMBNAIL_LIMITS = CopyLimits(threshold=0.86, min_similarity_to_representative=0.7, decontamination_threshold=0.8)
"""For `thumbnail`: measured on crops of 17 photographs, see the top of curation/embed.py."""

COPY_LIMITS = CopyLimits(threshold=0.74, min_similarity_to_representative=0.64, decontamination_threshold=0.64)
"""For `copy`, our own network: measured on pictures that it was not trained on, see docs/concepts/copy_embedder.md."""

_FLOORS = {"thumbnail": THUMBNAIL_LIMITS.min_similarity_to_representative, "copy": 0.5}
_LIMITS = {"thumbnail": THUMBNAIL_LIMITS, "copy": COPY_LIMITS}


def limits_of(embedder: str) -> CopyLimits:
    """The limits of an embedder by its name; those of SSCD for embedders of others."""
    return _LIMITS.get(embedder, SSCD_LIMITS)


class CopiesConfig(StrictModel):
    """Copy graph, connected components, one representative each (DINOv2 A, self-deduplication)."""

    enabled: bool = True
    """Whether near copies are looked for at all."""

    neighbors: int = Field(default=64, gt=0)
    """Nearest images looked at per image, the image itself not counted (DINOv2 A: 64)."""

    threshold: Similarity | Literal["auto"] = "auto"
    """Two images are copies when their cosine similarity is above this. Every embedder has a scale of its own: `auto` is
    0.74 for `copy` (measured: docs/concepts/copy_embedder.md), 0.86 for `thumbnail` (measured: curation/embed.py) and 0.6 for
    any other (DINOv2 A, for SSCD embeddings)."""

    min_similarity_to_representative: Similarity | Literal["auto"] = "auto"
    """Guard against chains (A like B, B like C, A unlike C): a member less similar than this to its component's representative
    is split off into a further component. `auto` is 0.64 for `copy`, 0.7 for `thumbnail`, 0.5 for any other; -1 switches the
    guard off. Ours, not in DINOv2."""

    decontamination_threshold: Similarity | Literal["auto"] = "auto"
    """A component with a member above this similarity to an evaluation image is dropped whole. `auto` is 0.64 for `copy`, 0.8
    for `thumbnail`, 0.45 for any other (DINOv2 A)."""

    def limits(self, embedder: str) -> CopyLimits:
        """The limits in force for an embedder: those given, and its own where a field is `auto`."""
        own = limits_of(embedder)
        given = self.threshold, self.min_similarity_to_representative, self.decontamination_threshold
        defaults = own.threshold, own.min_similarity_to_representative, own.decontamination_threshold
        return CopyLimits(*(default if value == "auto" else value for value, default in zip(given, defaults, strict=True)))


class JoinConfig(StrictModel):
    """How similar pairs are found among all images: the self-join."""

    via: Literal["auto", "exact", "buckets", "faiss"] = "auto"
    """`exact` compares every pair; `buckets` compares within overlapping buckets, for any size of cluster; `faiss` asks an
    inverted file that one process holds; `auto` is exact up to `exact_max_rows` images and buckets beyond."""

    edge_floor: Floor | Literal["auto"] = "auto"
    """Pairs are stored from this similarity on, so that a threshold may later be moved anywhere above it without a new join.
    `auto` is 0.45 (the lowest threshold of DINOv2 A), 0.5 for `copy` and 0.7 for `thumbnail` (below all of their limits)."""

    neighbors: int = Field(default=64, gt=0)
    """A pair is stored when it is among the so many best of either image (DINOv2 A: 64)."""

    exact_max_rows: int = Field(default=1_000_000, ge=0)
    """Images up to which `auto` compares every pair: at 1M x 512 that is 5e14 multiply-adds, minutes on a core with matrix
    units or on a GPU, an hour on one without."""

    rows_per_strip: int = Field(default=65_536, gt=0)
    """Exact join: a task compares two strips of about this many rows; both and their pairs fit into memory (2 x 64 MiB at
    512)."""

    bucket_rows: int = Field(default=4_096, gt=0)
    """Buckets: images per bucket before overlap. More find more pairs and compare more (benchmarks/copies.py)."""

    overlap: int = Field(default=8, gt=0)
    """Buckets: each image goes to so many nearest buckets. More find more pairs, at the square of the cost."""

    max_buckets: int = Field(default=16_384, gt=0)
    """Buckets: centroids of the first level; with more images its buckets are larger and split in their own tasks."""

    max_bucket_rows: int = Field(default=131_072, gt=1)
    """Buckets: a bucket with more members than this, after overlap, is split again by centroids of its own."""

    rows_per_task: int = Field(default=1_000_000, gt=0)
    """Buckets: members handled by one task, several small buckets or one large one (1 KiB each at 512)."""

    rows_per_range: int = Field(default=1_000_000, gt=0)
    """Rows covered by one file of edges; a file is merged in memory (20 bytes a pair and image)."""

    num_probes: int = Field(default=64, gt=0)
    """FAISS: inverted lists read per image."""

    audit_rows: int = Field(default=1_000, gt=0)
    """Images whose pairs are looked up exactly afterwards, to report the share of edges found (about 5 edges each: +-1 %)."""

    def resolved(self, embedder: str) -> "JoinConfig":
        """The same with the floor of an embedder where it is `auto`."""
        if self.edge_floor != "auto":
            return self
        floor = _FLOORS.get(embedder, 0.45)
        return self.model_copy(update={"edge_floor": floor})

    @property
    def floor(self) -> float:
        """The floor as a number. Raises ConfigError while it is `auto`."""
        if self.edge_floor == "auto":
            raise ConfigError("edge_floor is auto, which depends on the embedder; resolve it or give a number such as 0.45")
        return self.edge_floor


class NearestConfig(StrictModel):
    """How the nearest images of a pool are found for query images: retrieval."""

    via: Literal["auto", "exact", "faiss"] = "auto"
    """`exact` compares every query with every image; `faiss` asks an inverted file for candidates and compares those exactly;
    `auto` is exact up to `exact_max_products` comparisons and FAISS beyond."""

    exact_max_products: int = Field(default=1_000_000_000_000, ge=0)
    """Queries times images up to which `auto` compares all: 2e15 operations at 1,024 values, half an hour on a core with matrix
    units, seconds on a GPU."""

    rows_per_strip: int = Field(default=65_536, gt=0)
    """Queries handled by one task, and images read at once."""

    strips_per_task: int = Field(default=16, gt=0)
    """Strips of images one task compares its queries with (exact)."""

    num_probes: int = Field(default=64, gt=0)
    """FAISS: inverted lists read per query."""

    candidates_per_neighbor: int = Field(default=8, gt=0)
    """FAISS: images taken from the index for each neighbour wanted, then compared exactly; PQ codes alone are too coarse."""

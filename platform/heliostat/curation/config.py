"""Configuration of the curate stage, one section per step, with the defaults of DINOv2 where it published one.

Sources: "DINOv2 A" is appendix A of arXiv 2304.07193. A default that is ours says so.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from heliostat.config import StrictModel

Similarity = Annotated[float, Field(ge=-1.0, lt=1.0)]


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


class EmbedConfig(StrictModel):
    """How an image becomes the vector that copies, retrieval and clusters compare."""

    embedder: str = "thumbnail"
    """`thumbnail` (our classical copy descriptor, no network), or an artifact (`model/name@version`) or path of a backbone."""

    image_size: int = Field(default=224, gt=0)
    """Side of the centre crop given to a backbone, in pixels; `thumbnail` has its own fixed size and ignores it."""

    batch_size: int = Field(default=64, gt=0)
    """Images per forward of a backbone; changes speed and memory, never the embeddings' meaning."""


class ExactConfig(StrictModel):
    """Files with the same bytes."""

    enabled: bool = True
    """Whether files of equal sha256 are reduced to one; the survivor has the smallest source name."""


class CopiesConfig(StrictModel):
    """Copy graph, connected components, one representative each (DINOv2 A, self-deduplication)."""

    enabled: bool = True
    """Whether near copies are looked for at all."""

    neighbors: int = Field(default=64, gt=0)
    """Nearest images looked at per image, the image itself not counted (DINOv2 A: 64)."""

    threshold: Similarity | Literal["auto"] = "auto"
    """Two images are copies when their cosine similarity is above this. Every embedder has a scale of its own: `auto` is
    0.86 for `thumbnail` (measured: curation/embed.py) and 0.6 for any other (DINOv2 A, for SSCD embeddings)."""

    min_similarity_to_representative: Similarity | Literal["auto"] = "auto"
    """Guard against chains (A like B, B like C, A unlike C): a member less similar than this to its component's representative
    is split off into a further component. `auto` is 0.7 for `thumbnail`, 0.5 for any other; -1 switches the guard off.
    Ours, not in DINOv2."""

    decontamination_threshold: Similarity | Literal["auto"] = "auto"
    """A component with a member above this similarity to an evaluation image is dropped whole. `auto` is 0.8 for `thumbnail`,
    0.45 for any other (DINOv2 A)."""

    def limits(self, embedder: str) -> CopyLimits:
        """The limits in force for an embedder: those given, and its own where a field is `auto`."""
        own = THUMBNAIL_LIMITS if embedder == "thumbnail" else SSCD_LIMITS
        given = self.threshold, self.min_similarity_to_representative, self.decontamination_threshold
        defaults = own.threshold, own.min_similarity_to_representative, own.decontamination_threshold
        return CopyLimits(*(default if value == "auto" else value for value, default in zip(given, defaults, strict=True)))


class RetrievalConfig(StrictModel):
    """Keep the pool images that resemble a curated set (DINOv2 A, table 15)."""

    mode: Literal["none", "sample", "cluster"] = "none"
    """`none` keeps the pool; `sample` takes the nearest pool images of each curated image (for large curated sets); `cluster`
    samples from the clusters that hold enough curated images (for small ones)."""

    neighbors: int = Field(default=4, gt=0)
    """Sample mode: pool images per curated image (DINOv2 A: 4 for ImageNet-22k and Landmarks, 32 for ImageNet-1k)."""

    num_clusters: int | Literal["auto"] = "auto"
    """Cluster mode: k of the k-means over the pool (DINOv2 A: 100,000 for 744M images); `auto` is the root of the pool size."""

    min_images_per_cluster: int = Field(default=3, ge=0)
    """Cluster mode: a cluster is matched when it holds MORE than this many curated images (DINOv2 A: more than 3)."""

    max_images_per_cluster: int = Field(default=10_000, gt=0)
    """Cluster mode: images sampled from each matched cluster, at most (DINOv2 A: 10,000)."""

    max_images: int = Field(default=1_000_000, gt=0)
    """Both modes: images one curated set may bring in, at most (DINOv2 A: 1M per set in cluster mode)."""


class ClustersConfig(StrictModel):
    """k-means over the surviving images; its clusters are the concepts that balance evens out."""

    num_clusters: int | Literal["auto"] = "auto"
    """k; `auto` is the square root of the number of images, rounded, at most 100,000 (ours, not studied)."""

    iterations: int = Field(default=20, gt=0)
    """Lloyd iterations, also of the cluster mode of retrieval (ours; FAISS's default is 25)."""

    seed: int = Field(default=0, ge=0)
    """Seed of the initial centroids and of FAISS's training sample."""


class BalanceConfig(StrictModel):
    """Even out the clusters by water-filling (arXiv 2405.15613, one level)."""

    target_images: int | Literal["auto", "all"] = "auto"
    """Images to keep. `all` keeps every one; `auto` cuts clusters at twice the mean cluster size (ours, not studied)."""


class CurateConfig(StrictModel):
    """The curate stage: embed, exact, copies, retrieval, clusters, balance, in this order."""

    embed: EmbedConfig = EmbedConfig()
    """The embedding."""

    exact: ExactConfig = ExactConfig()
    """Exact duplicates."""

    copies: CopiesConfig = CopiesConfig()
    """Near copies and decontamination."""

    retrieval: RetrievalConfig = RetrievalConfig()
    """Retrieval against a curated set."""

    clusters: ClustersConfig = ClustersConfig()
    """Clusters."""

    balance: BalanceConfig = BalanceConfig()
    """Balanced sampling."""

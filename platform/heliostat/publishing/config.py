"""Settings of the publish stage."""

from pydantic import Field

from heliostat.config import StrictModel


class PublishConfig(StrictModel):
    """What goes out, and what the card says about its use."""

    model: str = ""
    """Artifact to publish as model/name@version; empty takes the recipe's student, else its model."""
    license: str = "other"
    """Licence identifier of the weights, for the card (you own them: choose)."""
    intended_use: str = "Image features for retrieval, classification and dense tasks close to the training images."
    """One paragraph for the card."""
    parity_tolerance: float = Field(default=1e-5, gt=0)
    """Largest absolute difference allowed between the published file's features and the model's."""

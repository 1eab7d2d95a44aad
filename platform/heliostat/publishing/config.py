"""Settings of the publish stage."""

from typing import Literal

from pydantic import Field, field_validator

from heliostat.config import StrictModel

FormatName = Literal["fair", "huggingface", "timm", "onnx"]


class PublishConfig(StrictModel):
    """What goes out, and what the card says about its use."""

    model: str = ""
    """Artifact to publish as model/name@version; empty takes the recipe's student, else its model."""
    formats: tuple[FormatName, ...] = Field(default=("fair",), min_length=1)
    """What to write: fair (DINOv2's names, for heliostat), huggingface, timm, onnx; the last three need heliostat[export]."""
    license: str = "other"
    """Licence identifier of the weights, for the card (you own them: choose)."""
    intended_use: str = "Image features for retrieval, classification and dense tasks close to the training images."
    """One paragraph for the card."""
    parity_tolerance: float = Field(default=1e-4, gt=0)
    """Largest absolute difference allowed between the features of a published format, by its own library, and the model's."""

    @field_validator("model")
    @classmethod
    def _is_model(cls, model: str) -> str:
        if model and not model.startswith("model/"):
            raise ValueError(f"{model} is no model; name a model/name@version")
        return model

    @field_validator("formats")
    @classmethod
    def _once_each(cls, formats: tuple[FormatName, ...]) -> tuple[FormatName, ...]:
        if len(set(formats)) < len(formats):
            raise ValueError(f"a format is named twice; use [{', '.join(dict.fromkeys(formats))}]")
        return formats

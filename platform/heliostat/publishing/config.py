"""Settings of the publish stage."""

import re
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
    aliases: tuple[str, ...] = ("published",)
    """Aliases in MLflow's model registry that move to this version of the recipe's model (`models:/NAME@published`). MLflow
    itself resolves `models:/NAME/latest`."""
    parity_tolerance: float = Field(default=1e-4, gt=0)
    """Largest absolute difference allowed between the features of a published format, by its own library, and the model's."""

    @field_validator("model")
    @classmethod
    def _is_model(cls, model: str) -> str:
        if model and not model.startswith("model/"):
            raise ValueError(f"{model} is no model; name a model/name@version")
        return model

    @field_validator("aliases")
    @classmethod
    def _can_be_aliases(cls, aliases: tuple[str, ...]) -> tuple[str, ...]:
        for alias in aliases:
            if alias.lower() == "latest" or re.fullmatch(r"v\d+", alias, re.IGNORECASE):
                raise ValueError(f"aliases has {alias}, which MLflow keeps for itself (it always works); choose another word")
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", alias) or alias.isdigit():
                raise ValueError(f"aliases has {alias!r}; use letters, digits, - and _, at most 64, not digits alone")
        return aliases

    @field_validator("formats")
    @classmethod
    def _once_each(cls, formats: tuple[FormatName, ...]) -> tuple[FormatName, ...]:
        if len(set(formats)) < len(formats):
            raise ValueError(f"a format is named twice; use [{', '.join(dict.fromkeys(formats))}]")
        return formats

"""The model card: what the weights are, where they come from, how good they are, how to load them."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from heliostat.artifacts import ArtifactRecord
from heliostat.costs import cost_text
from heliostat.models.stored import ModelInfo
from heliostat.publishing.config import FormatName, PublishConfig
from heliostat.publishing.export import FORMATS
from heliostat.publishing.formats import NUM_IMAGES

_LIBRARY: dict[FormatName, str] = {"fair": "heliostat", "huggingface": "transformers", "timm": "timm", "onnx": "onnx"}


def render_card(
    *,
    record: ArtifactRecord,
    info: ModelInfo,
    config: PublishConfig,
    lineage: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    differences: Mapping[FormatName, float],
    total_costs: Mapping[str, float],
) -> str:
    """The card as Markdown with the front matter of the Hugging Face hub.

    differences: largest one for each format. total_costs: of the model and of every model that it was made from.
    """
    backbone = info.backbone
    parts = [
        _front_matter(config, list(differences)),
        f"# {record.name}, version {record.version}",
        config.intended_use,
        "## Model",
        "\n".join(
            [
                f"- architecture: {backbone.arch}, width {backbone.embed_dim}, {backbone.depth} blocks, "
                f"{backbone.num_heads} heads, patch {backbone.patch_size}, {backbone.num_register_tokens} registers, "
                f"native size {backbone.img_size} pixels",
                f"- training: {info.steps:,} steps, {info.images_seen:,} images seen, without labels",
                f"- pixels: {'luminance' if info.grayscale else 'RGB'} in 0..1, mean {list(info.mean)}, std {list(info.std)}",
                f"- code: heliostat {record.code_version}; fingerprint {record.fingerprint[:16]}",
            ]
        ),
        "## Accuracy",
        _table(rows) if rows else "Not evaluated.",
        "## Lineage",
        "```\n" + "\n".join(lineage) + "\n```",
        *_costs(record.costs, total_costs),
        "## Loading",
        "`images` is float32 (B, 3, H, W) with pixels as said above. Paths are relative to the folder of the release.",
        *(_loading(name, info) for name in differences),
        "## Parity",
        f"Every format was read back by its own library and compared with the model on {NUM_IMAGES} random images of "
        f"{backbone.img_size} pixels; the largest difference of any token is allowed to be {config.parity_tolerance:g}.",
        "\n".join(
            ["| format | largest difference |", "|---|---|", *(f"| {name} | {differences[name]:g} |" for name in differences)]
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _costs(own: Mapping[str, float], total: Mapping[str, float]) -> list[str]:
    """A section about what training has cost; none where nothing was counted."""
    if not total:
        return []
    lines = [f"- this model: {cost_text(own)}"] if own else []
    lines += [f"- with the models that it was made from: {cost_text(total)}"] if total != own else []
    explained = (
        "Energy is that of the devices times the PUE of the data centre, CO2 that times the intensity of the grid; what counts "
        "as an hour, a price or a watt stands in the section `costs` of the recipe."
    )
    return ["## Costs of training", "\n".join(lines), explained]


def _front_matter(config: PublishConfig, formats: Sequence[FormatName]) -> str:
    libraries = [_LIBRARY[name] for name in formats]
    tags = ["image-feature-extraction", "self-supervised", *libraries[1:]]
    return (
        f"---\nlicense: {_yaml_text(config.license)}\nlibrary_name: {libraries[0]}\n"
        f"pipeline_tag: image-feature-extraction\ntags:\n" + "\n".join(f"- {tag}" for tag in tags) + "\n---"
    )


def _loading(name: FormatName, info: ModelInfo) -> str:
    code = f"```python\n{FORMATS[name].loading(info)}\n```"
    return "\n\n".join([f"### With {_LIBRARY[name]}", code, *FORMATS[name].notes(info)])


def _yaml_text(text: str) -> str:
    """Text as YAML: plain where that is safe, else quoted as JSON."""
    return text if re.fullmatch(r"[A-Za-z][A-Za-z0-9.-]*", text) else json.dumps(text)


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| weights | version | k-NN % | linear probe % | seeds |", "|---|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| {row['name']} | {row['version']} | {100 * row['knn']:.1f} | {100 * row['linear']:.1f} | {row['num_seeds']} |"
        )
    return "\n".join(lines)

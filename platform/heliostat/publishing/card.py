"""The model card: what the weights are, where they come from, how good they are, how to load them."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from heliostat.artifacts import ArtifactRecord
from heliostat.models.stored import ModelInfo
from heliostat.publishing.config import PublishConfig

_LOADING = """```python
import json
from safetensors.torch import load_file
from heliostat.models.config import BackboneConfig
from heliostat.models.names import from_fair_names
from heliostat.models.vit import VisionTransformer

config = json.load(open("config.json"))
backbone = VisionTransformer(BackboneConfig(**config["architecture"]))
backbone.load_state_dict(from_fair_names(load_file("model.safetensors")))
features = backbone.eval()(images)  # (B, 3, H, W), normalised as config.json says
features.cls_BD, features.patches_BND
```"""


def render_card(
    *,
    record: ArtifactRecord,
    info: ModelInfo,
    config: PublishConfig,
    lineage: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    difference: float,
) -> str:
    """The card as Markdown with the front matter of the Hugging Face hub."""
    backbone = info.backbone
    parts = [
        f"---\nlicense: {_yaml_text(config.license)}\nlibrary_name: heliostat\n"
        "tags:\n- image-feature-extraction\n- self-supervised\n---",
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
        "## Loading",
        _LOADING,
        f"The published file was read back and compared on random images: largest difference {difference:g}.",
    ]
    return "\n\n".join(parts) + "\n"


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

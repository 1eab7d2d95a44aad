"""Opening an embedder by one word, reference or path: what stands in `embed.embedder` of a recipe.

    thumbnail                    the classical copy descriptor (curation/embed.py)
    copy                         our copy-detection network with the shipped weights (curation/copy_network.py)
    model/NAME@VERSION           the backbone of a model artifact of ours
    FILE.safetensors             weights that copy_training wrote, or a backbone
    FILE.pth, .bin, or a folder  a backbone of FAIR, Hugging Face, timm (models/public.py)
    FILE.pt, FILE.torchscript    TorchScript, such as SSCD's files
    FILE.onnx                    ONNX: (N, 3, H, W) float, or (N, H, W, 3) uint8 (curation/program_embedder.py)

Nothing is unpickled.
"""

from pathlib import Path

from heliostat.artifacts import ArtifactRef, ArtifactStore
from heliostat.curation.embed import BackboneEmbedder, Embedder, ThumbnailEmbedder
from heliostat.curation.program_embedder import OpenEmbedderConfig, is_torchscript, open_onnx, open_torchscript, version_of
from heliostat.errors import CheckpointError, UsageError

__all__ = ["OpenEmbedderConfig", "open_embedder"]

_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".torchscript", ".onnx")


def open_embedder(
    spec: str, config: OpenEmbedderConfig | None = None, *, artifacts: ArtifactStore | None = None, device: str = "cpu"
) -> Embedder:
    """The embedder that a word, an artifact or a path names; see the top of this file.

    artifacts: where `model/NAME@VERSION` is looked up. Raises UsageError for a name that is none of these, CheckpointError for
    a file that is missing, torn, foreign, or does not turn one image into one vector.
    """
    config = config or OpenEmbedderConfig()
    if spec == "thumbnail":
        return ThumbnailEmbedder()
    if spec == "copy":
        from heliostat.curation.copy_network import SHIPPED_WEIGHTS

        return _open_path(SHIPPED_WEIGHTS, config, device)
    if spec.startswith("model/"):
        return _open_artifact(spec, config, artifacts, device)
    path = Path(spec)
    if not path.exists():
        known = path.suffix in _SUFFIXES or "/" in spec
        raise (CheckpointError if known else UsageError)(
            f"embedder {spec!r}: no such file or folder; give thumbnail, copy, model/NAME@VERSION or an existing path"
        )
    return _open_path(path, config, device)


def _open_path(path: Path, config: OpenEmbedderConfig, device: str) -> Embedder:
    """The embedder of an existing file or folder."""
    if path.suffix == ".onnx":
        return open_onnx(path, config, device)
    if path.is_file() and is_torchscript(path):
        return open_torchscript(path, config, device)
    if path.suffix == ".safetensors" and _is_copy_network(path):
        from heliostat.curation.copy_network import open_copy_embedder

        return open_copy_embedder(path, device=device, batch_size=config.batch_size)
    return _open_public(path, config, device)


def _open_artifact(spec: str, config: OpenEmbedderConfig, artifacts: ArtifactStore | None, device: str) -> Embedder:
    from heliostat.models.stored import read_backbone

    if artifacts is None:
        raise UsageError(f"embedder {spec} is an artifact, and no store of artifacts was given; give the path of its weights")
    model = artifacts.load(ArtifactRef.parse(spec))
    backbone, info = read_backbone(model)
    size = _side(config, info.backbone.patch_size)
    version = version_of(model.record.fingerprint, image_size=size, mean=info.mean, std=info.std)
    return BackboneEmbedder(
        spec,
        info.backbone.embed_dim,
        backbone.to(device),
        mean=info.mean,
        std=info.std,
        image_size=size,
        batch_size=config.batch_size,
        device=device,
        version=version,
    )


def _side(config: OpenEmbedderConfig, patch_size: int) -> int:
    """The side that a backbone sees; raises UsageError when its patches do not divide it."""
    size = config.image_size or 224 // patch_size * patch_size
    if size % patch_size or not size:
        lower = max(1, size // patch_size) * patch_size
        upper = max(lower, patch_size * (size // patch_size + 1))
        raise UsageError(f"image_size {size} is not divisible by the patch size {patch_size}; use {lower} or {upper}")
    return size


def _is_copy_network(path: Path) -> bool:
    from heliostat.curation.copy_network import CONFIG_KEY
    from heliostat.models.weights import read_weights

    state, metadata = read_weights(path)
    return CONFIG_KEY in metadata and "stage1.0.conv.weight" in state


def _open_public(path: Path, config: OpenEmbedderConfig, device: str) -> Embedder:
    from heliostat.models.public import read_public_weights
    from heliostat.models.vit import VisionTransformer
    from heliostat.models.weights import load_state

    weights = read_public_weights(path)
    backbone = VisionTransformer(weights.config)
    load_state(backbone, weights.backbone, str(path))
    size = _side(config, weights.config.patch_size)
    return BackboneEmbedder(
        path.name,
        weights.config.embed_dim,
        backbone.eval().requires_grad_(False).to(device),
        mean=config.mean,
        std=config.std,
        image_size=size,
        batch_size=config.batch_size,
        device=device,
        version=version_of(weights.sha256, image_size=size, mean=config.mean, std=config.std),
    )

"""The backbone as an ONNX graph for images of its native size and any number of them, beside a description of its input."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from heliostat.models.config import BackboneConfig
from heliostat.models.stored import ModelInfo
from heliostat.models.vit import VisionTransformer
from heliostat.publishing.formats import Tokens, importing

FOLDER = "onnx"
LIBRARIES: tuple[str, ...] = ("onnx", "onnxscript", "onnxruntime")
MODEL = "model.onnx"
_PREPROCESSING = "preprocessing.json"
_OPSET = 20  # what torch 2.13's exporter writes without converting; onnxruntime reads it since 1.17
_ONE_FILE_BYTES = 1 << 30  # protobuf ends at 2 GiB; larger weights go to model.onnx.data beside the graph


class _Graph(nn.Module):
    """A backbone that returns plain tensors."""

    def __init__(self, backbone: VisionTransformer) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(B, C, H, W) -> cls (B, D), registers (B, R, D) if there are any, patches (B, N, D)."""
        features = self.backbone(images)
        registers = (features.registers_BRD,) if features.registers_BRD.shape[1] else ()
        return features.cls_BD, *registers, features.patches_BND


def refusal(config: BackboneConfig) -> str:
    """Nothing: the graph is computed, not described."""
    return ""


def output_names(config: BackboneConfig) -> list[str]:
    """The graph's outputs in order."""
    return ["cls", *(["registers"] if config.num_register_tokens else []), "patches"]


def write(backbone: VisionTransformer, info: ModelInfo, folder: Path) -> None:
    """Write `model.onnx` and `preprocessing.json`."""
    config = info.backbone
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in backbone.parameters())
    with warnings.catch_warnings():
        # torch.export copies its own tree specification, whose class torch itself has deprecated.
        warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated", category=FutureWarning)
        program: Any = torch.onnx.export(
            _Graph(backbone).eval(),
            (torch.zeros(2, config.in_chans, config.img_size, config.img_size),),
            dynamo=True,
            opset_version=_OPSET,
            input_names=["images"],
            output_names=output_names(config),
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            verbose=False,
        )
    program.save(folder / MODEL, external_data=num_bytes > _ONE_FILE_BYTES)
    _strip(folder / MODEL)
    (folder / _PREPROCESSING).write_text(json.dumps(_description(info), indent=1) + "\n", encoding="utf-8")


def _strip(path: Path) -> None:
    """Remove what the exporter notes beside every node: stack traces, with the paths of this machine in them."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
        part.ClearField("doc_string")
    onnx.save_model(model, path)
    onnx.checker.check_model(path)


def _description(info: ModelInfo) -> dict[str, Any]:
    size = info.backbone.img_size
    return {
        "input": "images",
        "shape": ["batch", info.backbone.in_chans, size, size],
        "dtype": "float32",
        "resize": {"shortest_edge": size, "interpolation": "bicubic", "center_crop": size},
        "grayscale": info.grayscale,
        "scale": 1 / 255,
        "mean": info.mean,
        "std": info.std,
        "outputs": output_names(info.backbone),
    }


def read_back(folder: Path, images_BCHW: Tensor) -> Tokens:
    """Tokens by onnxruntime: the first image alone, then the others together, so that two batch sizes are tried."""
    with importing("onnxruntime"):
        import onnxruntime
    session = onnxruntime.InferenceSession(folder / MODEL, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    runs = [session.run(None, {"images": images.numpy()}) for images in (images_BCHW[:1], images_BCHW[1:])]
    found = {name: torch.cat([torch.from_numpy(run[index]) for run in runs]) for index, name in enumerate(names)}
    no_registers = found["patches"][:, :0]
    return Tokens(found["cls"], found.get("registers", no_registers), found["patches"])


def notes(info: ModelInfo) -> list[str]:
    """The graph has one size."""
    return [f"The graph takes any number of images, of {info.backbone.img_size} x {info.backbone.img_size} pixels only."]


def loading(info: ModelInfo) -> str:
    """Python that runs the graph with onnxruntime."""
    size = info.backbone.img_size
    return f"""import onnxruntime

session = onnxruntime.InferenceSession("{FOLDER}/{MODEL}")
# images: float32 (B, 3, {size}, {size}), normalised as {FOLDER}/{_PREPROCESSING} says
cls, patches = session.run(["cls", "patches"], {{"images": images.numpy()}})"""

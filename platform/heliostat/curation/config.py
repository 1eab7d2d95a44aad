"""Configuration of the embed, dedup and curate stages; the sections of their steps lie beside the code of the steps."""

from pydantic import Field

from heliostat.config import StrictModel
from heliostat.curation.copies_config import CopiesConfig, JoinConfig
from heliostat.curation.features_config import DetectorsConfig, FaceBlurConfig, HashConfig, Probability
from heliostat.curation.open_embedder import OpenEmbedderConfig
from heliostat.curation.retrieval_config import BalanceConfig, ClustersConfig, RetrievalConfig
from heliostat.curation.sheets import SheetsConfig
from heliostat.data.config import DecodeConfig


class EmbedConfig(StrictModel):
    """One pass over the images, each decoded once: hashes, detectors, embeddings."""

    copy_embedder: str = "copy"
    """Makes the vectors that copies are found by: `copy` (our network, docs/concepts/copy_embedder.md), `thumbnail` (classical,
    without a network), `model/name@version`, or the path of weights or of a TorchScript or ONNX file such as SSCD's."""

    semantic_embedder: str = ""
    """Makes the vectors for retrieval and clusters: a backbone as `model/name@version` or by path (DINOv2 A: a self-supervised
    ViT-H/16). Empty: the copy embedding serves for both, which is cheap and knows looks rather than contents."""

    copy_options: OpenEmbedderConfig = OpenEmbedderConfig()
    """How pixels are prepared for a copy embedder of others."""

    semantic_options: OpenEmbedderConfig = OpenEmbedderConfig()
    """How pixels are prepared for the semantic embedder."""

    hash_fit: str = ""
    """Path of a PCA hash fitted on your own images, there on every node; empty is the one that comes with Heliostat."""

    detectors: DetectorsConfig = DetectorsConfig()
    """Detectors of unsafe content and of faces; off unless named."""

    batch_size: int = Field(default=64, gt=0)
    """Decoded images that are held and measured together; 256 MB of pixels end a batch too."""

    images_per_task: int = Field(default=1024, gt=0)
    """Images of one task and of one file of the result; give thousands where there are hundreds of millions."""

    device: str = "cpu"
    """Where embedders run: `cpu`, or `cuda` with `gpus_per_actor` above 0."""

    gpus_per_actor: float = Field(default=0.0, ge=0)
    """GPUs of one actor; several share one with a fraction. 0: as many actors as there are CPUs."""

    decode: DecodeConfig = DecodeConfig()
    """Limits on encoded images; what breaks them is dropped with its reason."""


class ExactConfig(StrictModel):
    """Files with the same bytes."""

    enabled: bool = True
    """Whether files of equal sha256 are reduced to one; the first of the pool stays, the bytes are the same."""


class DedupConfig(StrictModel):
    """The dedup stage: what must not be used, copies, evaluation images."""

    max_nsfw_score: Probability = 0.8
    """Images that score higher are dropped, where a detector has given a score. 0.8 is what the authors of open_nsfw call NSFW
    with high probability; they advise to choose it on your own images."""

    exact: ExactConfig = ExactConfig()
    """Exact duplicates."""

    hash: HashConfig = HashConfig()
    """Copies by PCA hash."""

    copies: CopiesConfig = CopiesConfig()
    """Near copies and decontamination."""

    join: JoinConfig = JoinConfig()
    """How similar pairs are found."""


class CurateConfig(StrictModel):
    """The curate stage: retrieval, clusters, balance, faces, packing, ledger, sheets."""

    retrieval: RetrievalConfig = RetrievalConfig()
    """Retrieval against curated sets."""

    clusters: ClustersConfig = ClustersConfig()
    """Clusters."""

    balance: BalanceConfig = BalanceConfig()
    """Balanced sampling."""

    faces: FaceBlurConfig = FaceBlurConfig()
    """Faces in the images that stay."""

    sheets: SheetsConfig = SheetsConfig()
    """Contact sheets to review by eye."""

    ledger_rows_per_file: int = Field(default=2**20, gt=0)
    """Rows of one file of the ledger."""

    core_hour_price: float = Field(default=0.04, ge=0)
    """US dollars of one CPU core for an hour, for the costs in the report (assumption: about what clouds ask on demand)."""

"""The whole recipe: one section per stage. `heliostat run` takes those that are present, in order."""

from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from heliostat.artifacts import ArtifactRef
from heliostat.config import StrictModel, load_recipe
from heliostat.costs import CostsConfig
from heliostat.crawling.config import CrawlConfig
from heliostat.curation.config import CurateConfig, DedupConfig, EmbedConfig
from heliostat.data.config import PhotographPoolConfig
from heliostat.data.shard_image import ShardFormat
from heliostat.errors import UsageError
from heliostat.evaluation.config import EvaluateConfig
from heliostat.models.config import BackboneConfig
from heliostat.publishing.config import PublishConfig
from heliostat.runtime.config import ClusterConfig
from heliostat.runtime.named_sets import NAME, check_kind, check_set_names, join_sets
from heliostat.runtime.sweep_config import SweepConfig
from heliostat.tracking import TrackingConfig
from heliostat.training.recipe import DistillConfig, PretrainConfig, phase_config

STAGES = ("crawl", "ingest", "embed", "dedup", "curate", "pretrain", "sweep", "distill", "evaluate", "publish")
SETS = ("curated", "evaluation", "labelled", "heldout", "pictures")
"""What ingest makes besides the pool: raw/<name>-<set>."""


class IngestConfig(StrictModel):
    """Images -> shards. Each entry is a folder or an `s3://` prefix of image files, WebDataset tars or Parquet files; one such
    file or a pattern (`{000000..000123}.tar`, `*.parquet`); a list of files; or `photographs`, the demo's own pictures."""

    pool: str = ""
    """Where the raw, unlabelled images lie: becomes raw/<name>. Empty when a crawl brings them."""
    curated: str = ""
    """A small set of images that show what the data should be like: becomes raw/<name>-curated."""
    evaluation: str = ""
    """Images of test and validation sets that the training set must not show: becomes raw/<name>-evaluation."""
    labelled: str = ""
    """Labelled images, one folder per class, for k-NN and probes: becomes raw/<name>-labelled."""
    heldout: str = ""
    """Labelled images that nothing but the final evaluation sees: becomes raw/<name>-heldout."""
    pictures: str = ""
    """A few whole images to draw patch tokens on in the report: becomes raw/<name>-pictures."""
    images_per_shard: int = Field(default=1024, ge=1)
    """Images in one shard; a few hundred megabytes per shard read best from object storage."""
    shard_bytes: int = Field(default=2**30, ge=2**10, lt=2**31)
    """Bytes of images after which a shard is closed too; bounds the memory of packing one."""
    format: ShardFormat = "tar"
    """`tar` (WebDataset's layout) or `parquet` (a table with the column bytes). Reading is equally fast."""
    in_place: bool = False
    """Index tars where they lie instead of copying their images; they must not change afterwards."""
    curated_crops_per_photograph: int = Field(default=8, ge=1)
    """Size of the curated set that `photographs` makes."""
    photographs: PhotographPoolConfig = PhotographPoolConfig()
    """What `photographs` makes."""


class CrawlStage(CrawlConfig):
    """The crawl stage: pages, WARC files or lists of URLs -> shards and a log of every URL."""

    retry: str = ""
    """An earlier crawl as raw/name@version: its URLs whose failure may have passed (timeouts, 5xx, names that did not resolve)
    alone are asked for, and what comes is an artifact of its own; `pages`, `warcs` and `urls` are passed over."""
    images_per_shard: int = Field(default=1024, ge=1)
    """Images in one shard."""
    shard_bytes: int = Field(default=2**28, ge=2**10, lt=2**31)
    """Bytes of images after which a shard is closed too."""


class EmbedStage(EmbedConfig):
    """The embed stage: raw images -> hashes, detectors' findings, embeddings."""

    raw: str = ""
    """Artifact of raw images as raw/name@version; empty takes the recipe's own."""


class DedupStage(DedupConfig):
    """The dedup stage: features -> which images are copies of which, and which must not be trained on."""

    features: str = ""
    """Artifact of features as features/name@version; empty takes the recipe's own."""
    previous: str = ""
    """Artifact copies/name@version of an earlier crawl: the new images are joined with those of its chain, which are not
    compared with each other again, and the result covers all of them."""
    evaluation: dict[str, str] = Field(default_factory=dict)
    """Sets that the result must not show: name -> raw/name@version; the recipe's own evaluation images are among them."""


class CurateStage(CurateConfig):
    """The curate stage: copies -> the training set."""

    copies: str = ""
    """Artifact of copies as copies/name@version; empty takes the recipe's own."""
    images_per_shard: int = Field(default=1024, ge=1)
    """Images in one shard of the result."""
    shard_bytes: int = Field(default=2**30, ge=2**10, lt=2**31)
    """Bytes of images after which a shard is closed too; bounds the memory of packing one."""


class Recipe(StrictModel):
    """A recipe file."""

    name: str = Field(pattern=NAME)
    """Name of every artifact that the recipe makes."""
    version: str = Field(default="1", pattern=NAME)
    """Version of every artifact that the recipe makes; choose a new one when a setting changes."""
    store: str = "./heliostat-store"
    """Where artifacts live: a folder or s3://bucket/prefix."""
    tracking: TrackingConfig = TrackingConfig()
    """Experiment tracking."""
    costs: CostsConfig = CostsConfig()
    """Power, carbon and prices, for what the record and the model card say about training."""
    cluster: ClusterConfig = ClusterConfig()
    """The Ray session."""
    crawl: CrawlStage | None = None
    """Pages or URLs -> shards."""
    ingest: IngestConfig | None = None
    """Files -> shards."""
    embed: EmbedStage | None = None
    """Raw images -> features. A recipe that curates has this section, with its defaults where it is left out."""
    dedup: DedupStage | None = None
    """Features -> copies. A recipe that curates has this section, with its defaults where it is left out."""
    curate: CurateStage | None = None
    """Copies -> training set."""
    pretrain: PretrainConfig | None = None
    """Training set -> model."""
    sweep: SweepConfig | None = None
    """Trials of the pretrain section side by side."""
    distill: DistillConfig | None = None
    """Model -> smaller student."""
    evaluate: EvaluateConfig | None = None
    """Models -> report."""
    publish: PublishConfig | None = None
    """Model -> release."""

    def ref(self, kind: str, suffix: str = "") -> ArtifactRef:
        """The artifact of this recipe of a kind."""
        return ArtifactRef(kind, f"{self.name}{suffix}", self.version)

    @property
    def models(self) -> dict[str, ArtifactRef]:
        """The models that the recipe makes, by role, in the order they are made.

        Roles are `model`, `model-<phase>`, and `student` or the students' names, each with its `-<phase>` and `-scratch`.
        """
        return self._pretrained() | self._distilled()

    def maker_of(self, ref: ArtifactRef) -> str:
        """The verb that makes a model of this recipe, or its images from the web; empty for any other artifact."""
        if self.crawl is not None and ref == self.ref("raw"):
            return "crawl"
        return "pretrain" if ref in self._pretrained().values() else "distill" if ref in self._distilled().values() else ""

    def backbone_of(self, ref: ArtifactRef) -> BackboneConfig | None:
        """The backbone that a model of this recipe will have; None for any other artifact."""
        for section in (self.pretrain, self.distill) if ref in self.models.values() else ():
            if section is None:
                continue
            phases = {f"-{phase.name}": phase_config(section, phase) for phase in section.phases}
            for suffix, trained in {"": section, "-scratch": section, **phases}.items():
                for name, backbone in trained.backbones.items():
                    role = f"-{name or 'student'}{suffix}" if section is self.distill else suffix
                    if ref == self.ref("model", role):
                        return backbone
        return None

    def _pretrained(self) -> dict[str, ArtifactRef]:
        if self.pretrain is None:
            return {}
        suffixes = ["", *(f"-{phase.name}" for phase in self.pretrain.phases)]
        return {f"model{suffix}": self.ref("model", suffix) for suffix in suffixes}

    def _distilled(self) -> dict[str, ArtifactRef]:
        return {role: self.ref("model", f"-{role}") for role in self._distilled_roles()}

    def _distilled_roles(self) -> list[str]:
        if self.distill is None:
            return []
        suffixes = ["", *(f"-{phase.name}" for phase in self.distill.phases)]
        suffixes += ["-scratch"] if self.distill.compare_with_scratch else []
        return [f"{name or 'student'}{suffix}" for name in self.distill.backbones for suffix in suffixes]

    @property
    def final_model(self) -> ArtifactRef:
        """The model that the recipe is for: the last phase of its student, or of its model. Raises UsageError for several."""
        if self.distill is not None and len(self.distill.backbones) > 1:
            names = ", ".join(str(self.ref("model", f"-{name}")) for name in self.distill.backbones)
            raise UsageError(f"recipe {self.name} makes several students ({names}); give publish.model=... to choose one")
        made = [ref for role, ref in (self._distilled() or self._pretrained()).items() if not role.endswith("-scratch")]
        return made[-1] if made else self.ref("model")

    @model_validator(mode="after")
    def _add_what_curation_needs(self) -> Self:
        """`curate` needs copies and those need features; what is not named by artifact is made with default settings."""
        if self.curate is not None and not self.curate.copies and self.dedup is None:
            object.__setattr__(self, "dedup", DedupStage())  # the model is frozen for everybody else
        if self.dedup is not None and not self.dedup.features and self.embed is None:
            object.__setattr__(self, "embed", EmbedStage())
        return self

    @model_validator(mode="after")
    def _check_where_the_pool_comes_from(self) -> Self:
        has_pool = self.ingest is not None and bool(self.ingest.pool)
        if self.crawl is not None and has_pool:
            raise ValueError("crawl and ingest.pool both make the raw images; leave one of them out")
        if self.ingest is not None and not has_pool and self.crawl is None:
            raise ValueError("ingest.pool is missing; give a folder, an s3:// prefix, a list of files, tars or Parquet files")
        return self

    def evaluation_sets(self) -> dict[str, str]:
        """Sets that the training set must not show: name -> raw artifact; the recipe's own first."""
        own = self.ingest is not None and bool(self.ingest.evaluation)
        sets = {"evaluation": str(self.ref("raw", "-evaluation"))} if own else {}
        return join_sets(sets, self.dedup.evaluation if self.dedup is not None else {})

    def curated_sets(self) -> dict[str, str]:
        """Sets that retrieval serves: name -> raw artifact, in the order of the recipe."""
        if self.curate is None:
            return {}
        config, own = self.curate.retrieval, str(self.ref("raw", "-curated"))
        if config.sets:
            return {name: one.artifact or own for name, one in config.sets.items()}
        return {"curated": own} if config.mode != "none" else {}

    def embedded_sets(self) -> dict[str, str]:
        """All sets besides the pool that must be embedded: name -> raw artifact."""
        return join_sets(self.evaluation_sets(), self.curated_sets())

    @model_validator(mode="after")
    def _check_artifacts_that_curation_names(self) -> Self:
        if self.embed is not None:
            check_kind("embed.raw", self.embed.raw, "raw")
        if self.dedup is not None:
            check_kind("dedup.features", self.dedup.features, "features")
            check_kind("dedup.previous", self.dedup.previous, "copies")
            if self.dedup.previous == str(self.ref("copies")):
                raise ValueError(
                    f"dedup.previous={self.dedup.previous} is what this recipe makes; name the copies of the crawl before, and "
                    "give version=... for the new ones"
                )
            check_set_names(self.dedup.evaluation, "dedup.evaluation")
            for name, artifact in self.dedup.evaluation.items():
                check_kind(f"dedup.evaluation.{name}", artifact, "raw")
        if self.curate is not None:
            check_kind("curate.copies", self.curate.copies, "copies")
            check_set_names(self.curate.retrieval.sets, "curate.retrieval.sets")
            for name, one in self.curate.retrieval.sets.items():
                check_kind(f"curate.retrieval.sets.{name}.artifact", one.artifact, "raw")
        self.embedded_sets()
        return self

    @model_validator(mode="after")
    def _check_what_would_be_refused_at_the_end(self) -> Self:
        """Found now rather than after everything is embedded. Of features that are an artifact the embedder is not known."""
        if self.curate is not None and self.curate.balance.target_images == 0:
            raise ValueError("curate.balance.target_images 0 keeps no image; give 1 or more, or all")
        if self.dedup is None or self.embed is None or self.dedup.features or not self.dedup.copies.enabled:
            return self
        embedder = self.embed.copy_embedder
        threshold, floor = self.dedup.copies.limits(embedder).threshold, self.dedup.join.resolved(embedder).floor
        if threshold < floor:
            raise ValueError(
                f"dedup.copies.threshold {threshold:g} is below dedup.join.edge_floor {floor:g}, from which on similar pairs "
                "are stored; raise the threshold or lower the floor"
            )
        return self

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        suffixes = [ref.name.removeprefix(f"{self.name}-") for ref in self._pretrained().values()] + self._distilled_roles()
        suffixes += ["teacher"] if self.distill is not None and self.distill.teacher_head_steps else []
        twice = sorted({suffix for suffix in suffixes if suffixes.count(suffix) > 1})
        if twice:
            made = self.ref("model", f"-{twice[0]}")
            raise ValueError(f"{made} would be made twice, by phases or students of these names; rename one of them")
        return self

    @model_validator(mode="after")
    def _check_evaluated_sizes(self) -> Self:
        """Found now rather than after the training."""
        sections = [section for section in (self.pretrain, self.distill) if section is not None]
        patches = {backbone.patch_size for section in sections for backbone in section.backbones.values()}
        for name in ("image_size", "pca_image_size") if self.evaluate is not None else ():
            size = getattr(self.evaluate, name)
            for patch in patches:
                if size % patch:
                    lower = size // patch * patch
                    advice = " or ".join(str(value) for value in (lower, lower + patch) if value)
                    raise ValueError(f"evaluate.{name} {size} is not divisible by the models' patch_size {patch}; use {advice}")
        return self

    @field_validator("name", "version", mode="before")
    @classmethod
    def _number_as_text(cls, value: Any) -> Any:
        """`version=2` is a number in YAML and a name here."""
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @property
    def stages(self) -> list[str]:
        """The stages that are present, in order."""
        return [stage for stage in STAGES if getattr(self, stage) is not None]


def scope_overrides(overrides: tuple[str, ...], stage: str) -> list[str]:
    """Prefix the keys of a stage verb with its section, unless their first word is a top-level key."""
    if not stage:
        return list(overrides)
    section = Recipe.model_fields[stage].annotation
    fields: dict[str, Any] = {}
    for candidate in getattr(section, "__args__", ()):
        fields |= getattr(candidate, "model_fields", {})
    scoped = []
    for override in overrides:
        first = override.partition("=")[0].strip().split(".")[0]
        top_level = first in Recipe.model_fields and first not in fields
        scoped.append(override if top_level else f"{stage}.{override.strip()}")
    return scoped


def read_recipe(name: str, overrides: tuple[str, ...] = (), stage: str = "") -> Recipe:
    """Find, override and validate a recipe. `stage` lets the keys of that section stand alone. Raises ConfigError."""
    return load_recipe(Recipe, name, scope_overrides(overrides, stage))

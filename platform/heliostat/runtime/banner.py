"""What a training says before it begins: the choices that were made, each in a line."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from heliostat.models.config import BackboneConfig
from heliostat.training.costs import num_images, num_parameters
from heliostat.training.memory import GIB, training_memory
from heliostat.training.recipe import TrainingConfig

_LABEL_COLUMNS = 12


@dataclass(frozen=True)
class TrainingFacts:
    """What is known when a training begins.

    artifacts: the model that is made of each network, by the network's name. data: images of each artifact that is trained on,
    by the artifact's name. places: where each network's files go, by its name. evaluation: `OnlineDraw.line()`, empty when
    nothing is evaluated. choices: further rows by label, which take the place of a row of that label.
    """

    config: TrainingConfig
    artifacts: Mapping[str, str]
    data: Mapping[str, int]
    places: Mapping[str, str]
    tracker: str
    evaluation: str = ""
    teacher: BackboneConfig | None = None
    teacher_name: str = ""
    choices: Mapping[str, str] = field(default_factory=dict)


def training_banner(facts: TrainingFacts) -> list[str]:
    """The banner's lines: label and value, aligned."""
    config, train = facts.config, facts.config.train
    rows: list[tuple[str, str]] = [("data", ", ".join(f"{name} ({count:,} images)" for name, count in facts.data.items()))]
    for name, backbone in config.backbones.items():
        rows.append(("model", f"{facts.artifacts[name]}: {_network_text(backbone, config)}"))
    if facts.teacher is not None:
        rows.append(("teacher", f"{facts.teacher_name}: {_backbone_text(facts.teacher)}, frozen"))
    rows.append(("method", _method_text(config)))
    epochs = num_images(config) / max(sum(facts.data.values()), 1)
    seen = f"{num_images(config):,} images, {epochs:.1f} epochs"
    rows += [
        ("length", f"{train.steps:,} steps of {train.global_batch_size:,} images: {seen}"),
        ("workers", _workers_text(config)),
        ("memory", _memory_text(facts)),
        ("evaluation", _evaluation_text(facts)),
        ("checkpoints", _checkpoints_text(config)),
        ("store", ", ".join(facts.places.values())),
        ("tracking", facts.tracker or "off"),
    ]
    known = {label for label, _ in rows}
    rows = [(label, facts.choices.get(label, value)) for label, value in rows]
    rows += [(label, value) for label, value in facts.choices.items() if label not in known]
    return [f"{label:{_LABEL_COLUMNS}}{value}" for label, value in rows]


def _backbone_text(backbone: BackboneConfig) -> str:
    registers = f", {backbone.num_register_tokens} registers" if backbone.num_register_tokens else ""
    return f"{backbone.arch} {backbone.embed_dim}x{backbone.depth} patch {backbone.patch_size}{registers}"


def _network_text(backbone: BackboneConfig, config: TrainingConfig) -> str:
    body, heads = num_parameters(backbone, config.method)
    return f"{_backbone_text(backbone)}, {_millions(body)} parameters, heads {_millions(heads)}"


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M" if count >= 100_000 else f"{count:,}"


def _method_text(config: TrainingConfig) -> str:
    crops, method = config.crops, config.method
    local = f" and {crops.local_crops_number} of {crops.local_crops_size}" if crops.local_crops_number else ""
    losses = [f"dino over {method.dino.head_n_prototypes:,} prototypes"]
    losses += ["ibot"] if method.ibot.loss_weight > 0 else []
    losses += ["koleo"] if method.dino.koleo_loss_weight > 0 else []
    return f"2 crops of {crops.global_crops_size} pixels{local}; {', '.join(losses)}; {method.centering}"


def _workers_text(config: TrainingConfig) -> str:
    scaling, count = config.scaling, config.scaling.num_workers
    if count == 0:
        return f"this process, {_plural(scaling.threads_per_worker, 'thread')}, without Ray"
    if scaling.use_gpu:
        return f"{_plural(count, 'worker')}, a GPU each"
    return f"{_plural(count, 'worker')} on CPUs, {_plural(scaling.threads_per_worker, 'thread')} each"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _memory_text(facts: TrainingFacts) -> str:
    config = facts.config
    per_worker = config.train.global_batch_size // max(1, config.scaling.num_workers)
    total = training_memory(config, facts.teacher, per_worker).total / GIB
    besides = "" if config.scaling.use_gpu else ", besides what Python and torch take"
    return f"{total:.2f} GiB per worker for {per_worker} images, by formula{besides}"


def _evaluation_text(facts: TrainingFacts) -> str:
    if not facts.evaluation:
        return "off (online.enabled=false)"
    every = facts.config.online.every_steps or facts.config.train.checkpoint_every_steps
    return f"every {every:,} steps: {facts.evaluation}"


def _checkpoints_text(config: TrainingConfig) -> str:
    train = config.train
    kept = f", and those of every {train.keep_every:,} steps" if train.keep_every else ""
    return f"every {train.checkpoint_every_steps:,} steps; the newest {train.keep_last} are kept{kept}, until the run ends"


def indented(lines: Sequence[str]) -> list[str]:
    """The lines as they stand below a stage's line."""
    return [f"          {line}" for line in lines]

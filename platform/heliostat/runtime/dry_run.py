"""What a recipe will cost, from formulas: images, parameters, operations, time, memory. Imports neither torch nor Ray."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from heliostat.artifacts import ArtifactRef, ArtifactStore
from heliostat.config import shipped_recipes, validate
from heliostat.errors import ArtifactNotFoundError
from heliostat.models.config import BackboneConfig
from heliostat.models.flops import num_backbone_parameters
from heliostat.runtime.recipe import Recipe, read_recipe
from heliostat.runtime.sweep_config import SweepConfig
from heliostat.runtime.sweep_metric import check_metric
from heliostat.runtime.sweep_points import trial_config, trial_configs
from heliostat.runtime.weight_names import names_artifact
from heliostat.storage import open_store
from heliostat.training.costs import flops_per_image, head_training_flops_per_image, num_images, num_parameters
from heliostat.training.memory import GIB, Memory, training_memory
from heliostat.training.parallel import choose_parallel
from heliostat.training.recipe import (
    DistillConfig,
    PretrainConfig,
    TrainingConfig,
    alone,
    phase_config,
    teacher_heads,
)

_PEAK_FLOPS = {"A100": 312e12, "H100": 989e12}  # dense bfloat16, from the makers' data sheets
_UTILISATION = 0.35  # assumption: between the runs that _SOURCE names; not measured with our code, nor for H100
_SOURCE = (
    "The share of the peak is an assumption: by this count DINOv2's own runs reached 39 % (ViT-g, 22,016 A100-hours) and "
    "31 % (ViT-L)."
)
_CPU_FLOPS_PER_CORE = 25e9  # measured: docs/performance.md
_CARDS_GIB = {40: 39.0, 80: 79.0}  # what a card of 40 or 80 GB has for its programs, rounded down
_UNITS = {"MFLOP": 1e6, "GFLOP": 1e9, "TFLOP": 1e12, "PFLOP": 1e15, "EFLOP": 1e18}


@dataclass(frozen=True)
class TrainingRun:
    """One training run of a recipe: what it is called, its section, and the teacher of a distillation where it is known."""

    name: str
    config: TrainingConfig
    teacher: BackboneConfig | None = None
    notes: tuple[str, ...] = ()
    is_phase: bool = False
    heads_only: bool = False

    @property
    def images_per_worker(self) -> int:
        """Images of one step on one worker."""
        return self.config.train.global_batch_size // max(1, self.config.scaling.num_workers)

    @property
    def flops_per_image(self) -> float:
        """Operations of one step per image."""
        return head_training_flops_per_image(self.config) if self.heads_only else flops_per_image(self.config, self.teacher)

    @property
    def flops(self) -> float:
        """All operations of the run."""
        return self.flops_per_image * num_images(self.config)

    @property
    def memory(self) -> Memory:
        """Memory of one worker where `scaling.parallel` is as it says, "auto" as ddp."""
        scaling = self.config.scaling
        way = "ddp" if scaling.parallel == "auto" else scaling.parallel
        return training_memory(
            self.config, self.teacher, self.images_per_worker, parallel=way, num_workers=max(1, scaling.num_workers)
        )


def cost_lines(recipe: Recipe, stages: Sequence[str]) -> list[str]:
    """Comment lines, one block per training run; none when no stage trains. Raises ConfigError for what could not run."""
    lines, runs = [], []
    for stage in stages:
        own = training_runs(recipe, stage)
        if stage == "sweep" and recipe.sweep is not None and recipe.pretrain is not None:
            check_metric(recipe, recipe.sweep, trial_config(recipe.pretrain, recipe.sweep, {}))
            lines += sweep_lines(recipe.sweep, own)
        else:
            for run in own:
                lines += [f"# {run.name}: {_headline(run)}", *(f"#   {line}" for line in run_lines(run))]
        runs += own
    on_gpus = any(run.config.scaling.use_gpu for run in runs)
    if len(runs) > 1:
        lines.append(f"# together: {_time_text(runs, on_gpus)}")
    if on_gpus:
        lines.append(f"# {_SOURCE}")
    return ["\n# what this would cost, by formula", *lines] if lines else []


def sweep_lines(sweep: SweepConfig, trials: Sequence[TrainingRun]) -> list[str]:
    """Comment lines about the trials of a sweep."""
    scaling = trials[0].config.scaling
    where = (
        f"{scaling.num_workers} worker{'s' if scaling.num_workers > 1 else ''} each"
        if scaling.num_workers
        else "one process each"
    )
    lines = [f"# sweep: {len(trials)} trials, {sweep.max_concurrent_trials} at a time", f"#   trials      {where}"]
    lines.append(f"#   compared    by {sweep.metric}, {'more' if sweep.mode == 'max' else 'less'} is better")
    lines.append(f"#   time        {_time_text(trials, scaling.use_gpu)}")
    if sweep.asha is not None:
        lines.append(f"#   note        all to their end; sweep.asha stops some from step {sweep.asha.grace_steps} on")
    if sweep.space and sweep.search == "optuna":
        lines.append("#   note        Optuna draws the trials as it goes; counted are independent draws from the same space")
    return lines


def training_runs(recipe: Recipe, stage: str) -> list[TrainingRun]:
    """The runs of a stage: heads for its teacher, its own, one per phase, students without their teacher; or trials.

    Raises ConfigError for one that cannot run and ArtifactNotFoundError for a teacher of unknown size.
    """
    if stage == "sweep" and recipe.sweep is not None and recipe.pretrain is not None:
        return [TrainingRun("trial", config) for config in trial_configs(recipe.pretrain, recipe.sweep)]
    if stage not in ("pretrain", "distill"):
        return []
    config: TrainingConfig = getattr(recipe, stage)
    teacher, notes = _teacher(recipe, config) if isinstance(config, DistillConfig) else (None, _init_notes(recipe, config))
    runs = [*_teacher_head_runs(config, teacher), TrainingRun(stage, config, teacher, notes)]
    for phase in config.phases:
        runs.append(TrainingRun(f"{stage}, phase {phase.name}", phase_config(config, phase), teacher, is_phase=True))
    if isinstance(config, DistillConfig) and config.compare_with_scratch:
        for name, student in config.backbones.items():
            runs.append(TrainingRun(f"{stage}, {name or 'student'} from scratch", alone(config, student)))
    return runs


def _teacher_head_runs(config: TrainingConfig, teacher: BackboneConfig | None) -> list[TrainingRun]:
    """The training of heads on public weights, which the stage leaves out where the weights bring heads."""
    if not isinstance(config, DistillConfig) or teacher is None or not config.teacher_head_steps:
        return []
    if not config.teacher or names_artifact(config.teacher):
        return []
    notes = (
        "falls away where the weights bring heads; memory is not counted",
        "counted are forward passes of the frozen backbone, student's and teacher's, and heads forward and backward",
    )
    return [TrainingRun("distill, heads on the teacher", teacher_heads(config, teacher), notes=notes, heads_only=True)]


def _init_notes(recipe: Recipe, config: TrainingConfig) -> tuple[str, ...]:
    weights = config.init.weights if isinstance(config, PretrainConfig) else ""
    if not weights or _exists(recipe, weights):
        return ()
    missing = f"is not in {recipe.store} yet" if names_artifact(weights) else "is no file here yet"
    return (f"init.weights={weights} {missing}",)


def _teacher(recipe: Recipe, config: DistillConfig) -> tuple[BackboneConfig, tuple[str, ...]]:
    """The teacher of a distillation, from the recipe, the store, or the shipped recipe of that name, with notes."""
    if not config.teacher and recipe.pretrain is not None:
        return recipe.pretrain.student, ()
    if config.teacher and not names_artifact(config.teacher):
        largest = max(config.backbones.values(), key=num_backbone_parameters)
        return largest, (f"teacher {config.teacher} is not read here; it is counted as large as the largest student",)
    ref = ArtifactRef.parse(config.teacher) if config.teacher else recipe.ref("model")
    found = ArtifactStore(open_store(recipe.store)).find(ref)
    if found is not None:
        return validate(BackboneConfig, found.read_json("model.json")["backbone"], str(ref)), ()
    shipped = read_recipe(ref.name).pretrain if ref.name in shipped_recipes() else None
    if shipped is None:
        raise ArtifactNotFoundError(
            f"no artifact {ref} in {recipe.store}; make it first or give distill.teacher=model/NAME@VERSION"
        )
    note = f"teacher {ref} is not in {recipe.store} yet; its size is that of the shipped recipe {ref.name}"
    return shipped.student, (note,)


def _exists(recipe: Recipe, weights: str) -> bool:
    if names_artifact(weights):
        return ArtifactStore(open_store(recipe.store)).find(ArtifactRef.parse(weights)) is not None
    return Path(weights).expanduser().exists()


def _headline(run: TrainingRun) -> str:
    train, scaling = run.config.train, run.config.scaling
    workers = max(1, scaling.num_workers)
    kind = "GPU" if scaling.use_gpu else "CPU worker"
    return (
        f"{train.steps:,} steps of {train.global_batch_size:,} images on {workers} {kind}{'s' if workers > 1 else ''}, "
        f"{run.images_per_worker} each"
    )


def run_lines(run: TrainingRun) -> list[str]:
    """Lines about parameters, operations, time and memory of one training run."""
    config, per_image = run.config, run.flops_per_image
    lines = [f"parameters  {_parameters_text(name, one, run)}" for name, one in config.backbones.items()]
    lines += [f"teacher     {num_parameters(run.teacher, config.method)[0]:,} in the backbone"] if run.teacher else []
    return [
        *lines,
        *(f"note        {note}" for note in run.notes),
        f"compute     {_amount(per_image)} per image, {num_images(config):,} images seen: {_amount(run.flops)}",
        f"time        {_time_text([run], config.scaling.use_gpu, max(1, config.scaling.num_workers))}",
        *([] if run.heads_only else _memory_lines(run)),
    ]


def _parameters_text(name: str, backbone: BackboneConfig, run: TrainingRun) -> str:
    body, heads = num_parameters(backbone, run.config.method)
    return f"{name + ': ' if name else ''}{body:,} in the backbone, {heads:,} in the heads"


def _amount(flops: float) -> str:
    """Three digits and a unit."""
    unit, size = next(((unit, size) for unit, size in reversed(_UNITS.items()) if size <= flops), ("MFLOP", 1e6))
    value = flops / size
    return f"{value:,.{max(0, 3 - len(str(int(value))))}f} {unit}"


def gpu_hours(flops: float) -> dict[str, float]:
    """Hours of one GPU by its kind, at the share of its peak that is assumed."""
    return {card: flops / (peak * _UTILISATION) / 3600 for card, peak in _PEAK_FLOPS.items()}


def _time_text(runs: Sequence[TrainingRun], on_gpus: bool, num_gpus: int = 0) -> str:
    flops = sum(run.flops for run in runs)
    if not on_gpus:
        minutes = max(1, round(flops / _CPU_FLOPS_PER_CORE / 60))
        unit = "minute" if minutes == 1 else "minutes"
        return f"about {minutes:,} {unit} of one CPU core at {_CPU_FLOPS_PER_CORE / 1e9:.0f} GFLOP/s (docs/performance.md)"
    parts = []
    for card, hours in gpu_hours(flops).items():
        parts.append(f"{hours:,.0f} {card}-hours" + (f" ({_duration(hours / num_gpus)} on {num_gpus})" if num_gpus else ""))
    return f"about {' or '.join(parts)}, at {100 * _UTILISATION:.0f} % of their peak"


def _duration(hours: float) -> str:
    return f"{hours / 24:,.1f} days" if hours >= 24 else f"{hours:.1f} hours"


def _memory_lines(run: TrainingRun) -> list[str]:
    memory = run.memory
    if not run.config.scaling.use_gpu:
        return [f"memory      {memory.total / GIB:.2f} GiB per worker, besides what Python and torch take"]
    fits = [name for name, gib in _CARDS_GIB.items() if memory.total <= gib * GIB]
    verdict = f"fits {fits[0]} GB" if fits else f"does not fit {max(_CARDS_GIB)} GB"
    lines = [f"memory      {memory.total / GIB:.1f} GiB per GPU: {verdict}"]
    lines += [f"            {size / GIB:5.1f}  {name}" for name, size in _memory_terms(memory)]
    smaller = [name for name in _CARDS_GIB if name not in fits]
    lines += _parallel_lines(run)
    return lines + [f"            for {name} GB: {_advice(run, _CARDS_GIB[name] * GIB)}" for name in smaller[-1:]]


def _parallel_lines(run: TrainingRun) -> list[str]:
    """What `scaling.parallel=auto` would take on each card."""
    workers = run.config.scaling.num_workers
    if run.config.scaling.parallel != "auto" or workers < 2:
        return []
    found = {card: choose_parallel(run.config, run.teacher, workers, gib * GIB).name for card, gib in _CARDS_GIB.items()}
    return [f"            parallel: {', '.join(f'{name} on {card} GB' for card, name in found.items())}"]


def _memory_terms(memory: Memory) -> list[tuple[str, float]]:
    """What fills the memory, the largest first; what is below a hundredth is summed."""
    frozen = memory.state.get("frozen teacher", 0.0)
    names = [name for name in memory.state if name != "frozen teacher"]
    terms = {", ".join(names): sum(memory.state.values()) - frozen, "frozen teacher": frozen, **memory.step}
    terms["CUDA context, communication, fragmentation (assumption)"] = memory.reserve
    shown = sorted(((name, size) for name, size in terms.items() if size >= memory.total / 100), key=lambda term: -term[1])
    rest = memory.total - sum(size for _, size in shown)
    return [*shown, ("other", rest)] if rest > 0 else shown


def _advice(run: TrainingRun, limit_bytes: float) -> str:
    """Which knob makes a run fit a card."""
    batch, workers = run.config.train.global_batch_size, max(1, run.config.scaling.num_workers)
    most = _most_images(run, limit_bytes)
    if most == 0:
        state = sum(training_memory(run.config, run.teacher, 1).state.values())
        return f"one image is too many; {state / GIB:.1f} GiB stand whatever the batch, take a smaller student"
    more = next(count for count in range(workers, batch + 1) if batch % count == 0 and batch // count <= most)
    smaller = (
        f"global_batch_size={most * workers} of the phase" if run.is_phase else f"train.global_batch_size={most * workers}"
    )
    return f"at most {most} image{'s' if most > 1 else ''} each: scaling.num_workers={more} or {smaller}"


def _most_images(run: TrainingRun, limit_bytes: float) -> int:
    """Most images per worker that fit, up to those of the run."""
    low, high = 0, run.images_per_worker
    while low < high:
        middle = (low + high + 1) // 2
        fits = training_memory(run.config, run.teacher, middle).total <= limit_bytes
        low, high = (middle, high) if fits else (low, middle - 1)
    return low

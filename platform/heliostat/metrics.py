"""Every metric that Heliostat emits: its name, unit and meaning.

Trackers receive these names as they are; Prometheus sees `ray_heliostat_<name with / replaced by _>`. Dashboards are tested
against this table, so a metric that is not here cannot be drawn and a metric that is here must be emitted.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One metric. `live` metrics are also exported to Prometheus while a stage runs."""

    name: str
    unit: str
    meaning: str
    live: bool = False

    @property
    def prometheus_name(self) -> str:
        """Name under which Ray's metrics agent exports a live metric."""
        return "ray_" + self.short_name

    @property
    def short_name(self) -> str:
        """Name that is given to `ray.util.metrics`, which adds the `ray_` prefix itself."""
        return "heliostat_" + self.name.replace("/", "_")


_TABLE = (
    Metric("train/loss", "nats", "sum of the logged loss terms (DINOv2's convention: ibot and koleo count half)", live=True),
    Metric("train/dino_global", "nats", "DINO cross-entropy between the two global crops", live=True),
    Metric("train/dino_local", "nats", "DINO cross-entropy of local crops against global ones", live=True),
    Metric("train/ibot", "nats", "half of the masked patch cross-entropy", live=True),
    Metric("train/koleo", "nats", "half of the KoLeo term times its weight", live=True),
    Metric("train/lr", "1", "learning rate before per-group multipliers", live=True),
    Metric("train/dino_global_at_uniform", "nats", "train/dino_global while the student's outputs are uniform (from ln K)"),
    Metric("train/dino_local_at_uniform", "nats", "train/dino_local while the student's outputs are uniform"),
    Metric("train/ibot_at_uniform", "nats", "train/ibot while the student's outputs are uniform, averaged over masks"),
    Metric("train/backbone_lr", "1", "learning rate of the backbone: train/lr unless the run starts from given weights"),
    Metric("train/weight_decay", "1", "weight decay of the decayed groups"),
    Metric("train/teacher_momentum", "1", "EMA momentum of the teacher"),
    Metric("train/teacher_temp", "1", "softmax temperature of the teacher"),
    Metric("train/grad_norm", "1", "largest gradient norm over the clipped sub-modules, before clipping", live=True),
    Metric("train/grad_norm_backbone", "1", "gradient norm of the backbone before clipping"),
    Metric("train/grad_norm_dino_head", "1", "gradient norm of the DINO head before clipping"),
    Metric("train/grad_norm_ibot_head", "1", "gradient norm of the separate iBOT head before clipping"),
    Metric("train/images_per_second", "images/s", "images consumed by all workers per second", live=True),
    Metric("train/bytes_per_second", "bytes/s", "encoded images and shards that the main rank fetches per second", live=True),
    Metric("train/data_wait_ratio", "1", "share of the step spent waiting for the loader", live=True),
    Metric("train/skipped_steps", "steps", "steps skipped because a loss was not finite", live=True),
    Metric("train/step", "steps", "optimizer steps done", live=True),
    Metric("train/storage_retries", "requests", "requests of the main rank that the object store made it repeat", live=True),
    Metric("train/decode_failures", "images", "images that could not be decoded while training", live=True),
    Metric(
        "train/feature_std",
        "1",
        "standard deviation of L2-normalised student cls tokens times sqrt(width): 1 spread out, 0 collapsed",
    ),
    Metric("train/rankme", "1", "effective rank of the student's cls tokens on the main rank's images, 1 to images or width"),
    Metric("train/prototype_usage", "1", "share of the prototypes that the teacher uses on the main rank's images"),
    Metric(
        "train/teacher_entropy", "nats", "mean entropy of the teacher's targets: no student gets its cross-entropy below it"
    ),
    Metric("train/teacher_entropy_at_uniform", "nats", "ln K, the entropy of a teacher that says nothing"),
    Metric(
        "train/kl_to_teacher", "nats", "divergence of the student from its targets, mean over the global pairs: 0 all learnt"
    ),
    Metric("train/collapse_signs", "1", "signs of collapse after the warm-ups: 0 healthy", live=True),
    Metric("train/mfu", "1", "share of the devices' dense bfloat16 peak that the step's model FLOPs take, where it is known"),
    Metric("train/memory_bytes", "bytes", "most memory of the main rank: allocated on its GPU, else resident"),
    Metric("train/eta_seconds", "s", "time to the last step at the speed of the newest record"),
    Metric(
        "online/knn_accuracy",
        "1",
        "weighted k-NN top-1 accuracy of the teacher, each labelled image judged by its 10 nearest among all the others",
    ),
    Metric(
        "online/linear_accuracy",
        "1",
        "linear probe top-1 accuracy of the teacher: one half of each class by content hash trains it, the other is scored",
    ),
    Metric(
        "online/rankme", "1", "effective rank of the teacher's cls tokens on images of the training set, 1 to images or width"
    ),
    Metric(
        "online/feature_std",
        "1",
        "standard deviation of the teacher's L2-normalised cls tokens times sqrt(width): 1 spread out, 0 collapsed",
    ),
    Metric("online/failures", "evaluations", "evaluations while training that failed; the training goes on without them"),
    Metric("crawl/urls", "urls", "distinct URLs that the crawl planned to fetch"),
    Metric("crawl/images", "images", "images that the crawl brought, repeated ones included"),
    Metric("crawl/tasks_done", "tasks", "download tasks whose shards and fetch log are complete", live=True),
    Metric("dedup/rows_in", "images", "images that entered dedup, those of earlier crawls included"),
    Metric("dedup/rows_kept", "images", "images that neither a filter, nor a better copy, nor an evaluation image dropped"),
    Metric("dedup/edges", "pairs", "similar pairs that the join stored, from the edge floor on"),
    Metric("dedup/edge_recall", "1", "share of the edges of a sample that the join found, by exact search"),
    Metric("curate/rows_in", "images", "images and URLs that the funnel of the curation begins with", live=True),
    Metric("curate/rows_kept", "images", "images in the curated set", live=True),
    Metric("curate/shards_done", "tasks", "tasks of the embed stage whose features are complete", live=True),
    Metric("evaluate/knn_accuracy", "1", "weighted k-NN top-1 accuracy on held-out images"),
    Metric(
        "publish/largest_difference",
        "1",
        "largest difference of any token between the model and a published format, over all formats",
    ),
    Metric("evaluate/linear_accuracy", "1", "linear probe top-1 accuracy on held-out images"),
    Metric("cost/gpu_hours", "h", "hours of GPUs that training has taken, all attempts together; 0 on CPUs"),
    Metric("cost/worker_hours", "h", "hours of workers that training has taken, all attempts together"),
    Metric("cost/wasted_worker_hours", "h", "hours of workers in steps that were done again after a restart"),
    Metric("cost/energy_kwh", "kWh", "energy of the devices times the PUE of the data centre"),
    Metric("cost/energy_measured_ratio", "1", "share of the energy that NVML measured; the rest is power times time"),
    Metric("cost/co2_kg", "kg", "CO2 equivalent of the energy by the intensity of the grid"),
    Metric("cost/dollars", "dollars", "price of the hours by the price table of the recipe"),
)

METRICS: dict[str, Metric] = {metric.name: metric for metric in _TABLE}


def live_metrics() -> list[Metric]:
    """The metrics that Prometheus sees."""
    return [metric for metric in _TABLE if metric.live]

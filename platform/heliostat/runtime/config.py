"""Settings of the Ray session."""

from pydantic import Field

from heliostat.config import StrictModel


class ClusterConfig(StrictModel):
    """How Ray is started or joined."""

    address: str = "auto"
    """"local" starts Ray here; "auto" joins the cluster that RAY_ADDRESS names (inside a Ray job: that cluster) and is local
    without one; "host:port" joins that cluster."""
    num_cpus: int | None = Field(default=None, ge=1)
    """Logical CPUs of a local Ray; null takes the machine's. Refused when joining a cluster."""
    object_store_memory: int = Field(default=300_000_000, ge=80_000_000)
    """Bytes of the local object store."""
    connect_timeout_seconds: int = Field(default=20, ge=1)
    """How long a cluster may take to answer before it counts as absent."""


Value = bool | int | float | str


class SweepConfig(StrictModel):
    """A grid of trials of the recipe's pretrain section."""

    grid: dict[str, tuple[Value, ...]]
    """Key of the pretrain section -> values to try; every combination is one trial."""
    overrides: dict[str, Value] = Field(default_factory=dict)
    """Settings of the pretrain section that all trials share, such as fewer steps."""
    max_concurrent_trials: int = Field(default=2, ge=1)
    """Trials that run at once."""
    cpus_per_trial: float = Field(default=1.0, gt=0)
    """Logical CPUs that Ray reserves for a trial."""
    gpus_per_trial: float = Field(default=0.0, ge=0)
    """GPUs that Ray reserves for a trial."""
    report_every_steps: int = Field(default=50, ge=1)
    """Steps between reports of a trial to the scheduler."""

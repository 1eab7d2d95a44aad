"""Settings of tracking."""

from pydantic import Field

from heliostat.config import StrictModel


class TrackingConfig(StrictModel):
    """Where runs are recorded."""

    uri: str = "auto"
    """MLflow tracking URI; "auto" is a sqlite file in the local store, "none" records nothing."""
    experiment: str = Field(default="heliostat", min_length=1)
    """MLflow experiment name."""
    system_metrics: bool = True
    """Record the use of CPUs, memory, disk, network and GPUs of the main rank's node while a training stage runs."""
    system_metrics_every_seconds: float = Field(default=10.0, gt=0)
    """Seconds between samples of them."""
    spool: str = "auto"
    """Folder that keeps records while the server does not answer; "auto" is mlflow-spool/ in the local store, or
    ~/.cache/heliostat/mlflow-spool where the store is not local."""
    spool_bytes: int = Field(default=64 * 2**20, ge=2**16)
    """Bytes of waiting records of one process after which further metrics and files are dropped, and that is said."""
    retry_every_seconds: float = Field(default=30.0, gt=0)
    """Seconds between attempts to reach a server that was lost while a run goes on."""

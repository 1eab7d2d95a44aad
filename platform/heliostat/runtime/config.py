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

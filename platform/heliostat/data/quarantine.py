"""The side manifest of what was turned away: every bad image or shard member with its reason, never a silent loss."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import pyarrow as pa

from heliostat.errors import DataError
from heliostat.storage import from_parquet, to_parquet

QUARANTINE = "quarantine.parquet"
QUARANTINE_SCHEMA = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("length", pa.int64(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ]
)
_MAX_DETAIL_CHARACTERS = 300  # hostile bytes end up in the detail of some decoders
_MAX_SOURCE_CHARACTERS = 1024  # a member's name is whatever a stranger wrote


@dataclass(frozen=True, order=True)
class Rejection:
    """One thing that was turned away. source: path, URL or member name; offset, length: in bytes; id: sha256 or ""."""

    source: str
    shard: str
    offset: int
    length: int
    id: str
    reason: str
    detail: str

    def __post_init__(self) -> None:
        """Bound what strangers wrote."""
        object.__setattr__(self, "source", self.source[:_MAX_SOURCE_CHARACTERS])
        object.__setattr__(self, "detail", self.detail[:_MAX_DETAIL_CHARACTERS])


def quarantine_to_bytes(rejections: Iterable[Rejection]) -> bytes:
    """The rejections as Parquet, sorted and each once: the same set gives the same bytes."""
    rows = [asdict(rejection) for rejection in sorted(set(rejections))]
    return to_parquet(pa.Table.from_pylist(rows, schema=QUARANTINE_SCHEMA))


def quarantine_from_bytes(data: bytes) -> list[Rejection]:
    """Read a side manifest. Raises DataError when it is not Parquet of QUARANTINE_SCHEMA."""
    try:
        table = from_parquet(data).cast(QUARANTINE_SCHEMA)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{QUARANTINE} cannot be read: {' '.join(str(error).split())}") from error
    return [Rejection(**row) for row in table.to_pylist()]

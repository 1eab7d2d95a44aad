"""One rank's pieces as one safetensors file, and the index that tells where each lies and what it must hash to."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from heliostat.errors import CheckpointError
from heliostat.training.pieces import Piece

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ALIGNMENT = 8  # bytes; safetensors asks that the data begin at a multiple


@dataclass(frozen=True)
class Place:
    """Where a piece lies: `count` elements from `start` of the flattened tensor `name`, `num_bytes` at `offset` of `file`."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    start: int
    count: int
    file: str
    offset: int
    num_bytes: int
    sha256: str

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the values."""
        return _DTYPES[self.dtype]


@dataclass(frozen=True)
class ShardIndex:
    """What an index file says."""

    num_bytes: int
    header_bytes: int
    header_sha256: str
    places: tuple[Place, ...]


@dataclass(frozen=True)
class _Written:
    header_bytes: int
    header_sha256: str
    rows: list[dict[str, Any]]


def write_pieces(pieces: Iterable[Piece]) -> tuple[bytearray, _Written]:
    """The file's content, and what its index will say. Raises CheckpointError for a dtype that has no place in it."""
    ordered = sorted(pieces, key=lambda piece: (piece.name, piece.start))
    header: dict[str, Any] = {}
    position = 0
    for piece in ordered:
        if piece.values.dtype not in _NAMES:
            raise CheckpointError(f"{piece.name} is {piece.values.dtype}; checkpoints hold {', '.join(sorted(_DTYPES))}")
        key = f"{piece.name}@{piece.start}"
        header[key] = {
            "dtype": _NAMES[piece.values.dtype],
            "shape": [piece.values.numel()],
            "data_offsets": [position, position + piece.num_bytes],
        }
        position += piece.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    head = len(text).to_bytes(8, "little") + text
    data = bytearray(len(head) + position)
    data[: len(head)] = head
    rows = [_fill(data, piece, len(head) + header[f"{piece.name}@{piece.start}"]["data_offsets"][0]) for piece in ordered]
    return data, _Written(len(head), hashlib.sha256(head).hexdigest(), rows)


def _fill(data: bytearray, piece: Piece, offset: int) -> dict[str, Any]:
    """Copy one piece into the file's content; returns its row of the index."""
    stop = offset + piece.num_bytes
    if piece.num_bytes:
        target = torch.frombuffer(data, dtype=piece.values.dtype, count=piece.values.numel(), offset=offset)
        target.copy_(piece.values)
    return {
        "name": piece.name,
        "shape": list(piece.shape),
        "dtype": _NAMES[piece.values.dtype],
        "start": piece.start,
        "count": piece.values.numel(),
        "offset": offset,
        "num_bytes": piece.num_bytes,
        "sha256": hashlib.sha256(memoryview(data)[offset:stop]).hexdigest(),
    }


def index_to_json(written: _Written, num_bytes: int) -> bytes:
    """The index file."""
    head = {"num_bytes": num_bytes, "header_bytes": written.header_bytes, "header_sha256": written.header_sha256}
    return json.dumps({**head, "pieces": written.rows}).encode()


def index_from_json(data: bytes, file: str) -> ShardIndex:
    """Read an index; `file` names the file it tells of. Raises ValueError, KeyError or TypeError for anything else."""
    found = json.loads(data)
    rows: Sequence[dict[str, Any]] = found["pieces"]
    places = tuple(Place(**{**row, "shape": tuple(row["shape"]), "file": file}) for row in rows)
    return ShardIndex(found["num_bytes"], found["header_bytes"], found["header_sha256"], places)

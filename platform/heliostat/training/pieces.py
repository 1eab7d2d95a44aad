"""Named tensors in pieces: what one rank holds of the state of a run, whatever engine holds it.

Every tensor has one name in all engines and world sizes: that of the method's parameter or buffer, and `adamw/<moment>/<name>`
for the optimizer. A piece is a run of consecutive elements of the flattened tensor, so that a run can go on with other
processes: each reads the elements that it holds, however the pieces were cut.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

MOMENTS = "adamw/"

ReadPiece = Callable[[str, int, int], Tensor]
"""(name, first element, number of elements) -> those elements, (n,), on the CPU. Raises CheckpointError."""


@dataclass(frozen=True)
class Piece:
    """Elements `start` to `start + len(values)` of the flattened tensor `name`, whose whole shape is `shape`."""

    name: str
    shape: tuple[int, ...]
    start: int
    values: Tensor

    @property
    def num_bytes(self) -> int:
        """Size of the values."""
        return self.values.numel() * self.values.element_size()


def moment_name(moment: str, parameter: str) -> str:
    """The name of an optimizer's tensor: `exp_avg`, `exp_avg_sq` or `step` of a parameter."""
    return f"{MOMENTS}{moment}/{parameter}"


def whole(tensors: Mapping[str, Tensor]) -> list[Piece]:
    """Each tensor as one piece; the values are views."""
    return [Piece(name, tuple(tensor.shape), 0, tensor.detach().reshape(-1)) for name, tensor in tensors.items()]


def share_out(pieces: Iterable[Piece], rank: int, size: int) -> list[Piece]:
    """The pieces that one of `size` ranks writes where all hold the same: about equal bytes, the same on every rank."""
    loads = [0] * size
    mine = []
    for piece in sorted(pieces, key=lambda one: (-one.num_bytes, one.name)):
        owner = loads.index(min(loads))
        loads[owner] += piece.num_bytes
        if owner == rank:
            mine.append(piece)
    return mine

"""Where a run stands in the global sequence of images, and how it is kept in a checkpoint."""

from dataclasses import dataclass
from typing import Any

from heliostat.errors import DataError


@dataclass
class Position:
    """The next step of a sequence. order: digest of the sequence. The same on every rank, for every world size."""

    order: str
    global_batch_size: int
    next_step: int = 0

    def state_dict(self) -> dict[str, Any]:
        """Images before the next step, and which sequence they belong to."""
        return {"position": self.next_step * self.global_batch_size, "order": self.order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another run stood. Raises DataError when it had another sequence or stood in the middle of a batch."""
        if state["order"] != self.order:
            raise DataError(
                "the loader's state is of another sequence of images: sources, their weights, seed or shuffle differ; "
                "give those of the interrupted run or start a new version"
            )
        step, rest = divmod(int(state["position"]), self.global_batch_size)
        if rest:
            raise DataError(
                f"position {state['position']} of the loader's state is no multiple of global_batch_size "
                f"{self.global_batch_size}; go on with the batch size of the interrupted run"
            )
        self.next_step = step
